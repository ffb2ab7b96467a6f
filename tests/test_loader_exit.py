"""A program that is interrupted, forks and ends while its loaders load."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

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
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(SCRIPT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(2):
        assert process.stdout.readline() == "batch\n"
    time.sleep(0.2)  # most likely it waits for the third by now
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out == "interrupted\nforked\n" and not errors
