"""The environment variables that switch off what this package changes for the whole process.

Each is 1 (the default) or 0:

- ``TORCH_SPHERES_KEEP_MEMORY``: glibc keeps freed memory (malloc.py); from the first start of
  spheres, `wrap` or `SphereParallel` on.
- ``TORCH_SPHERES_WARM_UP_MKL``: MKL chooses its kernels early (mkl_warmup.py); on import.
- ``TORCH_SPHERES_EXIT_HOOKS``: `sys.excepthook` and `atexit` tell the other ranks why this rank has
  ended (distributed/failures.py); from the first use of a process group on.
- ``TORCH_SPHERES_STEP_HOOK``: a hook after every optimizer's step notes which optimizers train a
  model, for the ranks' comparison of learning rates (distributed/drift.py); from the first use of
  a process group on.

What else is changed has no variable; docs/side_effects.md lists all of it. When a part is loaded:

- functions are registered for fork() and with `atexit`, without which a forked child or the end of
  the program would hang; they change only this package's own state;
- `torch.utils.checkpoint.CheckpointFunction.forward` is replaced (training/shard.py).

When a feature is first used:

- torch's default number of intra-op threads is 1 for a moment as a thread of the package begins
  (thread_hooks.py);
- kernels of random operators are registered under the dispatch key `DeferredInit`, and
  `torch.random.default_generator` is replaced (rng.py);
- `torch.utils.data.get_worker_info`, and `default_collate` for tensors, get other code
  (data/worker_info.py).
"""

from __future__ import annotations

import os

__all__ = ["is_on"]


def is_on(variable: str) -> bool:
    """Whether the environment variable is not 0.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    wanted = os.environ.get(variable, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"the environment variable {variable} must be 0 or 1, got {wanted!r}")
    return wanted == "1"
