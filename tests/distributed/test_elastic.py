"""Processes that are killed and that join: the weights are those of one that nobody disturbed."""

from __future__ import annotations

import random
import re
import time

import pytest
from elastic_support import Agents, digest_alone, free_port

EPOCHS = 3


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rendezvous", ["file", pytest.param("address", marks=pytest.mark.long)])
def test_a_process_is_killed_and_another_joins(tmp_path, rendezvous):
    by_file = rendezvous == "file"
    endpoint = str(tmp_path / "rendezvous") if by_file else f"127.0.0.1:{free_port()}"
    agents = Agents(tmp_path, endpoint, EPOCHS)
    try:
        for _ in range(4):
            agents.start("127.0.0.1")
        gate = tmp_path / "join"
        agents.start("127.0.0.1", gate=gate)
        agents.wait_for(r"rank 0 of 4 goes on")
        # With an address the first agent has the rendezvous, and has to live.
        when, who = 20 * random.randint(1, 3), 0 if by_file else random.randint(1, 3)
        agents.wait_for(rf"^step {when}:")
        time.sleep(random.random() * 0.5)  # in the middle of a step, or while it is saved
        agents.kill(who)
        agents.wait_for(r"rank 0 of 3 goes on from step [1-9]")
        # They go on, but not to the end before it has joined, however long it takes to start.
        hold = tmp_path / f"hold.{when + 60}"
        hold.touch()
        agents.wait_for(rf"^step {when + 40}:")
        gate.touch()
        agents.wait_for(r"rank \d of 4 goes on from step [1-9]", log=4)
        hold.unlink()
        agents.wait_for(r"weights digest: \w+")
        assert re.findall(r"weights digest: \w+", agents.text()) == [digest_alone(EPOCHS)]
    finally:
        agents.end()
