"""`forward_backward` with 144 shards trains where plain PyTorch has no room for the activations."""

from __future__ import annotations

import re
from pathlib import Path

import fork_server

EXAMPLE = Path(__file__).parents[2] / "examples" / "big_batch.py"
LIMIT = 300  # MiB; the whole batch's activations are 675


def run(*arguments: object):
    size = ("--width", 64, "--rows", 57_600)
    slow = "ignore", "the shards of this model are so"  # depends on the machine
    return fork_server.run(EXAMPLE, *size, *arguments, warn=(("error",), slow))


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
