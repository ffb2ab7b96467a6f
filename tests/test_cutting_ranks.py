"""In several processes the batch's dimension, whole arguments and scalars are as in one."""

from __future__ import annotations

from pathlib import Path

import fork_server
import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(120)
def test_two_ranks_are_as_one_process(tmp_path):
    fork_server.run_ranks(2, HERE / "ranks_cutting.py", tmp_path, timeout=110)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
