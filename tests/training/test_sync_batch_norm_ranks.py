"""Batch norm over the whole batch on several ranks: the bits of one process."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import fork_server
import pytest
from sync_batch_norm_support import trained

SCRIPT = Path(__file__).parents[1] / "ranks_sync_batch_norm.py"
# way, levels, rows, concurrency. 13 rows are uneven, 11 leave a leaf without.
CASES = [
    ["loop", 2, 100, 1],
    ["lean", 2, 100, 2],
    ["loop", 2, 13, 3],
    ["lean", 2, 11, 1],
    ["loop", 3, 150, 2],
]


@functools.cache
def alone(way: str, levels: int, rows: int) -> str:
    return trained(way, levels, rows, 2)[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_the_bits_of_one_process(world: int, tmp_path: Path) -> None:
    more = {2: ["failures"], 3: ["failures", "small buckets"], 4: ["small buckets"], 6: []}[world]
    fork_server.run_ranks(
        world, SCRIPT, json.dumps(CASES), tmp_path, *more, timeout=280, quick_end=True
    )
    found = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(world)]
    for way, levels, rows, _ in CASES:
        for rank, mine in enumerate(found):
            digest = mine["digests"][json.dumps([way, levels, rows])]
            assert digest == alone(way, levels, rows), (way, levels, rows, rank)
    for rank, mine in enumerate(found) if "failures" in more else ():
        for where in ("forward", "backward"):
            told = mine["failures"][where]
            assert "ZeroDivisionError" in told and "of the user's" in told, (where, rank, told)
            assert told.startswith("ZeroDivisionError" if rank == 1 else "RankError"), (where, rank)
        assert mine["failures"]["nowhere"] == ""
        assert "each of them needs a row" in mine["failures"]["rows"]
