"""Loaders on the spheres' threads: `wrap`, the batch sampler, prefetching and resumption."""
