"""Shows what the spheres do: statistics, traces, live displays, exporters and pictures.

`KissingSpheres` (spheres.py) offers all of it as methods. `stats` has the figures of all spheres,
`sphere_stats` those of one; `table`, `advice`, `prometheus` and `tensorboard` are views of them.
`trace_recorder` records a `trace`, `chrome_trace` writes it to a file. `live` shows `readings` in
one of the `displays`.
"""
