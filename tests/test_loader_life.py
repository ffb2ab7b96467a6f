"""Loaders that are dropped, broken out of, interrupted or stopped leave nothing behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
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
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torch_spheres as ts
from torch_spheres.loading.team import Team

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


def test_an_iterator_dropped_while_it_loads(spheres):
    dataset = Gated()
    loader = wrapped(dataset, spheres, 2)
    iterator = iter(loader)
    dataset.started.wait(60)
    gone = weakref.ref(iterator)
    del iterator
    assert gone() is None
    dataset.gate.set()
    alive = weakref.ref(dataset)
    assert len([*loader]) == 20
    del loader, dataset
    eventually(lambda: alive() is None)


@pytest.mark.parametrize("workers", [0, 2])
def test_spheres_that_are_stopped_under_a_loader(workers):
    """Logical workers are gone with them; without workers the loop's own thread goes on."""
    dataset = Gated()
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        iterator = iter(wrapped(dataset, spheres, workers))
        caught, rows = [], []

        def loop():
            try:
                for batch in iterator:
                    rows.extend(batch.tolist())
            except ts.StoppedError as error:
                caught.append(error)

        thread = threading.Thread(target=loop)
        thread.start()
        dataset.started.wait(60)
        stopper = threading.Thread(target=spheres.stop)
        stopper.start()
        eventually(lambda: takes_no_work(spheres))
        dataset.gate.set()
        thread.join(60)
        stopper.join(60)
        assert not thread.is_alive()
        if workers:
            assert len(caught) == 1
            with pytest.raises(ts.StoppedError):
                [*wrapped(dataset, spheres, workers)]
        else:
            assert rows == list(range(40)) and not caught
            loader = wrapped(dataset, spheres, 0)
            assert len([*loader]) == 20 and loader.stats().way == "caller"
        # Other threads of the same spheres: a new iterator.
        spheres.start()
        loader = wrapped(dataset, spheres, workers)
        assert len([*loader]) == 20 and loader.stats().way == "spheres"


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


def test_a_full_runtime_and_a_long_queue(monkeypatch):
    """64 batches are in flight: tasks follow each other on one sphere, in a loop."""
    refused = []
    schedule = Team._schedule

    def counting(team, queue):
        taken = schedule(team, queue)
        refused.append(not taken)
        return taken

    monkeypatch.setattr(Team, "_schedule", counting)
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        first, gate = threading.Event(), threading.Event()

        class Waits(Numbers):
            def __getitem__(self, index):
                assert index > 0 or first.wait(60)
                return super().__getitem__(index)

        loader = wrapped(Waits(4000), spheres, 1, prefetch_factor=1500)
        iterator = iter(loader)
        fill_up(spheres, gate, already=1)
        first.set()
        rows = sum(len(batch[1]) for batch in iterator)
        gate.set()
        assert rows == 4000 and any(refused)


def fill_up(spheres, gate, already=0):
    """Until there are 64 batches in flight, the most that there may be."""
    return [
        spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        for _ in range(64 - already)
    ]


def test_ctrl_c_while_a_task_waits_for_room():
    """The batch that was on its way to the loop, and the task, are there when it comes again."""
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        gate = threading.Event()
        iterator = iter(wrapped(Numbers(12), spheres, 1, prefetch_factor=1))
        eventually(lambda: iterator._team.ready == 1)
        held = fill_up(spheres, gate)
        main = threading.get_ident()
        threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(iterator)
        gate.set()
        for work in held:
            work.wait(60)
        rows = [int(i) for batch in iterator for i in batch[1]]
        assert rows == list(range(12))


def sizes(iterator, most):
    return [len(batch[0]) for batch in itertools.islice(iterator, most)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["samples", "tensors"])
