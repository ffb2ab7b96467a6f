"""A rank that is wrong, dies or hangs: the others are told which and why, and nobody waits on."""

from __future__ import annotations

import re
from pathlib import Path

import fork_server
import pytest
from rank_output import printed

HERE = Path(__file__).parents[1]


def started(how, world, timeout):
    return fork_server.ranks(world, HERE / "ranks_mistakes.py", how, timeout)


@pytest.mark.timeout(120)
def test_mistakes_are_everybodys_and_training_goes_on():
    with started("mistakes", 2, 60) as ranks:
        codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], "\n".join(rank.stderr for rank in ranks)


@pytest.mark.timeout(120)
def test_a_rank_that_is_late_is_not_lost():
    with started("late", 2, 60) as ranks:
        codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], "\n".join(rank.stderr for rank in ranks)
    assert [printed(rank.stdout) for rank in ranks] == ["in time\n"] * 2


@pytest.mark.timeout(120)
def test_ranks_that_end_at_once_do_so_in_peace():
    """Of 24, 5 aborted when torch's threads had something left to free."""
    for _ in range(12):
        with started("ends", 2, 60) as ranks:
            assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]


CAUSES = {
    "killed, big": r"having died, hung or gone elsewhere",
    "killed": r"having died, hung or gone elsewhere",
    "hangs": r"having died, hung or gone elsewhere",
    "raises": r"\(rank 1: KeyError: \"the user's own mistake\"\)",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", CAUSES)
def test_a_rank_that_is_lost_is_named(how):
    with started(how, 3, 5) as ranks:
        for number in (0, 2):
            rank = ranks[number]
            assert rank.wait() == 0, rank.stderr  # and long before the timeout that it began with
            told = re.match(r"ranks \(1,\) (.*)", printed(rank.stdout))
            assert told is not None, (rank.stdout, rank.stderr)
            assert "rank 1 of 3 did not come to it" in told[1]
            assert re.search(CAUSES[how], told[1]), told[1]


ELSEWHERE = {
    "apart: model": "the start of forward",
    "apart, big: model": "the start of forward",
    "apart, big: gather": "gather",
    "apart: loader": "the beginning of an epoch",
    "apart: by shard": "the start of forward",
    "apart, big: checkpoint": "saving a checkpoint",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ELSEWHERE)
def test_ranks_that_do_different_things_are_told_so(how):
    with started(how, 2, 20) as ranks:
        for number, rank in enumerate(ranks):
            assert rank.wait() == 3, rank.stderr  # and no abort
            out, errors = rank.stdout, rank.stderr
            assert re.match(rf"apart \({1 - number},\) ", printed(out)), (out, errors)
            assert f"rank 1: {ELSEWHERE[how]}" in out
            assert "rank 0: the exchange of gradients" in out
            assert re.search(rf"^still \({1 - number},\) .*said before", out, re.MULTILINE)


@pytest.mark.timeout(120)
def test_ctrl_c_is_answered_while_ranks_are_waited_for():
    with started("hangs", 2, 60) as ranks:
        while "alone" not in ranks[0].readline():  # gloo may say something first
            assert ranks[0].poll() is None, ranks[0].stderr
        ranks[0].interrupt()
        assert ranks[0].wait() == 0, ranks[0].stderr
    assert ranks[0].stdout.endswith("interrupted\n"), ranks[0].stdout
