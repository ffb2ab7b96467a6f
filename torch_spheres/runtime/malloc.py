"""Memory that a training step frees is kept for the next step, instead of going back to the system.

glibc gives large tensors back as soon as they are freed, and gets them anew, page by page cleared
by the system, in the next step. For activations of many megabytes that can take as long as the
arithmetic. Starting spheres, `wrap` and `SphereParallel` tell glibc to keep what is freed, as
torch's allocator does on CUDA, in at most as many heaps as there are cores: the process then
stays as large as it ever was. From three levels on, which are for saving memory, there is one heap,
and blocks of a megabyte and more are given back all the same: it would grow to several times what
is in use.
``TORCH_SPHERES_KEEP_MEMORY=0`` in the environment leaves glibc alone; with another allocator
(tcmalloc, jemalloc) nothing changes.
"""

from __future__ import annotations

from torch_spheres import _core
from torch_spheres.runtime.process_wide import is_on

__all__ = ["keep_freed_memory"]

_VARIABLE = "TORCH_SPHERES_KEEP_MEMORY"
_LEAN_LEVELS = 3

_done: dict[bool, bool] = {}  # lean or not: whether glibc took it


def keep_freed_memory(levels: int = 1) -> bool:
    """Tells glibc, once for the process; False where it was declined or there is no such setting.

    Args:
        levels: of the hierarchy that will run. Once there were three, blocks of a megabyte stay
            outside of what is kept.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    if not is_on(_VARIABLE):
        return False
    lean = levels >= _LEAN_LEVELS or True in _done
    if lean not in _done:
        _done[lean] = _core.keep_freed_memory(lean)
    return _done[lean]