def test_work_items_and_the_loop_share_an_iterator(workers, kind):
    """All spheres wait for their turn, while the loop waits for the spheres."""
    dataset = Numbers(200) if kind == "samples" else TensorDataset(torch.randn(200, 9000))
    for concurrency in (1, 2):
        with ts.KissingSpheres(levels=2, concurrency=concurrency) as spheres:
            iterator = iter(wrapped(dataset, spheres, workers))
            work = spheres._core.submit(
                lambda _, iterator=iterator: sizes(iterator, 20),
                (0, 1),
                collect=True,
            )
            rows = sizes(iterator, 40)
            work.wait(60)
            rows += [n for part in work.results for n in part]
            rows += sizes(iterator, 100)
            assert rows == [2] * 100


@pytest.mark.parametrize("kind", ["samples", "tensors"])
def test_an_iterator_from_outside_goes_on_in_a_work_item(kind):
    """What is under way for it may be waiting for that item's very thread."""
    dataset = Numbers(60) if kind == "samples" else TensorDataset(torch.randn(60, 60000))
    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        loader = wrapped(dataset, spheres, 2, persistent_workers=True)
        for _ in range(5):
            gate = threading.Event()
            held = spheres._core.submit(lambda _, gate=gate: gate.wait(60), (0,), collect=True)
            iterator = iter(loader)
            rest = spheres._core.submit(
                lambda _, iterator=iterator: (len([*iterator]), len([*loader])), (0,), collect=True
            )
            gate.set()
            held.wait(60)
            rest.wait(60)
            assert rest.results == [(30, 30)]


def test_a_new_epoch_in_a_work_item_while_tasks_are_under_way():
    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        loader = wrapped(Numbers(60), spheres, 2, persistent_workers=True)
        gate = threading.Event()
        held = spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        iter(loader)
        rest = spheres._core.submit(lambda _: len([*loader]), (0,), collect=True)
        gate.set()
        held.wait(60)
        rest.wait(60)
        assert rest.results == [30]


def test_what_a_waiting_sphere_has_set_is_not_the_datasets():
    """A task that is done in the middle of somebody's inference is not part of it."""
    seen = []

    class Looks(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            seen.append((*modes, torch.is_grad_enabled(), str(torch.ones(1).device)))
            return torch.ones(1) * index

    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        gate = threading.Event()
        held = spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        iterator = iter(wrapped(Looks(), spheres, 2))

        def go_on(_):
            with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
                batches = [*iterator]
                assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
                assert torch.ones(1).device.type == "meta"
            return batches

        work = spheres._core.submit(go_on, (0,), collect=True)
        gate.set()
        held.wait(60)
        work.wait(60)
        batches = work.results[0]
    assert seen == [(False, False, True, "cpu")] * 8
    assert [b.flatten().tolist() for b in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert not any(b.is_inference() for b in batches)


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


def test_random_streams_of_persistent_workers_go_on_after_a_restart():
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        loader = wrapped(Numbers(8, draws=("torch",)), spheres, 2, persistent_workers=True)
        torch.manual_seed(0)
        epochs = [torch.stack([batch[5] for batch in loader]) for _ in range(2)]
        spheres.stop()
        spheres.start()
        epochs.append(torch.stack([batch[5] for batch in loader]))
        plain = DataLoader(loader.dataset, 2, num_workers=2, persistent_workers=True)
        torch.manual_seed(0)
        for mine in epochs:
            assert torch.equal(mine, torch.stack([batch[5] for batch in plain]))


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
    process = run(SLOW.format(workers=workers) + on_threads + loop)
    for _ in range(2):
        assert process.stdout.readline() == "batch\n"
    time.sleep(0.2)  # until it waits for the third
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    # (Without workers the index list is lost whose batch was being loaded, as it always was.)
    assert out == "interrupted\nTrue\n" if workers else out.startswith("interrupted\n"), errors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_may_end_with_a_loader_half_used(workers):
    end = "\n    gate.set(); iterator = iter(loader); next(iterator)\n"
    process = run(SLOW.format(workers=workers) + end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Exception" not in errors and "Error" not in errors


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
    process = run(script)
    out, errors = process.communicate(timeout=60)
    assert out.strip() == "0", errors
