"""How the drift of a conserved quantity grows with the learning rate: the exponent, and where it means something."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.results.text_table import format_table

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class DriftExponent:
    """The slope of log drift on log η; made by :func:`drift_exponent`.

    Attributes:
        exponent: Least-squares slope α over the points that were used.
        standard_error: Of α, from the scatter about the line; NaN of two points.
        r_squared: Of the fit.
        learning_rates: η in ascending order, ``(n,)``.
        drifts: The drift at each, ``(n,)``.
        local_slopes: Slope between neighbours, ``2 + Δlog|S|/Δlog η`` with ``S = drift/η²``, ``(n − 1,)``.
        stability: ηλ_max at each, ``(n,)``; NaN where no sharpness was given.
        used: Which points the fit is over, ``(n,)``.
    """

    exponent: float
    standard_error: float
    r_squared: float
    learning_rates: Tensor
    drifts: Tensor
    local_slopes: Tensor
    stability: Tensor
    used: Tensor

    @property
    def unstable(self) -> Tensor:
        """Which points have ηλ_max > 1, ``(n,)``."""
        return self.stability > 1

    def __str__(self) -> str:
        rows = []
        for i, (eta, drift) in enumerate(zip(self.learning_rates.tolist(), self.drifts.tolist(), strict=True)):
            slope = f"{self.local_slopes[i].item():.3f}" if i < len(self.local_slopes) else ""
            state = ("" if self.used[i] else "left out ") + ("ηλ > 1" if self.unstable[i] else "")
            rows.append([f"{eta:g}", f"{drift:.4g}", f"{self.stability[i].item():.3g}", slope, state])
        title = f"drift ~ η^α with α = {self.exponent:.4f} ± {self.standard_error:.2g}, R² = {self.r_squared:.4f}"
        return "\n".join([title, format_table(["η", "drift", "ηλ_max", "slope to next", ""], rows)])

    __repr__ = __str__


def drift_exponent(
    learning_rates: Sequence[float] | Tensor,
    drifts: Sequence[float] | Tensor,
    sharpness: float | Sequence[float] | Tensor | None = None,
    *,
    exclude_unstable: bool = False,
) -> DriftExponent:
    """α of ``drift ~ η^α``, with local slopes, and a warning where learning rates are beyond the stable ones.

    The drift of SGD is ``η²S(η)`` exactly, so the slope at η is ``2 + dlog|S|/dlog η``: α says how the summed squared
    gradients depend on η. With many small steps S ~ 1/η (a Riemann sum) and α is a little above 1; below T ~ 1/η steps
    α is nearer 2. Where ηλ_max > 1 the gradient overshoots along the top eigenvector, S stops falling with η, and the
    slope rises: α fitted across that is not one exponent. The published growth of α − 1 with the width is that, because
    λ_max grows with the width and the grid of η did not shrink.

    Args:
        learning_rates: η, at least two different ones.
        drifts: The drift after the same number of steps, summed over what is of interest; its absolute value counts.
        sharpness: λ_max of the loss at the start, one number or one for each η. None: stability is not looked at.
        exclude_unstable: Leave points with ηλ_max > 1 out of the fit, instead of warning.

    Raises:
        ValueError: Lengths differ; a learning rate is not positive or a drift zero or not finite; fewer than two
            points are left; ``exclude_unstable`` without a sharpness.

    Source: arXiv 2604.07405, corrected.
    """
    eta = torch.as_tensor(learning_rates, dtype=torch.float64).reshape(-1).cpu()
    drift = torch.as_tensor(drifts, dtype=torch.float64).reshape(-1).cpu()
    if len(eta) != len(drift):
        raise ValueError(f"there are {len(eta)} learning rates and {len(drift)} drifts.")
    if not ((eta > 0) & eta.isfinite()).all():
        raise ValueError(f"learning rates must be positive and finite, got {eta.tolist()}.")
    if not ((drift != 0) & drift.isfinite()).all():
        raise ValueError(f"drifts must be finite and not zero, got {drift.tolist()}: leave runs that diverged out.")
    if sharpness is None and exclude_unstable:
        raise ValueError("exclude_unstable needs sharpness, λ_max at the start: SharpnessTracker measures it.")
    top = torch.as_tensor(float("nan") if sharpness is None else sharpness, dtype=torch.float64).cpu()
    if top.ndim > 1 or (top.ndim == 1 and len(top) != len(eta)):
        raise ValueError(f"sharpness is one number or {len(eta)}, got shape {tuple(top.shape)}.")
    order = eta.argsort()
    stability = (eta * top)[order]
    eta, drift = eta[order], drift.abs()[order]
    unstable = stability > 1
    used = ~unstable if exclude_unstable else torch.ones_like(unstable)
    x, y = eta.log(), drift.log()
    if len(x[used].unique()) < 2:
        raise ValueError(f"a slope needs two different learning rates, {len(x[used].unique())} of {len(x)} are left.")
    slope, error, r_squared = _line(x[used], y[used])
    if unstable.any() and not exclude_unstable:
        _logger.warning(
            "ηλ_max is up to %.3g > 1 at %d of %d learning rates: the exponent %.3f is not one exponent. "
            "Pass exclude_unstable=True, or choose η below %.3g.",
            stability.max().item(),
            int(unstable.sum()),
            len(eta),
            slope,
            (eta / stability).min().item(),
        )
    between = x.diff()
    local = torch.where(between > 0, y.diff() / between, torch.nan)
    return DriftExponent(slope, error, r_squared, eta, drift, local, stability, used)


def _line(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Slope, its standard error and R² of a least-squares line."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    rest = (dy - slope * dx).square().sum()
    freedom = len(x) - 2
    error = (rest / freedom / (dx @ dx)).sqrt().item() if freedom else float("nan")
    total = dy.square().sum()
    return slope.item(), error, (1 - rest / total).item() if total > 0 else float("nan")
