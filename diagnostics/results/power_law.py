"""Power laws by least squares on logarithms, and what least squares alone forces on three of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from scipy.special import zeta
from torch import Tensor

from diagnostics.errors import DiagnosticsError

LEAST_POINTS = 3
"""Points from which a slope has a standard error."""


@dataclass(frozen=True)
class PowerLaw:
    """``y = e^intercept · x^exponent``, the least-squares line of log y on log x.

    All are NaN where there are fewer than 3 points, or x is constant; R² is NaN where y is.

    Attributes:
        exponent: The slope; with the sign turned where the law is written as a decay, ``y ∝ x^(−exponent)``.
        r2: R², the share of the variance of log y that the line explains.
        standard_error: Of the slope: ``√(Σ residual² / ((n − 2) Σ (log x − mean)²))``. It is that of independent
            errors; ranks and sorted values have dependent ones, so that it is too small there.
        intercept: log y at x = 1.
        points: n.
    """

    exponent: float
    r2: float
    standard_error: float
    intercept: float
    points: int

    def decay(self) -> PowerLaw:
        """The same law with the sign of its exponent turned."""
        return PowerLaw(-self.exponent, self.r2, self.standard_error, self.intercept, self.points)

    def to_dict(self) -> dict[str, float]:
        """The attributes by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.exponent:.3f} ± {self.standard_error:.2g} (R² {self.r2:.3f}, {self.points} points)"


