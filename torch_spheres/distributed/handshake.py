"""What all ranks tell all others at once: a message that says what it is about.

Ranks talk in the same order, or messages would meet the wrong ones: gloo ends the process when two
that meet are of different lengths. So every exchange begins with a message of one length, the same
for all, in which stands what the rank is about to do and how much it has to say. If they are about
to do different things (one has skipped a backward pass), all of them find that out here, and say
so. What is short is in that message already.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_spheres.distributed.group import Ranks

__all__ = ["Meeting"]

_HEAD = struct.Struct("<q120s")  # bytes that follow, and what they are about
_LENGTH = 1024  # of the message
_ROOM = _LENGTH - _HEAD.size


class Meeting:
    """Everybody's bytes; sent when this is made, and waited for by `finish`.

    Args:
        ranks: who meets.
        what: about what, for errors; the same on all.
        mine: uint8, on the CPU, of one dimension; as many as each likes.
    """

    def __init__(self, ranks: Ranks, what: str, mine: Tensor) -> None:
        self._ranks, self._what, self._mine = ranks, what, mine
        message = bytearray(_LENGTH)
        _HEAD.pack_into(message, 0, len(mine), what.encode()[:120])
        sent = torch.frombuffer(message, dtype=torch.uint8)
        short = min(len(mine), _ROOM)
        sent[_HEAD.size : _HEAD.size + short] = mine[:short]
        sent = sent.to(ranks.device)
        self._table = torch.empty(ranks.world * _LENGTH, dtype=torch.uint8, device=ranks.device)
        ranks.need_together()
        with ranks.explaining(what):
            self._works = ranks.gather_async(self._table, sent)

    def finish(self) -> list[Tensor]:
        """By rank.

        Raises:
            RankError: the ranks are about to do different things, or one does not come.
        """
        ranks, what = self._ranks, self._what
        ranks.wait(self._works, what)
        heads = self._table.cpu().view(ranks.world, _LENGTH)
        told = [_HEAD.unpack_from(memoryview(head.numpy())) for head in heads]
        texts = [text.rstrip(b"\0").decode(errors="replace") for _, text in told]
        if len({*texts}) > 1:
            ranks.part(what, texts)
        sizes = [size for size, _ in told]
        most = max(sizes)
        rows = heads[:, _HEAD.size :]
        if most > _ROOM:
            rows = self._rest(most, rows)
        return [row[:size] for row, size in zip(rows, sizes, strict=True)]

    def _rest(self, most: int, rows: Tensor) -> Tensor:
        ranks = self._ranks
        sent = torch.zeros(most - _ROOM, dtype=torch.uint8)
        more = self._mine[_ROOM:]
        sent[: len(more)] = more
        table = torch.empty(ranks.world * len(sent), dtype=torch.uint8, device=ranks.device)
        with ranks.explaining(self._what):
            works = ranks.gather_async(table, sent.to(ranks.device))
        ranks.wait(works, self._what)
        return torch.cat([rows, table.cpu().view(ranks.world, -1)], dim=1)
