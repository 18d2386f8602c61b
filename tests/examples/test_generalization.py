"""Held-out beside training losses: the arithmetic, and one small problem through all of it."""

from __future__ import annotations

import math

from examples.benchmarks.generalization import FIT, Point, figures, medians, row, trajectory
from examples.shared.problems import PROBLEMS
from examples.studies.ablation.results import Entry

CURVE = [
    Point(0.0, 2.0, 2.0, 0.1),
    Point(0.25, 0.2, 0.5, 0.8),
    Point(0.5, 2.0 * FIT, 0.3, 0.9),
    Point(0.75, 0.01, 0.2, 0.95),
    Point(1.0, 0.001, 0.4, 0.94),
]


def test_figures_are_those_of_the_end_of_a_training_objective_and_of_the_best_step() -> None:
    found = figures(CURVE)
    assert (found["objective"], found["held out"], found["accuracy"]) == (0.001, 0.4, 0.94)
    assert (found["fitted: held out"], found["fitted: accuracy"], found["fitted: share of the steps"]) == (
        0.3,
        0.9,
        0.5,
    )
    assert (found["least held out"], found["its share of the steps"]) == (0.2, 0.75)


def test_what_never_fits_says_so() -> None:
    short = figures(CURVE[:2])
    assert math.isinf(short["fitted: held out"])
    assert math.isnan(short["fitted: accuracy"])
    line = row("short", short)
    assert line.count("never") == 2
    assert math.isinf(medians([short, short, figures(CURVE)])["fitted: held out"])


def test_a_run_is_measured_on_its_way_and_at_its_end() -> None:
    entry = Entry("digits-tanh", "", "sgd", "tuned", "", False, {"lr": 0.1}, (), (), ())
    points = trajectory("digits-tanh", entry, 60, 1, None)
    assert PROBLEMS["digits-tanh"].needs_data is False
    assert points[0].share == 0
    assert points[-1].share == 1
    assert points[-1].objective < points[0].objective
    assert points[-1].accuracy > 0.5
    assert all(0 <= point.accuracy <= 1 for point in points)
