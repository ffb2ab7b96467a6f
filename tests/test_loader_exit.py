"""Programs that end, fork or are interrupted while a loader loads."""

from __future__ import annotations

import textwrap

import fork_server
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def start(script):
    return fork_server.start(textwrap.dedent(script), warn=(("ignore",),))


SLOW = """
    import sys, threading, time, torch
    import torch_spheres as ts
    from torch.utils.data import DataLoader, Dataset, TensorDataset
    class Slow(Dataset):
        def __len__(self): return 100
        def __getitem__(self, index):
            if index < 8: time.sleep(0.01)
            else: gate.wait()  # a wait that only an answered Ctrl-C can end
            return index
    gate = threading.Event()
    loader = ts.wrap(DataLoader(Slow(), 4, num_workers=int({workers})))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_is_answered_while_batches_load(workers):
    loop = """
    iterator, batches = iter(loader), []
    try:
        while True:
            batches.append(next(iterator))
            print("batch", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        gate.set()
    batches += iterator  # nothing was lost
    print(sorted(int(i) for batch in batches for i in batch) == [*range(100)], flush=True)
    """
    on_threads = (
        ""
        if workers
        else """
    loader._tempo._seconds.update(caller=2.0, spheres=1.0)
    loader._tempo._probes.clear()
    """
    )
    with start(SLOW.format(workers=workers) + on_threads + loop) as process:
        assert [process.readline() for _ in range(2)] == ["batch\n"] * 2
        process.interrupt()  # while it waits for the third
        assert process.wait() == 0, process.stderr
    out = process.stdout.removeprefix("batch\nbatch\n")
    # (Without workers the index list is lost whose batch was being loaded, as it always was.)
    assert out == "interrupted\nTrue\n" if workers else out.startswith("interrupted\n"), out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_may_end_with_a_loader_half_used(workers):
    end = "\n    gate.set(); iterator = iter(loader); next(iterator)\n"
    with start(SLOW.format(workers=workers) + end) as process:
        assert process.wait() == 0, process.stderr
    assert "Exception" not in process.stderr and "Error" not in process.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_after_a_fork_the_child_is_told(workers):
    """Without workers it needs nobody else, and goes on."""
    script = (
        SLOW.format(workers=workers)
        + """
    import os, signal
    gate.set()
    iterator = iter(loader)
    next(iterator)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        code, more = 1, 0
        try:
            for _ in iterator:
                more += 1
            code = 0 if more == 24 and loader.num_workers == 0 else 3
        except RuntimeError as error:
            told = "stopped" in str(error) or "fork" in str(error)
            code = 0 if told and loader.num_workers else 2
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status))
    """
    )
    with start(script) as process:
        process.wait()
    assert process.stdout.strip() == "0", process.stderr
