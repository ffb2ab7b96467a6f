"""Any loader, broken out of anywhere, is plain torch's; and goes on from a state saved anywhere."""

from __future__ import annotations

import sqlite3
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from effort import rounds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_support import Numbers, flat, same
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    # Connections belong to threads that have ended by the time when they are freed.
    "ignore:unclosed database:ResourceWarning",
    "ignore:Exception ignored.*(sqlite3|database connection)",
)


class Waits(Numbers):
    """Samples come after a while, the later ones of a batch sooner."""

    def __getitem__(self, index):
        time.sleep(0.001 * (index % 3))
        return super().__getitem__(index)


class Keeps(Dataset):
    """What belongs to a worker is on the dataset: its number, a count, a connection."""

    def __init__(self, rows=40):
        self.rows, self.count, self.mine, self.connection = rows, 0, None, None

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if self.connection is None:  # sqlite refuses other threads than the one that has opened it
            self.connection = sqlite3.connect(":memory:")
            self.connection.execute("CREATE TABLE seen (row)")
        self.count += 1
        self.connection.execute("INSERT INTO seen VALUES (?)", (index,))
        (seen,) = self.connection.execute("SELECT count(*) FROM seen").fetchone()
        return index, self.count, seen, -1 if self.mine is None else self.mine


def marks(worker):
    info = get_worker_info()
    info.dataset.mine = 10 * worker + info.num_workers


class Late(Numbers):
    """Draws from the worker's own generators, from some sample on."""

    def __getitem__(self, index):
        if index < 20:
            return index, -1.0
        rng = get_worker_info().rng
        return index, rng.random_generator.random() + rng.numpy_generator.random()


class Stream(IterableDataset):
    """A shuffle of the worker's rows, and a draw with each of them."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        rows = torch.arange(first, 30 + first, step)
        for row in rows[torch.randperm(len(rows))].tolist():
            yield row, torch.rand(()), first


@dataclass(frozen=True)
class Kind:
    make: Any
    init: Any = None
    resumes: bool = True
    """Whether what it gives does not depend on what was loaded before the state was saved."""
    needs_threads: bool = False
    """Worker processes have no generators on their info."""


KINDS = {
    "samples": Kind(lambda: Numbers(draws=("torch", "seed"))),
    "waiting samples": Kind(lambda: Waits(draws=("torch",))),
    "things of the worker": Kind(Keeps, marks, resumes=False),
    "tensors": Kind(lambda: torch.utils.data.TensorDataset(torch.arange(80.0).view(40, 2))),
    "generators of the worker": Kind(Late, needs_threads=True),
    "a stream": Kind(Stream),
}


def options_of(draw, kind):
    workers = draw(st.integers(int(KINDS[kind].needs_threads), 3), "num_workers")
    options = {
        "batch_size": draw(st.sampled_from([1, 4, 7, None]), "batch_size"),
        "num_workers": workers,
    }
    if kind != "a stream":
        options["shuffle"] = draw(st.booleans(), "shuffle")
    if options["batch_size"] is not None:
        options["drop_last"] = draw(st.booleans(), "drop_last")
    if workers:
        options["prefetch_factor"] = draw(st.sampled_from([1, 2, 5]), "prefetch_factor")
        options["persistent_workers"] = draw(st.booleans(), "persistent_workers")
        options["worker_init_fn"] = KINDS[kind].init
    own = draw(st.booleans(), "own generator")
    return options, own


def made(kind, options, own):
    generator = torch.Generator().manual_seed(5) if own else None
    return DataLoader(KINDS[kind].make(), generator=generator, **options)


def run(loader, stops):
    """All batches of some epochs, each left after so many; None: not before its end."""
    out = []
    for stop in stops:
        if stop == 0:
            iter(loader)
            continue
        for number, batch in enumerate(loader, 1):
            out.append((batch, torch.rand(1)))  # the loop draws as well
            if number == stop:
                break
    return out


def decided(kind, options, stops):
    """The epochs whose batches torch's own loader decides, whichever of its workers is faster.

    Where one worker's stream ends before another's earlier batch has come, torch sends the others
    one more task. If the loop is left then, a persistent worker has drawn more for the next epoch.
    """
    if kind != "a stream" or not options.get("persistent_workers") or options["num_workers"] < 2:
        return stops
    left = next((k for k, stop in enumerate(stops) if stop), len(stops))
    return stops[: left + 1]


STOPS = st.lists(st.sampled_from([None, 0, 1, 2, 5, 9]), min_size=1, max_size=3)
anywhere = settings(
    max_examples=rounds(35), suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anywhere
@given(data=st.data())
def test_loops_that_are_left_anywhere(spheres, data):
    kind = data.draw(
        st.sampled_from(sorted(k for k in KINDS if not KINDS[k].needs_threads)), "kind"
    )
    options, own = options_of(data.draw, kind)
    stops = decided(kind, options, data.draw(STOPS, "left after"))
    torch.manual_seed(1)
    plain = run(made(kind, options, own), stops)
    torch.manual_seed(1)
    same(run(ts.wrap(made(kind, options, own), spheres), stops), plain)


class Uneven(Stream):
    """One worker's second batch of four comes late."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __iter__(self):
        for k, row in enumerate(super().__iter__()):
            if k == 4 and get_worker_info().id == 1:
                time.sleep(self.seconds)
            yield row


