"""Has glibc keep the memory that a training step frees, for the next step.

glibc gives large tensors back to the system as soon as they are freed, and the next step gets the
pages anew, cleared one by one; for activations of many megabytes that can take as long as the
arithmetic. Starting spheres, `wrap` and `SphereParallel` call `keep_freed_memory`, after which
glibc keeps freed memory, as torch's caching allocator does on CUDA, in one heap for all threads
(one of a thread's own could not hold blocks of more than 64 MiB). The process then stays as large
as it ever was.

Pools of three or more levels are for saving memory. With those, blocks of a megabyte and more are
given back: otherwise the heap would grow to several times the memory in use.

``TORCH_SPHERES_KEEP_MEMORY=0`` in the environment leaves glibc alone; other allocators (tcmalloc,
jemalloc) are not affected.
"""

from __future__ import annotations

from torch_spheres import _core
from torch_spheres.runtime.process_wide import is_on

__all__ = ["keep_freed_memory"]

_VARIABLE = "TORCH_SPHERES_KEEP_MEMORY"
_LEAN_LEVELS = 3

_accepted: dict[bool, bool] = {}  # by lean or not: whether glibc took the setting


def keep_freed_memory(levels: int = 1) -> bool:
    """Sets glibc to keep freed memory, once for the process.

    Args:
        levels: of the pool that will run. Once a pool had three levels, blocks of a megabyte and
            more are given back from then on.

    Returns:
        False if the environment variable or the allocator does not allow it.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    if not is_on(_VARIABLE):
        return False
    lean = levels >= _LEAN_LEVELS or True in _accepted
    if lean not in _accepted:
        _accepted[lean] = _core.keep_freed_memory(lean)
    return _accepted[lean]
