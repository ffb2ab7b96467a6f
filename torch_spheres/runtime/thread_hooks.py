"""What a sphere's thread does before its first and after its last Python call."""

from __future__ import annotations

import os
import sys
import threading

import torch

from torch_spheres import _core

__all__ = ["has_gil", "install", "take_one_intra_op_thread"]

_lock = threading.Lock()


def _after_fork() -> None:
    # A sphere of the parent may have held it, which the child has no thread of.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _enter(name: str) -> None:
    # `current_thread()` makes the entry through which logging and debuggers see the name.
    threading.current_thread().name = name
    take_one_intra_op_thread()


def take_one_intra_op_thread() -> None:
    """For the calling thread, which is parallel to others already.

    (And a kernel that splits its sums over threads gives other bits for other thread counts.)
    """
    # set_num_threads() sets the calling thread and a process-wide default, which only threads read
    # that have not used torch yet; asking first makes sure that this thread has.  The default is
    # put back from a thread of its own, since setting it here would undo the 1.
    with _lock:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        restorer = threading.Thread(target=torch.set_num_threads, args=(default,))
        try:
            restorer.start()
        except RuntimeError as error:
            if "shutdown" in str(error):
                return  # from Python 3.12 on; no thread will come that would read the default
            raise
        restorer.join()


def _leave() -> None:
    # Python 3.11 keeps the entry of a thread that it did not start for ever.  There is no public
    # way to drop it; on versions that drop it themselves there is nothing left to find.
    active: dict[int, threading.Thread] = getattr(threading, "_active", {})
    thread = active.get(threading.get_ident())
    if thread is not None and type(thread).__name__ == "_DummyThread":
        del active[threading.get_ident()]


def has_gil() -> bool:
    """Whether Python runs one thread at a time: always, but in a free-threaded build of Python."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def install() -> None:
    """Tells the C++ runtime; called once, on import."""
    _core.set_thread_hooks(_enter, _leave)