def test_what_persistent_workers_draw_does_not_depend_on_who_is_faster(spheres):
    """In plain torch it does, see `decided`: with a late worker another one draws two more."""

    def batches(seconds, stops=(5, 9, 1)):
        torch.manual_seed(1)
        options = {"drop_last": True, "prefetch_factor": 1, "persistent_workers": True}
        plain = DataLoader(Uneven(seconds), 4, num_workers=3, **options)
        return flat(run(ts.wrap(plain, spheres), stops))

    assert batches(0) == batches(0.2) == batches(0.02)


def taken_from(iterator, count):
    """Some batches, and whether the epoch's end was seen: then the next state is of another one."""
    batches = []
    for _ in range(count):
        try:
            batches.append(next(iterator))
        except StopIteration:
            return batches, True
    return batches, False


@anywhere
@given(data=st.data())
def test_states_that_are_saved_anywhere(spheres, data):
    kind = data.draw(st.sampled_from(sorted(k for k in KINDS if KINDS[k].resumes)), "kind")
    options, own = options_of(data.draw, kind)
    before = data.draw(st.lists(st.sampled_from([None, 1, 3]), max_size=2), "epochs before")
    taken = data.draw(st.integers(0, 9), "batches taken")
    more = data.draw(st.integers(0, 2), "batches after that, until it is saved again")
    how = data.draw(st.sampled_from(["alive", "left", "gone"]), "how")

    def new():
        return ts.wrap(made(kind, options, own), spheres)

    torch.manual_seed(1)
    loader = new()
    run(loader, before)
    iterator = iter(loader)
    _, over = taken_from(iterator, taken)
    states = [(loader.state_dict(), torch.get_rng_state())]
    left = flat(list(loader if over else iterator))
    after = flat(list(loader))

    if how != "alive" and taken > 0:
        # The same loop once more, and the state when it is over.
        torch.manual_seed(1)
        again = new()
        run(again, before)
        if how == "gone":
            iterator = iter(again)
            taken_from(iterator, taken)
            del iterator
        else:
            for number, _ in enumerate(again, 1):
                if number == taken:
                    break
        states.append((again.state_dict(), torch.get_rng_state()))

    for saved, rng in states:
        torch.manual_seed(77)
        other = new()
        other.load_state_dict(saved)
        torch.set_rng_state(rng)
        first = iter(other)
        begun, over = taken_from(first, more)
        # A resumed loader is saved once more, in the middle.
        saved, rng = other.state_dict(), torch.get_rng_state()
        third = new()
        if over:
            assert flat(begun) == left
            assert flat(list(other)) == after
            third.load_state_dict(saved)
            torch.set_rng_state(rng)
            assert flat(list(third)) == after
            continue
        assert flat([*begun, *first]) == left
        assert flat(list(other)) == after
        third.load_state_dict(saved)
        torch.set_rng_state(rng)
        assert flat([*begun, *third]) == left
        assert flat(list(third)) == after


def test_no_thread_is_left(spheres):
    """After all of the above, or by itself."""
    run(ts.wrap(DataLoader(Waits(), 4, num_workers=3), spheres), [None, 2])
    names = [t.name for t in threading.enumerate() if t.name.startswith("loader worker")]
    end = time.monotonic() + 30
    while names and time.monotonic() < end:
        time.sleep(0.01)
        names = [t.name for t in threading.enumerate() if t.name.startswith("loader worker")]
    assert not names
