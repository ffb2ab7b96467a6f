"""In several processes the batch's dimension, whole arguments and scalars are as in one."""

from __future__ import annotations

from pathlib import Path

import fork_server
import pytest

HERE = Path(__file__).parents[1]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, 12])
def test_ranks_are_as_one_process(world, tmp_path):
    fork_server.run_ranks(world, HERE / "ranks_cutting.py", tmp_path, timeout=110, quick_end=True)
    assert {path.name for path in tmp_path.iterdir()} == {str(rank) for rank in range(world)}
