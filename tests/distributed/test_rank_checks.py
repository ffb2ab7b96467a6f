"""What used to go wrong in silence in several processes is refused, or told of."""

from __future__ import annotations

from pathlib import Path

import fork_server
import pytest
from rank_output import printed

HERE = Path(__file__).parents[1]


def run(program, how, world, folder):
    """Each rank's output."""
    program = HERE / f"ranks_checks_{program}.py"
    with fork_server.ranks(world, program, how, folder, quick_end=True) as ranks:
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * world, "\n".join(rank.stderr for rank in ranks)
        return [printed(rank.stdout) for rank in ranks]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("how", ["index_lists", "not_wrapped", "contents"])
def test_what_any_number_of_ranks_would_not_have_noticed(how, world, tmp_path):
    run("data", how, world, tmp_path)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("program", "how"),
    [
        *(("data", how) for how in ("right_loops", "evaluations", "other_models", "skipped")),
        *(("models", how) for how in ("calls", "by_hand", "drift", "losses", "checkpoints")),
        *(("groups", how) for how in ("alone", "again", "untold")),
    ],
)
def test_what_ranks_would_not_have_noticed(program, how, tmp_path):
    run(program, how, 2, tmp_path)


@pytest.mark.timeout(200)
def test_sums_of_an_evaluation_are_those_of_one_process(tmp_path):
    found = {line for world in (1, 2, 3, 4, 6) for line in run("data", "metrics", world, tmp_path)}
    assert len(found) == 1 and "sums" in found.pop()


@pytest.mark.timeout(200)
def test_a_rank_that_exits_is_said_to_have_exited(tmp_path):
    with fork_server.ranks(3, HERE / "ranks_checks_groups.py", "leaves_early", tmp_path) as ranks:
        for number in (0, 2):
            assert ranks[number].wait() == 0, ranks[number].stderr
            told = printed(ranks[number].stdout)
            assert "rank 1 of 3 did not come to it (rank 1: it has exited" in told, told
