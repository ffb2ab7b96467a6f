"""Sums of shards' gradients in pieces, so that some are on their way while others are computed.

The gradients of a model's last parameters are there long before those of its first. With several
processes they are sent in buckets: a bucket of which the last shard has computed its gradients goes
out while that shard's backward pass is still running. A hook on the replica's parameters tells when
a gradient is there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from torch_spheres import _compat
from torch_spheres.folding import GradientFold, Grads
from torch_spheres.replica import Replica

__all__ = ["FoldInPieces", "Sink", "listen", "sink_of_this_thread"]


class FoldInPieces:
    """A `GradientFold` for each piece of the list of gradients.

    Args:
        make: makes the fold of a piece, by its index.
        pieces: which gradients of a shard belong to it.
    """

    def __init__(
        self, make: Callable[[int], GradientFold], pieces: Sequence[Sequence[int]]
    ) -> None:
        self._pieces = pieces
        self._folds = [make(piece) for piece in range(len(pieces))]
        self._early: dict[int, set[int]] = {}  # by shard: pieces that have been added

    # The first one says which shard is next, and counts what is alive, for all.

    def begin(self) -> int | None:
        """As `GradientFold.begin`."""
        return self._folds[0].begin()

    def fail(self) -> None:
        """As `GradientFold.fail`."""
        self._folds[0].fail()

    def add_piece(self, shard: int, piece: int, grads: Grads) -> None:
        """Takes one piece of a shard's gradients, before `add` takes the rest."""
        self._early.setdefault(shard, set()).add(piece)
        self._folds[piece].add(shard, grads)

    def add(self, shard: int, grads: Grads) -> None:
        """Takes the gradients of a shard that has run, out of the list, which is empty then."""
        early = self._early.get(shard, ())
        parts = [[] if p in early else [grads[i] for i in c] for p, c in enumerate(self._pieces)]
        grads.clear()
        for piece, part in enumerate(parts):
            if piece not in early:
                self._folds[piece].add(shard, part)

    def missing(self) -> list[tuple[int, int]]:
        """Parts of pieces, as (piece, part), in which no shard has run."""
        return [(i, part) for i, fold in enumerate(self._folds) for part in fold.missing_parts()]


class Sink:
    """Takes gradients of one shard while its backward pass runs, until a piece is whole.

    Args:
        fold: takes the pieces.
        shard: whose.
        pieces: as of the fold.
    """

    def __init__(self, fold: FoldInPieces, shard: int, pieces: Sequence[Sequence[int]]) -> None:
        self._fold, self._shard, self._pieces = fold, shard, pieces
        self._piece_of = {i: piece for piece, members in enumerate(pieces) for i in members}
        self._left = [len(members) for members in pieces]
        self._found: dict[int, Tensor] = {}
        self._index: dict[int, int] = {}
        self._told: dict[int, Tensor] = {}
        self._pass: int | None = None  # autograd's number of the shard's backward pass

    @contextlib.contextmanager
    def expecting(self, params: Sequence[Tensor], roots: Sequence[Tensor]) -> Iterator[None]:
        """The shard's backward pass, from its roots.

        Args:
            params: the shard's parameters, in the order of its gradients.
            roots: where it begins: that is how it is told from a pass inside it.
        """
        self._index = {
            id(p): i
            for i, p in enumerate(params)
            # What another hook, one of the forward's, makes of it is not seen here.
            if len(p._backward_hooks or ()) == 1
        }
        handles = [root.register_hook(self._begin) for root in roots]
        try:
            yield
        finally:
            self._index = {}
            for handle in handles:
                handle.remove()

    def _begin(self, _grad: Tensor) -> None:
        if self._pass is None and _compat.backward_pass is not None:
            self._pass = _compat.backward_pass()

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """All gradients of the shard, to be compared with what was taken early.

        Raises:
            RuntimeError: they have changed since.
        """
        told, self._told = self._told, {}
        for i, grad in told.items():
            if grads[i] is not grad:
                raise RuntimeError(
                    f"the gradient of parameter {i} was changed by something after it was there, "
                    "when it had been sent to other ranks: a hook that the forward registers?"
                )

    def take(self, param: int, grad: Tensor) -> None:
        """The whole gradient of a parameter, by its id."""
        i = self._index.get(param)
        # (A function's own backward may run another pass over the same parameters.)
        if i is None or _compat.backward_pass is None or _compat.backward_pass() != self._pass:
            return
        self._found[i] = self._told[i] = grad
        piece = self._piece_of[i]
        self._left[piece] -= 1
        if self._left[piece] == 0:
            grads: Grads = [self._found.pop(m) for m in self._pieces[piece]]
            self._fold.add_piece(self._shard, piece, grads)

    def __enter__(self) -> None:
        _here.sink = self

    def __exit__(self, *error: object) -> None:
        _here.sink = None


class _Here(threading.local):
    sink: Sink | None = None


_here = _Here()


def sink_of_this_thread() -> Sink | None:
    """Of the shard that it runs."""
    return _here.sink


def listen(replica: Replica) -> None:
    """Has the gradients of a replica's parameters told to the thread's sink, if it has one.

    Before anybody computes with the replica: a hook is not to come while another thread runs them.
    """
    for _, mine in replica.params:
        if mine.requires_grad and id(mine) not in replica.heard:
            replica.heard.add(id(mine))
            mine.register_hook(functools.partial(_tell, id(mine)))


def _tell(param: int, grad: Tensor) -> None:
    sink = _here.sink
    if sink is not None:
        sink.take(param, grad)
