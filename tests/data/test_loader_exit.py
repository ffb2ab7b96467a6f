"""A program that is interrupted, forks and ends while its loaders load."""

from __future__ import annotations

import textwrap

import fork_server

SCRIPT = """
    import os, signal, threading, time, torch
    import torch_spheres as ts
    from torch.utils.data import DataLoader, Dataset, TensorDataset

    class Slow(Dataset):
        def __len__(self): return 100
        def __getitem__(self, index):
            if index >= 8: gate.wait()  # a wait that only an answered Ctrl-C can end
            return index

    def rest_of(iterator):
        try:
            return len([*iterator])
        except RuntimeError as error:
            assert "stopped" in str(error) or "fork" in str(error)
            return "told"

    gate = threading.Event()
    loader = ts.wrap(DataLoader(Slow(), 4, num_workers=2))
    iterator, batches = iter(loader), []
    try:
        while True:
            batches.append(next(iterator))
            print("batch", flush=True)
    except KeyboardInterrupt:
        gate.set()
    batches += iterator  # nothing was lost
    assert torch.cat(batches).tolist() == [*range(100)]
    print("interrupted", flush=True)

    # Tensors without workers need nobody else, and go on in a child.
    tensors = TensorDataset(torch.arange(100))
    iterators = [iter(ts.wrap(DataLoader(tensors, 4), loader.spheres)), iter(loader)]
    for iterator in iterators:
        next(iterator)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if [*map(rest_of, iterators)] == [24, "told"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    print("forked", flush=True)
"""


def test_ctrl_c_a_fork_and_an_end_with_loaders_half_used():
    with fork_server.start(textwrap.dedent(SCRIPT), warn=(("ignore",),)) as process:
        for _ in range(2):
            assert process.readline() == "batch\n"
        process.interrupt()
        assert process.wait() == 0, process.stderr
    assert process.stdout == "batch\nbatch\ninterrupted\nforked\n" and not process.stderr
