"""What tests of checkpoints share."""

from __future__ import annotations

import subprocess
import sys

from torch import nn

SMALL = nn.Linear(4, 2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run(script, *arguments, timeout=100):
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


class Stateful:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state
