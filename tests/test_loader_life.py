"""Loaders that are dropped, broken out of, interrupted or stopped leave nothing behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from loader_support import Numbers, Stream, on_spheres
from torch.utils.data import DataLoader, Dataset

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=3) as running:
        yield running


class Gated(Dataset):
    """Holds what loads until the gate opens."""

    def __init__(self, rows=40):
        self.gate, self.rows, self.started = threading.Event(), rows, threading.Event()

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.started.set()
        assert self.gate.wait(60)
        return torch.tensor(index)


def wrapped(dataset, spheres, workers, **options):
    loader = ts.wrap(DataLoader(dataset, 2, num_workers=workers, **options), spheres)
    return loader if workers else on_spheres(loader)


def eventually(condition):
    """What is under way on the spheres ends by itself, but not at once."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        gc.collect()
        time.sleep(0.01)


def takes_no_work(spheres):
    """Whether a stop() has got so far."""
    try:
        spheres._core.submit(len, ((),), collect=True)
    except ts.StoppedError:
        return True
    return False


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return len([*Path("/proc/self/fd").iterdir()])


def test_a_soak_of_epochs_with_early_breaks_leaves_nothing(spheres):
    """200 epochs: threads, open files and memory stay as they were."""
    datasets = [Numbers(60, draws=("torch",)), Stream(60), Numbers(60)]
    loaders = [
        wrapped(dataset, spheres, workers, persistent_workers=persistent)
        for dataset in datasets
        for workers, persistent in ((0, False), (2, False), (3, True))
    ]

    def epoch(k):
        for loader in loaders:
            for n, _ in enumerate(loader):
                if n == k % 31:
                    break

    for k in range(20):
        epoch(k)
    gc.collect()
    before = threading.active_count(), open_files(), resident()
    for k in range(200):
        epoch(k)
    gc.collect()
    after = threading.active_count(), open_files(), resident()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 16 << 20


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dropped_iterator_releases_everything(spheres, workers):
    dataset = Gated()
    loader = wrapped(dataset, spheres, workers)
    iterator = iter(loader)
    if workers:
        dataset.started.wait(60)
        dataset.gate.set()
        next(iterator)
    else:
        dataset.gate.set()
        next(iterator)
    alive = weakref.ref(iterator), weakref.ref(dataset), weakref.ref(loader)
    del iterator
    assert alive[0]() is None  # at once: it is in no cycle
    del loader, dataset
    eventually(lambda: [ref() for ref in alive] == [None] * 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_dropped_while_it_loads(spheres, workers):
    dataset = Gated()
    loader = wrapped(dataset, spheres, workers)
    iterator = iter(loader)
    taker = threading.Thread(target=next, args=(iterator,))
    if workers == 0:
        taker.start()
    dataset.started.wait(60)
    if workers == 0:
        dataset.gate.set()
        taker.join()
    del iterator, taker
    dataset.gate.set()
    alive = weakref.ref(dataset)
    assert len([*loader]) == 20
    del loader, dataset
    eventually(lambda: alive() is None)


def test_spheres_that_are_stopped_end_the_loop():
    for workers in (0, 2):
        dataset = Gated()
        with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
            iterator = iter(wrapped(dataset, spheres, workers))
            caught = []

            def loop(iterator=iterator, caught=caught):
                try:
                    for _ in iterator:
                        pass
                except ts.StoppedError as error:
                    caught.append(error)

            thread = threading.Thread(target=loop)
            thread.start()
            dataset.started.wait(60)
            stopper = threading.Thread(target=spheres.stop)
            stopper.start()
            eventually(lambda spheres=spheres: takes_no_work(spheres))
            dataset.gate.set()
            thread.join(60)
            stopper.join(60)
            assert not thread.is_alive() and len(caught) == 1
            # Other spheres' threads: the loader goes on with a new iterator.
            spheres.start()
            assert len([*wrapped(dataset, spheres, workers)]) == 20


def test_more_loaders_than_batches_may_be_in_flight(spheres):
    dataset = Gated(4)
    iterators = [iter(wrapped(dataset, spheres, 1)) for _ in range(60)]
    threading.Timer(0.05, dataset.gate.set).start()
    more = [iter(wrapped(dataset, spheres, 2)) for _ in range(20)]
    for iterator in [*iterators, *more]:
        assert [batch.tolist() for batch in iterator] == [[0, 1], [2, 3]]


def test_a_hundred_workers(spheres):
    loader = wrapped(Numbers(500), spheres, 100)
    assert [int(i) for batch in loader for i in batch[1]] == list(range(500))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_inside_a_work_item_of_the_same_spheres(workers, concurrency):
    """The item's own thread loads: the others may be as busy."""
    plain = DataLoader(Numbers(20), 4, num_workers=workers)

    def count(_):
        loader = wrapped_again(plain, spheres)
        return sum(len(batch[1]) for batch in loader)

    with ts.KissingSpheres(levels=2, concurrency=concurrency) as spheres:
        assert spheres.map(count, range(12)) == [20] * 12


def wrapped_again(plain, spheres):
    loader = ts.wrap(plain, spheres)
    return loader if plain.num_workers else on_spheres(loader)


class Outer(Dataset):
    """Its samples come from loaders on the same spheres."""

    def __init__(self, spheres, workers):
        self.spheres, self.inner = spheres, DataLoader(Numbers(8), 4, num_workers=workers)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return sum(int(b[1].sum()) for b in wrapped_again(self.inner, self.spheres)) + index


@pytest.mark.parametrize("outer", [0, 2, 3])
@pytest.mark.parametrize("inner", [0, 2])
def test_a_loader_inside_the_dataset_of_another(outer, inner):
    for concurrency in (1, 2):
        with ts.KissingSpheres(levels=2, concurrency=concurrency) as spheres:
            loader = wrapped(Outer(spheres, inner), spheres, outer)
            assert [batch.tolist() for batch in loader] == [[28, 29], [30, 31], [32, 33]]


def test_a_full_runtime_and_a_long_queue():
    """64 batches are in flight: tasks follow each other on one sphere, in a loop."""
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        gate = threading.Event()
        loader = wrapped(Numbers(4000), spheres, 1, prefetch_factor=1500)
        iterator = iter(loader)
        next(iterator)
        for _ in range(60):
            spheres.distribute_work([0], lambda _: gate.wait(0.05))
        rows = 2 + sum(len(batch[1]) for batch in iterator)
        gate.set()
        assert rows == 4000


def test_after_its_workers_were_shut_down_an_iterator_is_at_its_end(spheres):
    loader = wrapped(Numbers(20), spheres, 2, persistent_workers=True)
    iterator = iter(loader)
    next(iterator)
    iterator._shutdown_workers()
    assert next(iterator, None) is None
    assert len([*loader]) == 10
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert next(iterator, None) is None
    assert len([*loader]) == 9 and len([*loader]) == 10


def test_persistent_workers_live_again_with_their_spheres():
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        dataset = Gated()
        loader = wrapped(dataset, spheres, 2, persistent_workers=True)
        iterator = iter(loader)
        dataset.started.wait(60)
        stopper = threading.Thread(target=spheres.stop)
        stopper.start()
        eventually(lambda: takes_no_work(spheres))
        dataset.gate.set()
        stopper.join()
        with pytest.raises(ts.StoppedError):
            for _ in iterator:
                pass
        spheres.start()
        assert len([*loader]) == 20 and len([*loader]) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_may_share_an_iterator(spheres, workers):
    iterator = iter(wrapped(Numbers(200), spheres, workers))
    rows, lock = [], threading.Lock()

    def take():
        for batch in iterator:
            with lock:
                rows.extend(batch[1].tolist())

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(rows) == list(range(200))


def test_a_warning_that_is_an_error_loses_no_batch(spheres):
    loader = wrapped(Numbers(40), spheres, 2)
    loader._meter.news = iter([None, None, "something new", *[None] * 100]).__next__
    rows, told, iterator = [], 0, iter(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while True:
            try:
                rows.extend(next(iterator)[1].tolist())
            except UserWarning:
                told += 1
            except StopIteration:
                break
    assert rows == list(range(40)) and told == 1


def test_errors_hold_nothing(spheres):
    """An error's traceback owns frames; none of them may own the error, or the iterator stays."""
    for workers in (0, 2):
        loader = wrapped(Numbers(20, bad=(5,)), spheres, workers)
        iterator = iter(loader)
        alive = weakref.ref(iterator)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                with contextlib.suppress(KeyError):
                    next(iterator)
            del iterator
            assert alive() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_and_pickles(spheres, workers):
    class Named(DataLoader):
        name = "mine"

    globals()["Named"] = Named
    Named.__qualname__ = "Named"
    for kind in (DataLoader, Named):
        plain = kind(Numbers(20), 4, num_workers=workers)
        loader = ts.wrap(plain, spheres, copy_dataset=True)
        deep, pickled = copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))
        assert deep.spheres is spheres and pickled.spheres is not spheres
        assert pickled.spheres.levels == 2 and pickled.spheres.concurrency == 3
        for other in (deep, pickled):
            assert type(other) is type(loader) and other.dataset is not loader.dataset
            assert [b[1].tolist() for b in other] == [b[1].tolist() for b in plain]
        pickled.spheres.stop()


def run(script, **options):
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


SLOW = """
    import sys, threading, time, torch
    import torch_spheres as ts
    from torch.utils.data import DataLoader, Dataset
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
    process = run(SLOW.format(workers=workers) + loop)
    for _ in range(2):
        assert process.stdout.readline() == "batch\n"
    time.sleep(0.2)  # until it waits for the third
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    # (Without workers the index list is lost whose batch the caller was loading, as it always was.)
    assert out == "interrupted\nTrue\n" if workers else out.startswith("interrupted\n"), errors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_may_end_with_a_loader_half_used(workers):
    end = "\n    gate.set(); iterator = iter(loader); next(iterator)\n"
    process = run(SLOW.format(workers=workers) + end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Exception" not in errors and "Error" not in errors


def test_after_a_fork_the_child_is_told():
    script = (
        SLOW.format(workers=2)
        + """
    import os
    gate.set()
    iterator = iter(loader)
    next(iterator)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            while True:
                next(iterator)
        except RuntimeError as error:
            code = 0 if "stopped" in str(error) or "fork" in str(error) else 2
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status))
    """
    )
    process = run(script)
    out, errors = process.communicate(timeout=60)
    assert out.strip() == "0", errors
