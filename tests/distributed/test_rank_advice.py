"""Ranks whose shards are too small to be worth it are told so, from their own rows."""

from __future__ import annotations

from pathlib import Path

import fork_server
import pytest

HERE = Path(__file__).parents[1]


@pytest.mark.timeout(120)
def test_ranks_are_told_of_small_shards(tmp_path):
    fork_server.run_ranks(2, HERE / "ranks_advice.py", tmp_path, timeout=110)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
