"""Step lengths by trial: what is accepted, and how t moves."""

import math
from collections.abc import Callable

import pytest

from hessopt.search.line_search import ARMIJO, line_search


@pytest.mark.parametrize("best", [0.9, 0.4, 0.1, 1e-3])
def test_parabola(best: float) -> None:
    """f = -t + t²/(2 best): while t is too long, the next is its minimizer, within a factor of ten."""
    found = line_search(lambda t: -t + t * t / (2 * best), -1.0)
    assert found.change <= ARMIJO * -found.length
    assert found.change == pytest.approx(-found.length + found.length**2 / (2 * best))
    if best >= 0.1 and best < 0.5:
        assert found.length == pytest.approx(best)
        assert found.trials == 2
    if best == 0.9:
        assert (found.length, found.trials) == (1.0, 1)


def test_not_finite_is_too_far() -> None:
    for bad in (math.inf, math.nan):
        found = line_search(lambda t, bad=bad: bad if t > 0.05 else -t, -1.0)
        assert found.length == pytest.approx(0.01)


def test_gives_up() -> None:
    found = line_search(lambda t: t, -1.0, max_trials=4)
    assert (found.length, found.change, found.trials) == (0.0, 0.0, 4)


def test_rounding() -> None:
    assert line_search(lambda t: 1e-16, -1e-18, rounding=1e-15).length == 1.0
    assert line_search(lambda t: 1e-16, -1e-18, max_trials=3).length == 0.0


def test_expansion() -> None:
    quartic: Callable[[float], float] = lambda t: -t * t / 2 + t**4 / 4e4  # noqa: E731
    found = line_search(quartic, 0.0, -1.0, expand=True, max_trials=20)
    assert 64 <= found.length <= 256  # minimum at 100
    assert found.change == quartic(found.length)
    assert quartic(2 * found.length) >= found.change
    assert line_search(quartic, 0.0, -1.0).length == 1.0


def test_negative_curvature_replaces_the_slope() -> None:
    assert line_search(lambda t: -(t**2) / 2, 0.0, -1.0).length == 1.0
    assert line_search(lambda t: 0.0, 0.0, -1.0, max_trials=2).length == 0.0


@pytest.mark.parametrize(("slope", "curvature"), [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (1.0, -1.0), (math.nan, 0.0)])
def test_uphill_is_refused(slope: float, curvature: float) -> None:
    with pytest.raises(ValueError, match="does not go down"):
        line_search(lambda t: t, slope, curvature)
