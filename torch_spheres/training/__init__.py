"""Models that run in shards: `SphereParallel`, `parallelize_` and `GradientHook`."""
