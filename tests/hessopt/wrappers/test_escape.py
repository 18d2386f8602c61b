"""Direction and length of an escape, on functions with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from hessopt.wrappers.escape import first_length, ray_direction, search_rays

F64 = torch.float64


def test_one_direction_goes_down_the_slope_along_the_eigenvector() -> None:
    v = torch.tensor([[0.6], [0.8]], dtype=F64)
    for g in (torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([-1.0, 0.0], dtype=F64)):
        d = ray_direction(g, torch.tensor([-2.0], dtype=F64), v, 0.1)
        assert torch.allclose(d, -torch.sign(g @ v) * v[:, 0], atol=1e-15)


def test_several_directions_are_the_saddle_free_newton_step_where_slopes_are_large() -> None:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(4, 4, dtype=F64)).Q
    values = torch.tensor([-3.0, -2.0, -0.5], dtype=F64)
    g = torch.randn(4, dtype=F64)
    vectors = q[:, :3]
    newton = -(vectors @ ((vectors.mT @ g) / values.abs()))
    d = ray_direction(g, values, vectors, 0.0)
    assert torch.allclose(d, newton / newton.norm(), atol=1e-14)
    flat = ray_direction(torch.zeros(4, dtype=F64), values, vectors, 0.1)
    assert torch.allclose((vectors.mT @ flat).abs(), torch.full((3,), 3**-0.5, dtype=F64), atol=1e-14)


def test_the_length_is_that_of_the_minimum_within_a_factor_of_two() -> None:
    # f(t) = -t² + t⁴/R² has its minimum at R/√2
    for radius in (1e-1, 1.0, 1e4):
        ray = search_rays(lambda t, r=radius: t**2 - t**4 / r**2, 0.0, -2.0, 0.01, 80)
        assert abs(ray.length) == pytest.approx(radius / math.sqrt(2), rel=0.5)
        assert ray.gain > 0.5 * radius**2 / 4


def test_both_sides_are_tried_where_the_slope_does_not_tell() -> None:
    def gain(t: float) -> float:  # the deeper valley is at negative t
        return t**2 - 0.3 * t**3 - 0.1 * t**4

    assert search_rays(gain, 0.0, -2.0, 0.1, 40).length < 0
    assert search_rays(gain, -1.0, -2.0, 0.1, 40).length > 0  # a slope that matters decides


def test_a_first_length_that_is_too_long_is_cut() -> None:
    ray = search_rays(lambda t: t**2 - 1e6 * t**4 if abs(t) < 1 else math.nan, 0.0, -2.0, 5.0, 60)
    assert 0 < abs(ray.length) < 1e-3
    assert ray.gain > 0


def test_no_gain_is_reported_as_such() -> None:
    ray = search_rays(lambda t: -(t**2), 0.0, -2.0, 0.1, 40)
    assert (ray.length, ray.gain) == (0.0, 0.0)
    assert ray.evaluations <= 40
    assert search_rays(lambda _: math.nan, 0.0, -2.0, 0.1, 6).evaluations == 6


def test_where_rounding_hides_the_gain_the_step_grows() -> None:
    def gain(t: float) -> float:
        return 1e-5 * t**2 - 1e-9 * t**4 - 5e-8  # with an error of the size of rounding

    ray = search_rays(gain, 0.0, -2e-5, 0.01, 60, rounding=1e-7)
    assert abs(ray.length) == pytest.approx((1e-5 / 2e-9) ** 0.5, rel=0.5)
    assert search_rays(gain, 0.0, -2e-5, 0.01, 60).gain == 0  # otherwise the step is cut, and nothing is gained


def test_the_first_length_follows_the_parameters() -> None:
    assert first_length([torch.full((4,), 50.0), torch.zeros(3)]) == pytest.approx(1.0)
    assert first_length([torch.zeros(3)]) == 0.01
