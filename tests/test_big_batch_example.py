"""`forward_backward` with 144 shards trains where plain PyTorch has no room for the activations."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "big_batch.py"
LIMIT = 500  # MiB; the whole batch's activations are 1350


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_a_batch_that_plain_pytorch_cannot_hold():
    done = run("--limit-mib", LIMIT, "--steps", 2)
    assert done.returncode == 0, done.stderr
    needed = int(re.search(r"whole batch: (\d+) MiB", done.stdout).group(1))
    assert needed > 2 * LIMIT
    assert len(re.findall(r"^step \d: loss 0\.\d+$", done.stdout, re.MULTILINE)) == 2

    plain = run("--limit-mib", LIMIT, "--steps", 1, "--plain")
    assert plain.returncode == 1 and plain.stderr == "big_batch.py: out of memory\n"
    # The limit is what stops it, and the losses are the same but for rounding.
    free = run("--steps", 1, "--plain")
    assert free.returncode == 0, free.stderr
    losses = [re.search(r"step 1: loss (\S+)", d.stdout).group(1) for d in (done, free)]
    assert abs(float(losses[0]) - float(losses[1])) < 1e-5
