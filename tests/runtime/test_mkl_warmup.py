"""MKL chooses its kernels on import, on one thread; see runtime/mkl_warmup.py."""

from __future__ import annotations

import textwrap

import fork_server
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_spheres.runtime.mkl_warmup import FUNCTIONS, choose_kernels


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_import_calls_every_function_in_both_types():
    script = """
        import torch
        names = []
        def noted(name, function):
            def call(x):
                assert x.is_contiguous() and x.device.type == "cpu" and x.numel() == 1
                names.append((name, x.dtype))
                return function(x)
            return call
        for name in {functions}:
            setattr(torch, name, noted(name, getattr(torch, name)))
        import torch_spheres
        torch_spheres.KissingSpheres
        wanted = [(n, t) for t in (torch.float32, torch.float64) for n in {functions}]
        assert sorted(names, key=str) == sorted(wanted, key=str), names
    """
    script = textwrap.dedent(script).format(functions=FUNCTIONS)
    done = fork_server.run(script, bare=True)
    assert done.returncode == 0, done.stderr


def test_it_leaves_no_trace_and_sees_no_mode():
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads()
    with Calls() as calls, torch.device("meta"):
        choose_kernels()
    assert calls.seen == []  # on real tensors, whatever is around the import
    now = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads()
    assert torch.equal(before[0], now[0]) and before[1:] == now[1:]
