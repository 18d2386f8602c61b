"""Abrupt changes are flagged, drift and noise are not."""

from __future__ import annotations

import math
import random

import pytest

from diagnostics.training.change_points import ChangeDetector


def _feed(detector: ChangeDetector, values: list[float], error: float = 0.0) -> list[int]:
    return [i for i, value in enumerate(values) if detector.update("x", i, value, error) is not None]


def test_a_jump_is_flagged_once_in_either_direction() -> None:
    generator = random.Random(0)
    noisy = [math.exp(generator.gauss(0, 0.1)) for _ in range(60)]
    for factor in (10.0, 0.1):
        values = [x * (factor if i >= 30 else 1) for i, x in enumerate(noisy)]
        assert _feed(ChangeDetector(), values) == [30]


def test_scale_does_not_matter() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 3.0, 3.1, 2.9]
    assert _feed(ChangeDetector(), values) == _feed(ChangeDetector(), [1e-9 * x for x in values]) == [6]


def test_slow_drift_and_constant_values_are_no_changes() -> None:
    assert _feed(ChangeDetector(), [1.02**i for i in range(200)]) == []
    assert _feed(ChangeDetector(), [7.0] * 50) == []
    # below the floor, exp(threshold · floor), nothing is flagged even where nothing varied before
    assert _feed(ChangeDetector(), [7.0] * 10 + [7.0 * math.exp(0.24)]) == []
    assert _feed(ChangeDetector(), [7.0] * 10 + [7.0 * math.exp(0.26)]) == [10]


def test_measurement_error_widens_the_limit() -> None:
    values = [1.0, 1.01, 0.99, 1.0, 1.01, 0.99, 1.5]
    assert _feed(ChangeDetector(), values) == [6]
    assert _feed(ChangeDetector(), values, error=0.2) == []
    assert _feed(ChangeDetector(), values, error=math.nan) == [6]


def test_the_score_is_the_robust_one() -> None:
    detector = ChangeDetector(floor=1e-6)
    logs = [0.0, 0.3, -0.3, 0.1, -0.1]
    for i, x in enumerate(logs):
        assert detector.update("x", i, math.exp(x)) is None
    change = detector.update("x", 5, -math.exp(2.0))
    assert change is not None
    assert change.expected == pytest.approx(1.0)
    assert change.score == pytest.approx(2.0 / (1.4826 * 0.1))  # the median of 0, .1, .1, .3, .3
    assert str(change).startswith("step 5: x is -7.39, and was 1 (score +13.5)")


def test_zero_and_not_finite_are_flagged_when_new() -> None:
    values = [1.0] * 6 + [math.nan, math.nan, 0.0, 1.0, math.inf]
    assert _feed(ChangeDetector(), values) == [6, 10]
    assert _feed(ChangeDetector(), [0.0] * 10) == []


def test_quantities_have_histories_of_their_own() -> None:
    detector = ChangeDetector()
    for i in range(10):
        assert detector.update("a", i, 1.0) is None
        assert detector.update("b", i, 100.0) is None


@pytest.mark.parametrize("bad", [{"least": 1}, {"least": 30}, {"threshold": 0}, {"floor": 0}])
def test_arguments_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"need 2 <= least <= window|must be positive"):
        ChangeDetector(**bad)
