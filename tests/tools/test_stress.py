"""tools/stress.py runs, and notices what is lost, doubled or another bit."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import torch_spheres as ts

TOOLS = Path(__file__).parents[2] / "tools"


def test_a_few_seconds_of_everything_find_nothing():
    command = [sys.executable, "-P", str(TOOLS / "stress.py"), "--minutes", "0.1", "--seconds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {what: count for count, what in re.findall(r"([\d,]+) ([a-z ]+)", done.stdout)}
    expected = "items", "native items", "errors", "barriers", "stops", "messages", "loops", "steps"
    assert not [what for what in expected if what not in counts], done.stdout


class Wrong(ts.KissingSpheres):
    """Loses the first item."""

    def distribute_work(self, items, fn):
        return super().distribute_work([*items][1:], fn)


def test_a_lost_item_and_a_lost_shard_are_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import stress

    with Wrong() as spheres:
        with pytest.raises(AssertionError, match="items"):
            stress.items(spheres, Counter())
        monkeypatch.setattr(stress.chance, "choice", lambda options: options[0])
        monkeypatch.setattr(stress, "CASES", [("tied, unused, frozen", "by hand")])
        with pytest.raises(AssertionError, match="bits of tied"):
            stress.training(spheres, Counter())
