"""The radius rule as a table."""

import math

import pytest

from hessopt.search.trust_region import TrustRegion


@pytest.mark.parametrize(
    ("ratio", "length", "expected"),
    [
        (0.76, 2.0, 5.0),
        (0.76, 0.1, 2.0),  # the radius was not in the way
        (5.0, 2.0, 5.0),
        (0.75, 2.0, 2.0),
        (0.25, 2.0, 2.0),
        (0.24, 2.0, 1.0),
        (0.001, 0.5, 0.25),
    ],
)
def test_accepted(ratio: float, length: float, expected: float) -> None:
    region = TrustRegion(2.0)
    region.accept(ratio, length)
    assert region.radius == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        (0.0, 0.5),  # the parabola through slope -1 and change 0 has its minimum at a half
        (1.0, 0.25),
        (4.0, 0.1),
        (1e6, 0.0625),
        (-0.4, 0.5),
        (math.inf, 0.0625),
        (math.nan, 0.0625),
    ],
)
def test_rejected(change: float, factor: float) -> None:
    region = TrustRegion(2.0)
    region.reject(1.0, -1.0, change)
    assert region.radius == pytest.approx(factor)
    region = TrustRegion(0.5)
    region.reject(1.0, -1.0, change)
    assert region.radius == pytest.approx(factor * 0.5)


def test_bounds_and_state() -> None:
    region = TrustRegion(1.0, minimum=0.5, maximum=2.0)
    region.accept(1.0, 1.0)
    assert region.radius == 2.0
    for _ in range(9):
        region.reject(region.radius, -1.0, math.nan)
    assert region.radius == 0.5
    other = TrustRegion(1.0)
    other.load_state_dict(region.state_dict())
    assert other == TrustRegion(0.5)
    narrow = TrustRegion(1.0, minimum=0.9)
    narrow.load_state_dict(region.state_dict())
    assert narrow.radius == 0.9


@pytest.mark.parametrize("bad", [{"radius": 0.0}, {"radius": 1.0, "maximum": 0.5}, {"radius": 1.0, "minimum": 0.0}])
def test_errors(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="radius"):
        TrustRegion(**bad)
