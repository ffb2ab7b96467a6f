"""What can be seen of the spheres: statistics, traces, displays, exporters and pictures."""
