"""Conjugate gradients on a quadratic model inside a trust region (Steihaug and Toint), and the path that they took."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import scipy.linalg
import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class Exit(str, Enum):
    """Why the iteration ended."""

    CONVERGED = "converged"
    BOUNDARY = "boundary"
    NEGATIVE_CURVATURE = "negative curvature"
    MAX_PRODUCTS = "max products"
    STATIONARY = "stationary"
    NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Segment:
    """The line ``x + τ p`` of one iteration; scalars only but for p.

    Attributes:
        direction: p.
        length: τ at which the next vertex is; the step α of conjugate gradients.
        value: ``m(x)``.
        slope: ``∇m(x)ᵀ p``.
        curvature: ``pᵀ B p``; not positive only in a path's last segment.
        xx: ``xᵀ M x``.
        xp: ``xᵀ M p``.
        pp: ``pᵀ M p``.
    """

    direction: Tensor
    length: float
    value: float
    slope: float
    curvature: float
    xx: float
    xp: float
    pp: float

    def model(self, tau: float) -> float:
        """``m(x + τ p)``."""
        return self.value + tau * self.slope + tau * tau * self.curvature / 2

    def norm(self, tau: float) -> float:
        """``‖x + τ p‖_M``."""
        return math.sqrt(max(self.xx + 2 * tau * self.xp + tau * tau * self.pp, 0.0))

    def crossings(self, radius: float) -> tuple[float, float]:
        """The τ at which ``‖x + τ p‖_M = radius``, for x inside: one is negative, one positive."""
        room = max((radius - math.sqrt(self.xx)) * (radius + math.sqrt(self.xx)), 0.0)
        q = abs(self.xp) + math.sqrt(self.xp * self.xp + self.pp * room)
        if q == 0:
            return 0.0, 0.0
        near, far = room / q, q / self.pp  # no cancellation in either
        return (-far, near) if self.xp >= 0 else (-near, far)


@dataclass(frozen=True)
class Cut:
    """The minimizer of the model on a path, inside a radius.

    Attributes:
        step: d.
        reduction: ``-m(d)``.
        curvature: ``dᵀ B d``.
        slope: ``gᵀ d``.
        norm: ``‖d‖_M``.
        exit: How the path ends within this radius.
    """

    step: Tensor
    reduction: float
    curvature: float
    slope: float
    norm: float
    exit: Exit


@dataclass
class Path:
    """The polygon from 0 through the iterates of conjugate gradients; see :func:`truncated_cg`.

    Attributes:
        gradient: g.
        segments: Of the polygon; memory is one vector for each.
        exit: Why the iteration ended.
        residual: ``g + B d`` at the end for the radius that the path was made with.
        products: Number of products with B.
        ritz: Smallest and largest Ritz value of ``M⁻¹B``; None without a product. (After a warm start, of the
            iteration from there.)
    """

    gradient: Tensor
    segments: list[Segment] = field(default_factory=list)
    exit: Exit = Exit.STATIONARY
    residual: Tensor | None = None
    products: int = 0
    ritz: tuple[float, float] | None = None

    def cut(self, radius: float) -> Cut:
        """The last point of the path within ``radius``, which is the model's minimizer along it.

        The iteration does not depend on the radius but for its end, so a smaller radius needs no new product.
        """
        step = torch.zeros_like(self.gradient)
        tau, last, code = 0.0, None, self.exit
        for segment in self.segments:
            last = segment
            if segment.curvature <= 0 and radius < math.inf:
                tau = min(segment.crossings(radius), key=segment.model)
                code = Exit.NEGATIVE_CURVATURE
            elif segment.norm(segment.length) >= radius:
                tau, code = min(segment.crossings(radius)[1], segment.length), Exit.BOUNDARY
            else:
                tau = segment.length
                step.add_(segment.direction, alpha=tau)
                continue
            step.add_(segment.direction, alpha=tau)
            break
        if last is None:
            return Cut(step, 0.0, 0.0, 0.0, 0.0, code)
        value, slope = last.model(tau), float(self.gradient @ step)
        return Cut(step, -value, 2 * (value - slope), slope, last.norm(tau), code)


@torch.no_grad()
def truncated_cg(
    product: Product,
    gradient: Tensor,
    *,
    radius: float = math.inf,
    tolerance: float = 1e-10,
    max_products: int = 250,
    solve: Product | None = None,
    start: Tensor | None = None,
    metric: Product | None = None,
) -> Path:
    """Minimize ``m(d) = gᵀd + ½ dᵀBd`` over ``‖d‖_M ≤ radius``, approximately, by preconditioned conjugate gradients.

    From ``d = 0``, iterates get longer in the norm of M; at the first that would be outside, or at a direction of
    curvature ``pᵀBp ≤ 0``, the path goes on to the boundary and ends there: of the two points where ``d ± τp`` meets
    it, at the one where m is less. Otherwise it ends at ``‖g + Bd‖_{M⁻¹} ≤ tolerance · ‖g‖_{M⁻¹}``. So the reduction
    is at least that of the best multiple of ``M⁻¹g``. Without a radius, a direction of negative curvature is taken
    with the absolute value of its curvature.

    Args:
        product: ``v ↦ B v``; symmetric, not necessarily definite.
        gradient: g, ``(P,)``.
        radius: Δ.
        tolerance: Relative, see above.
        max_products: Most products with B.
        solve: ``v ↦ M⁻¹ v``, symmetric positive definite. None: M is the identity.
        start: A direction d₀; the path begins at its best multiple. Costs one product.
        metric: ``v ↦ M v``; needed for ``start`` if ``solve`` is given.

    Source:
        Steihaug 1983; Toint 1981; Conn, Gould and Toint, "Trust-Region Methods" (2000), algorithm 7.5.1.
    """
    path = Path(gradient)
    eps = torch.finfo(gradient.dtype).eps
    x, r = torch.zeros_like(gradient), gradient.clone()
    value = xx = xy = 0.0
    if start is not None and max_products > 1:
        bent = product(start)
        path.products += 1
        curvature, slope = float(start @ bent), float(gradient @ start)
        square = float(start @ (start if metric is None else metric(start)))
        if curvature > 0 and slope != 0 and math.isfinite(curvature) and 0 < square < math.inf:
            first = Segment(start.clone(), -slope / curvature, 0.0, slope, curvature, 0.0, 0.0, square)
            path.segments.append(first)
            x, r = first.length * start, r + first.length * bent
            value, xx = first.model(first.length), first.norm(first.length) ** 2
            if math.sqrt(xx) >= radius:
                path.exit, path.residual = Exit.BOUNDARY, None
                return path
    y = r if solve is None else solve(r)
    rho = float(r @ y)
    size = float(gradient @ (gradient if solve is None else solve(gradient)))
    if not math.isfinite(rho) or rho < 0 or size < 0:
        path.exit = Exit.NOT_FINITE
        return path
    target = (tolerance**2) * size
    if size == 0:
        path.residual = r
        return path
    p, pp, xy = -y, rho, -float(x @ r)
    diagonal: list[float] = []
    off: list[float] = []
    carried = 0.0
    path.exit = Exit.CONVERGED
    while rho > target:
        if path.products >= max_products:
            path.exit = Exit.MAX_PRODUCTS
            break
        bent = product(p)
        path.products += 1
        curvature = float(p @ bent)
        if not math.isfinite(curvature):
            path.exit = Exit.NOT_FINITE
            break
        diagonal.append(curvature / rho + carried)
        negative = curvature <= eps * math.sqrt(float(p @ p) * float(bent @ bent))
        if negative:
            path.exit = Exit.NEGATIVE_CURVATURE
            curvature = min(curvature, 0.0)
            alpha = rho / max(-curvature, eps**0.5 * rho)
        else:
            alpha = rho / curvature
        segment = Segment(p, alpha, value, -rho, curvature, xx, xy, pp)
        path.segments.append(segment)
        outside = segment.norm(alpha) >= radius
        if negative or outside:
            if radius < math.inf:
                crossings = segment.crossings(radius)
                alpha = min(crossings, key=segment.model) if negative else min(crossings[1], alpha)
            path.exit = path.exit if negative else Exit.BOUNDARY
            r = r + alpha * bent
            break
        x = x + alpha * p
        r = r + alpha * bent
        y = r if solve is None else solve(r)
        new = float(r @ y)
        if not math.isfinite(new) or new < 0:
            path.exit = Exit.NOT_FINITE
            break
        beta = new / rho
        value, xx, along = segment.model(alpha), segment.norm(alpha) ** 2, xy + alpha * pp
        off.append(math.sqrt(beta) / alpha)
        carried = beta / alpha
        p = beta * p - y
        xy = -float(x @ r) + beta * along
        pp = new + beta * beta * pp
        rho = new
    path.residual = r
    path.ritz = _ritz(diagonal, off)
    return path


def _ritz(diagonal: list[float], off: list[float]) -> tuple[float, float] | None:
    """Extreme eigenvalues of the tridiagonal matrix of Lanczos, which the coefficients of conjugate gradients give."""
    count = len(diagonal)
    if count == 0 or not all(map(math.isfinite, [*diagonal, *off])):
        return None
    values = scipy.linalg.eigvalsh_tridiagonal(diagonal, off[: count - 1])
    return float(values[0]), float(values[-1])