def fit_power_law(x: Tensor, y: Tensor) -> PowerLaw:
    """Fit ``y ∝ x^a`` to positive points ``(n,)`` by least squares on their logarithms.

    Raises:
        DiagnosticsError: shapes differ, or a value is not a positive number.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise DiagnosticsError(f"a power law is fitted to x and y of one shape (n,), got {x.shape} and {y.shape}.")
    for name, values in (("x", x), ("y", y)):
        if not bool(((values > 0) & values.isfinite()).all()):
            raise DiagnosticsError(
                f"{name} has values that are not positive or not finite, which have no logarithm: drop them first, "
                "and count them."
            )
    count = len(x)
    nan = math.nan
    if count < LEAST_POINTS:
        return PowerLaw(nan, nan, nan, nan, count)
    u, v = (values.double().log() for values in (x, y))
    du, dv = u - u.mean(), v - v.mean()
    spread, scatter = float(du @ du), float(dv @ dv)
    if spread <= count * (torch.finfo(torch.float64).eps * float(u.abs().max())) ** 2:
        return PowerLaw(nan, nan, nan, nan, count)
    slope = float(du @ dv) / spread
    left = float((dv - slope * du).square().sum())
    return PowerLaw(
        exponent=slope,
        r2=1 - left / scatter if scatter > 0 else nan,
        standard_error=math.sqrt(left / ((count - 2) * spread)),
        intercept=float(v.mean()) - slope * float(u.mean()),
        points=count,
    )


@dataclass(frozen=True)
class ExponentIdentity:
    r"""How far ``s = αγ`` holds, and how far it has to hold whatever the numbers mean.

    Three lines through the same n points, with k = 1 … n: log h on log σ (slope α), log σ on log k (slope −γ), log h
    on log k in the order of σ (slope −s′). For *any* positive numbers

    .. math::
        |s' - \alpha\gamma| \;\le\; B = \sqrt{(1 - R^2_\alpha)(1 - R^2_\gamma)}\,
        \frac{\operatorname{sd}(\log h)}{\operatorname{sd}(\log k)} ,

    because ``s′ − αγ`` is minus the covariance of the residual of log h on log σ with log k, over var log k; that
    residual is orthogonal to log σ, so that only the part of log k that log σ leaves unexplained counts (Cauchy and
    Schwarz). So a small error says that two lines are straight, and nothing about a network. The published s is that
    of h *sorted*; sorting can only raise it (rearrangement), so that ``|s − αγ| ≤ B + (s − s′)``, always.

    Attributes:
        error: ``|s − αγ|``, with s of the sorted h.
        ranked_error: ``|s′ − αγ|``, with h in the order of σ.
        bound: B.
        sorting: s − s′ ≥ 0.
        s: The sorted slope, that errors are relative to.
    """

    error: float
    ranked_error: float
    bound: float
    sorting: float
    s: float

    @property
    def relative_error(self) -> float:
        """``|s − αγ| / |s|``."""
        return self.error / abs(self.s) if self.s else math.nan

    @property
    def relative_bound(self) -> float:
        """``B / |s|``."""
        return self.bound / abs(self.s) if self.s else math.nan

    @property
    def inside(self) -> bool:
        """Whether ``|s − αγ|`` is at most B (to rounding): then least squares alone explains it."""
        return self.error <= self.bound + 1e-12 * abs(self.s)

    def to_dict(self) -> dict[str, float]:
        """Attributes and relative figures by name."""
        return {
            **asdict(self),
            "relative_error": self.relative_error,
            "relative_bound": self.relative_bound,
            "inside": self.inside,
        }


@dataclass(frozen=True)
class ExponentFits:
    """The three exponents of one layer, from σ (descending) and h, all positive; made by :func:`fit_exponents`.

    Attributes:
        alpha: ``h ∝ σ^α``.
        gamma: ``σ_k ∝ k^(−γ)``, k = 1 … n.
        s: ``h_(k) ∝ k^(−s)`` of the sorted h.
        s_ranked: ``h_k ∝ k^(−s′)``, in the order of σ.
        identity: The error of s = αγ and its bound.
    """

    alpha: PowerLaw
    gamma: PowerLaw
    s: PowerLaw
    s_ranked: PowerLaw
    identity: ExponentIdentity


def fit_exponents(sigma: Tensor, h: Tensor) -> ExponentFits:
    """Fit α, γ and s to n singular values in descending order and the curvatures along their directions.

    Raises:
        DiagnosticsError: a value is not positive, or σ is not in descending order.
    """
    if bool((sigma[1:] > sigma[:-1]).any()):
        raise DiagnosticsError("singular values must be in descending order: γ is fitted to their ranks.")
    k = torch.arange(1, len(sigma) + 1, dtype=torch.float64, device=sigma.device)
    alpha = fit_power_law(sigma, h)
    gamma, ranked = fit_power_law(k, sigma).decay(), fit_power_law(k, h).decay()
    s = fit_power_law(k, h.sort(descending=True).values).decay()
    product = alpha.exponent * gamma.exponent
    return ExponentFits(
        alpha,
        gamma,
        s,
        ranked,
        ExponentIdentity(
            error=abs(s.exponent - product),
            ranked_error=abs(ranked.exponent - product),
            bound=_bound(alpha, gamma, h.double().log(), k.log()),
            sorting=s.exponent - ranked.exponent,
            s=s.exponent,
        ),
    )


def _bound(alpha: PowerLaw, gamma: PowerLaw, log_h: Tensor, log_k: Tensor) -> float:
    if not math.isfinite(gamma.r2) or len(log_h) < LEAST_POINTS:
        return math.nan
    spread = float(log_h.std())
    if spread == 0:
        return 0.0
    return math.sqrt(max(1 - alpha.r2, 0.0) * max(1 - gamma.r2, 0.0)) * spread / float(log_k.std())


def participation_ratio(h: Tensor) -> float:
    """``(Σh)² / Σh²``: how many directions carry the curvature; 1 to n for n values of one sign; 0/0 is NaN."""
    values = (
        h.double() / h.abs().max() if len(h) and bool(h.any()) else h.double()
    )  # squares neither over nor underflow
    squares = float(values.square().sum())
    return float(values.sum()) ** 2 / squares if squares else math.nan


def zeta_reference(s: float) -> float:
    """``ζ(s)² / ζ(2s)``, the participation ratio of ``h_k = k^(−s)``, k = 1, 2, … without end; NaN for s ≤ 1.

    It is the value of an exact, infinite power law, and no bound on fitted spectra: most measured participation ratios
    of the paper lie above or below it by tens of per cent, 27 of 56 above.
    """
    return float(zeta(s)) ** 2 / float(zeta(2 * s)) if s > 1 else math.nan
