"""What a sphere's thread does before its first and after its last Python call.

The C++ runtime calls the two hooks, which sphere_threads.py installs on import. Loaders' worker
threads use `take_one_intra_op_thread` too.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

from torch_spheres import _core

__all__ = ["has_gil", "install", "take_one_intra_op_thread"]

_lock = threading.Lock()


def _after_fork() -> None:
    # A sphere of the parent, which the child has no thread of, may hold the old lock.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _enter(name: str) -> None:
    # `current_thread()` makes the entry by which logging and debuggers see the name.
    threading.current_thread().name = name
    take_one_intra_op_thread()


def take_one_intra_op_thread() -> None:
    """Sets the calling thread's number of intra-op threads to 1, and no other thread's.

    The calling thread is one of many already, and a kernel that splits a sum over threads has other
    bits for other numbers of threads.
    """
    # set_num_threads() also sets a process-wide default, which threads take over at their first use
    # of torch. get_num_threads() makes sure that this thread has done so. Another thread puts the
    # default back, because putting it back here would undo the 1.
    with _lock:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            restorer = threading.Thread(target=torch.set_num_threads, args=(default,))
            restorer.start()
        except (RuntimeError, MemoryError) as error:
            if "shutdown" in str(error):
                return  # Python 3.12 and later: no thread will come that would read the default
            torch.set_num_threads(default)  # of this thread as well: it will not run any kernel
            raise
        restorer.join()


def _leave() -> None:
    # Python 3.11 keeps the entry of a thread that it did not start for ever, and has no public way
    # to drop the entry. Later versions drop it themselves, so nothing is found here.
    active: dict[int, threading.Thread] = getattr(threading, "_active", {})
    thread = active.get(threading.get_ident())
    if thread is not None and type(thread).__name__ == "_DummyThread":
        del active[threading.get_ident()]


def has_gil() -> bool:
    """Whether Python runs one thread at a time: unless it is a free-threaded build."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def install() -> None:
    """Gives the two hooks to the C++ runtime; called once, on import."""
    _core.set_thread_hooks(_enter, _leave)
