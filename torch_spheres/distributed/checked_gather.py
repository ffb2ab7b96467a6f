"""`CheckedGather`: an all-gather of bytes that first finds out whether all ranks do the same.

Everything that `group.Ranks` and the layers' sums exchange begins with one. gloo ends the process
when two messages of different lengths meet, as they do when one rank has skipped a backward pass.
So the first message has one length for all: a header, which says what the rank is about to do,
whether it has failed, and how many bytes it has, and then as many of these as there is room for.
This is the one way in which ranks hear of each other's errors.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from torch_spheres.distributed.transport import Transport
from torch_spheres.errors import DeferredError, RankError

__all__ = ["CheckedGather", "gather_objects", "raise_errors"]

_HEADER = struct.Struct("<q?119s")  # the payload's bytes, whether the rank has failed, for what
_LENGTH = 1024  # of the first message
_ROOM = _LENGTH - _HEADER.size  # of it, for the payload


class CheckedGather:
    """Every rank's bytes; sent by the constructor, waited for by `finish`.

    Args:
        transport: between the ranks.
        what: what the bytes are for, the same on all ranks that do the same.
        payload: uint8 of one dimension, on the CPU; its length may differ between ranks.
        caught: of the work before, whose error is then raised on all ranks.
    """

    def __init__(
        self, transport: Transport, what: str, payload: Tensor, caught: DeferredError | None = None
    ) -> None:
        self._transport, self._what, self._payload = transport, what, payload
        self._caught = caught or DeferredError()
        first = bytearray(_LENGTH)
        failed = self._caught.error is not None
        _HEADER.pack_into(first, 0, len(payload), failed, what.encode()[:119])
        sent = torch.frombuffer(first, dtype=torch.uint8)
        short = min(len(payload), _ROOM)
        sent[_HEADER.size : _HEADER.size + short] = payload[:short]
        transport.raise_if_diverged()
        self._table, self._work = self._send(sent)

    def finish(self, pending: Sequence[Any] = ()) -> list[Tensor]:
        """Every rank's payload, by rank.

        Args:
            pending: works that are waited for before another rank's error is raised.

        Raises:
            RankError: the ranks are about to do different things, one does not come or has failed.
            BaseException: this rank has failed, and all others know.
        """
        transport, what = self._transport, self._what
        transport.wait([self._work], what)
        firsts = self._table.cpu().view(transport.world, _LENGTH)
        headers = [_HEADER.unpack_from(memoryview(first.numpy())) for first in firsts]
        sizes, failed, texts = zip(*headers, strict=True)
        if len({*texts}) > 1:
            actions = [text.rstrip(b"\0").decode(errors="replace") for text in texts]
            transport.raise_divergence(what, actions)
        rows = firsts[:, _HEADER.size :]
        if max(sizes) > _ROOM:
            rows = torch.cat([rows, self._gather_rest(max(sizes) - _ROOM)], dim=1)
        if any(failed):
            transport.wait(pending, what)
            raise_errors(transport, what, self._caught)
        return [row[:size] for row, size in zip(rows, sizes, strict=True)]

    def _gather_rest(self, length: int) -> Tensor:
        """What was too long for the first message."""
        sent = torch.zeros(length, dtype=torch.uint8)
        rest = self._payload[_ROOM:]
        sent[: len(rest)] = rest
        table, work = self._send(sent)
        self._transport.wait([work], self._what)
        return table.cpu().view(self._transport.world, length)

    def _send(self, sent: Tensor) -> tuple[Tensor, Any]:
        transport = self._transport
        sent = sent.to(transport.device)
        table = torch.empty(transport.world * len(sent), dtype=torch.uint8, device=sent.device)
        with transport.sending(self._what):
            return table, transport.gather_async(table, sent)


def gather_objects(transport: Transport, value: Any, what: str) -> list[Any]:
    """Every rank's value, pickled, by rank; slower than tensors.

    Raises:
        RankError: the ranks are about to do different things, or one does not come.
    """
    payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    rows = CheckedGather(transport, what, payload).finish()
    with warnings.catch_warnings():  # unpickling torch's tree specs warns
        warnings.simplefilter("ignore", FutureWarning)
        return [pickle.loads(row.numpy().data) for row in rows]  # from our own ranks


def raise_errors(transport: Transport, what: str, caught: DeferredError) -> NoReturn:
    """Raises, on all ranks, the errors that some have; all ranks know already that one has.

    Raises:
        RankError: another rank has an error.
        BaseException: this rank has one.
    """
    own = None if caught.error is None else f"{type(caught.error).__name__}: {caught.error}"
    everybody = enumerate(gather_objects(transport, own, what))
    failed = {rank: text for rank, text in everybody if text is not None}
    caught.raise_if_any()
    texts = "; ".join(f"rank {r} of {transport.world}: {text}" for r, text in failed.items())
    raise RankError(f"{what} failed on {texts}", tuple(failed))
