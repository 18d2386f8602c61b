"""Equal seconds from equal steps: the arithmetic, and one small problem through all of it."""

from __future__ import annotations

from examples.benchmarks.equal_seconds import ROUND, Cost, costs, last_step, report
from examples.studies.ablation.results import Entry


def entry(contender: str, finals: tuple[float, ...], curves: tuple[list[list[float]], ...], ours: bool) -> Entry:
    return Entry("digits-tanh", "", contender, "tuned", "", ours, {}, finals, curves, ())


def line(final: float) -> list[list[float]]:
    """From 1, in a hundred steps; its seconds are not to be used."""
    return [[0.0, 0.0, 0, 1.0], [1e9, 0.0, 100, final]]


OURS = entry("spectral_kronecker", (0.0, 0.25), (line(0.0), line(0.25)), True)
PEER = entry("sgd", (0.5,), (line(0.5),), False)


def cost(rate: float, start: float = 0.0, rounds: int = 100 // ROUND) -> Cost:
    """Of a run whose first round takes longer."""
    return Cost([0.0, *(rate * ROUND * i + start for i in range(1, rounds + 1))])


def test_ours_is_at_a_peers_objective_after_its_own_seconds_over_theirs() -> None:
    """50 and 66.7 steps of three units and 20 more at the start, over 100 of one unit."""
    lines = report("digits-tanh", [OURS, PEER], [cost(3.0, 20.0), cost(1.0)], plain=0.5)
    row = next(line for line in lines if "1.95" in line)
    assert "1.95 (1.70 to 2.20)" in row
    assert "| 2 |" in row  # forward-backwards a step
    never = report("digits-tanh", [PEER, OURS], [cost(1.0), cost(3.0, 20.0)], plain=0.5)
    assert any("never" in line for line in never)


def test_a_run_of_few_steps_pays_its_part_of_the_start() -> None:
    long = cost(2.0, 10.0)
    assert long(ROUND / 4) == 2.0 * ROUND / 4 + 2.5
    assert long(2 * ROUND) == 4.0 * ROUND + 10.0
    assert long.rate == 2.1
    assert last_step(OURS) == 100


def test_contenders_are_timed() -> None:
    found, plain = costs("digits-tanh", [OURS, PEER], None, steps=ROUND + 1)
    assert len(found) == 2
    assert plain > 0
    assert all(len(cost.seconds) == 3 and cost.rate > 0 for cost in found)
