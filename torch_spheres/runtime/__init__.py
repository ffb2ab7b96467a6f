"""The pool of worker threads, and what its threads need to work on a caller's behalf.

`pool` gives work to the threads of `sphere_threads`. `caller_context` and `rng` carry the caller's
settings and random numbers to them. `malloc`, `openmp` and `mkl_warmup` set up libraries that
several threads use, and `process_wide` lists the switches. `trace_hooks`, `sample_counter` and
`step_counter` are what `observe` reads. `object_graph` and `rebinding` search and copy users'
objects. This package imports only `errors`, `_compat` and the C++ module.
"""
