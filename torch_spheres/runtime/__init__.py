"""The pool of worker threads, and what its threads need to work on a caller's behalf.

`pool` is the hierarchy; `caller_context` and `rng` bring the caller's settings and random numbers
to its threads; the others keep the C++ runtime, glibc, OpenMP and MKL in tune with it. Imports
nothing of this package but `errors`, `_compat` and the C++ module.
"""
