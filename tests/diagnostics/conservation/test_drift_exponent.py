"""The drift exponent is the slope of the logarithms, with its error, and says where it means nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import scipy.stats
import torch

from diagnostics.conservation.drift_exponent import drift_exponent

ETA = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def test_power_law_is_recovered_whatever_the_order_and_sign() -> None:
    drifts = [-7 * eta**1.3 for eta in ETA]
    found = drift_exponent(ETA[::-1], drifts[::-1])
    assert found.exponent == pytest.approx(1.3, abs=1e-12)
    assert found.standard_error < 1e-12
    assert found.r_squared == pytest.approx(1)
    torch.testing.assert_close(found.local_slopes, torch.full((4,), 1.3, dtype=torch.float64))
    torch.testing.assert_close(found.learning_rates, torch.tensor(ETA, dtype=torch.float64))


def test_slope_and_standard_error_are_those_of_linear_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    eta = torch.tensor(ETA, dtype=torch.float64)
    drifts = eta**1.1 * torch.exp(0.2 * torch.randn(5, generator=generator, dtype=torch.float64))
    expected = scipy.stats.linregress(eta.log().numpy(), drifts.log().numpy())
    found = drift_exponent(eta, drifts)
    assert found.exponent == pytest.approx(expected.slope, rel=1e-12)
    assert found.standard_error == pytest.approx(expected.stderr, rel=1e-10)
    assert found.r_squared == pytest.approx(expected.rvalue**2, rel=1e-10)


def test_local_slopes_are_two_plus_that_of_s() -> None:
    eta = torch.tensor(ETA, dtype=torch.float64)
    s = torch.tensor([900.0, 320.0, 100.0, 37.0, 30.0], dtype=torch.float64)
    found = drift_exponent(eta, eta.square() * s)
    torch.testing.assert_close(found.local_slopes, 2 + s.log().diff() / eta.log().diff())


def test_unstable_points_are_warned_about_or_left_out(caplog: pytest.LogCaptureFixture) -> None:
    drifts = [eta**1.05 for eta in ETA[:-1]] + [1.0]  # the last is far above the law
    with caplog.at_level(logging.WARNING, logger="diagnostics.conservation.drift_exponent"):
        mixed = drift_exponent(ETA, drifts, sharpness=20.0)
    assert "1 of 5 learning rates" in caplog.text
    assert mixed.exponent > 1.2
    assert mixed.unstable.tolist() == [False] * 4 + [True]
    assert mixed.used.all()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diagnostics.conservation.drift_exponent"):
        kept = drift_exponent(ETA, drifts, sharpness=20.0, exclude_unstable=True)
        drift_exponent(ETA, drifts, sharpness=9.9)
    assert not caplog.records
    assert kept.exponent == pytest.approx(1.05, abs=1e-12)
    assert kept.used.tolist() == [True] * 4 + [False]
    assert "left out ηλ > 1" in str(kept)
    own = drift_exponent(ETA, drifts, sharpness=[20.0, 20.0, 20.0, 40.0, 5.0], exclude_unstable=True)
    assert own.used.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ETA, ETA[:3]), {}, "5 learning rates and 3 drifts"),
        (([0.1, -0.1], [1, 2]), {}, "must be positive"),
        (([0.1, 0.2], [1, 0]), {}, "not zero"),
        (([0.1, 0.2], [1, float("nan")]), {}, "must be finite"),
        (([0.1, 0.1], [1, 2]), {}, "two different learning rates"),
        ((ETA, ETA), {"exclude_unstable": True}, "needs sharpness"),
        ((ETA, ETA, [1.0, 2.0]), {}, "one number or 5"),
        ((ETA, ETA, 500.0), {"exclude_unstable": True}, "1 of 5 are left|0 of 5 are left"),
    ],
)
def test_arguments_are_checked(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drift_exponent(*arguments, **options)
