"""What tests of checkpoints share."""

from __future__ import annotations

import fork_server
from torch import nn

SMALL = nn.Linear(4, 2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run(script, *arguments):
    ran = fork_server.run(script, *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


class Stateful:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state
