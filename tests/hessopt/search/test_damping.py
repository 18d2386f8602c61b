"""Nielsen's rule, number by number."""

import math

import pytest

from hessopt.search.damping import NielsenDamping


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(1.0, 1 / 3), (5.0, 1 / 3), (1e200, 1 / 3), (0.5, 1.0), (0.0, 2.0), (0.25, 1.125), (0.75, 0.875)],
)
def test_accepted_step(ratio: float, factor: float) -> None:
    damping = NielsenDamping(2.0, growth=8.0)
    damping.accept(ratio)
    assert damping.value == pytest.approx(2.0 * factor, rel=1e-15)
    assert damping.growth == 2.0


def test_rejections_grow_faster_than_geometrically() -> None:
    damping = NielsenDamping(1.0)
    values = []
    for _ in range(4):
        damping.reject()
        values.append(damping.value)
    assert values == [2.0, 8.0, 64.0, 1024.0]


@pytest.mark.parametrize(
    ("length", "factor"),
    [(1.0, 0.1), (0.5, 0.1), (0.499, 1 / 3), (0.1, 1 / 3), (0.099, 1.0), (0.03, 1.0), (0.029, 4.0), (0.0, 4.0)],
)
def test_damping_follows_the_length_of_a_line_search(length: float, factor: float) -> None:
    damping = NielsenDamping(5.0, minimum=0.4, maximum=100.0)
    damping.follow_length(length)
    assert damping.value == pytest.approx(5.0 * factor, rel=1e-14)
    for _ in range(6):
        damping.follow_length(length)
    assert damping.value == (0.4 if factor < 1 else 5.0 if factor == 1 else 100.0)


def test_bounds_hold() -> None:
    damping = NielsenDamping(1.0, minimum=0.5, maximum=3.0)
    for _ in range(2000):
        damping.reject()
    assert damping.value == 3.0
    assert math.isfinite(damping.growth)
    for _ in range(10):
        damping.accept(1.0)
    assert damping.value == 0.5


def test_state_round_trip() -> None:
    damping = NielsenDamping(1.0)
    damping.reject()
    damping.accept(0.9)
    damping.reject()
    other = NielsenDamping(1.0)
    other.load_state_dict(damping.state_dict())
    assert other == damping


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": 0.0}, "damping must lie in"),
        ({"value": -1.0}, "damping must lie in"),
        ({"value": math.nan}, "damping must lie in"),
        ({"value": math.inf}, "damping must lie in"),
        ({"value": 1.0, "minimum": 0.0}, "bounds"),
        ({"value": 1.0, "minimum": 2.0, "maximum": 1.0}, "bounds"),
        ({"value": 1.0, "growth": 1.0}, "growth"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NielsenDamping(**arguments)
