"""On paper: what the exact exchange costs on 12, 144 and 1728 ranks, beside a ring all-reduce.

Assumptions, which are all in the formulas below: every rank has a link of its own, both ways at
once, to a switch that keeps up with all of them; a message costs `OVERHEAD` on each side beside its
bytes, and the first of a round `LATENCY`; additions cost nothing beside the wire; one partial sum
for each rank (true of 3, 6 and 12 ranks, and of 144 and 1728 where each has one shard of three or
four levels). Nothing of it is measured; more than 24 ranks have not been run.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

OVERHEAD = 5e-6  # seconds of a core, for each message
LATENCY = 30e-6  # seconds on the way, through a switch
LINKS = (10, 100)  # Gb/s
RANKS = (12, 144, 1728)
MODELS = {"ResNet-18": 11.2e6, "GPT-2 small": 124e6, "7 billion": 7e9}  # parameters, float32


def ring(parameters: float, ranks: int, gigabits: float) -> float:
    """Seconds: 2 (W - 1) rounds, one after another, of 1/W of the bytes each."""
    bytes_ = 4 * parameters / ranks
    return 2 * (ranks - 1) * (LATENCY + OVERHEAD + 8 * bytes_ / (gigabits * 1e9))


def exact(parameters: float, ranks: int, gigabits: float) -> float:
    """Seconds: two rounds, of W - 1 messages at once, of 1/W of the bytes each."""
    bytes_ = 4 * parameters / ranks
    return 2 * (LATENCY + (ranks - 1) * (OVERHEAD + 8 * bytes_ / (gigabits * 1e9)))


def main() -> None:
    """Prints the table."""
    table = Table(title="Seconds for the gradients of one step, on paper")
    for heading in ("model", "ranks", "link", "ring", "exact", "exact by ring"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, parameters in MODELS.items():
        for ranks in RANKS:
            for gigabits in LINKS:
                ours, theirs = (f(parameters, ranks, gigabits) for f in (exact, ring))
                table.add_row(
                    name,
                    str(ranks),
                    f"{gigabits} Gb/s",
                    f"{theirs:.3g} s",
                    f"{ours:.3g} s",
                    f"{ours / theirs:.2f}",
                )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
