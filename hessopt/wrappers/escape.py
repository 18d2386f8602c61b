"""The move away from a saddle point: a direction of negative curvature, its sign and its length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CurvatureCheck:
    """What a check of the curvature found and did.

    Attributes:
        eigenvalues: The smallest eigenvalues of the Hessian that were asked for, ascending.
        residual: Bound on the error of the first.
        norm: ‖H‖₂, the largest absolute eigenvalue, by the same iterations.
        gradient_norm: ‖g‖.
        slope: gᵀd of the unit direction d; NaN where there was none.
        length: How far the parameters were moved along d; 0 without an escape.
        loss: The loss before.
        loss_after: The loss after the move; the same without one.
        products: Hessian-vector products.
        evaluations: Trial evaluations of the loss.
        escaped: Whether the parameters were moved.
        reason: What was decided, and why.
    """

    eigenvalues: tuple[float, ...]
    residual: float
    norm: float
    gradient_norm: float
    slope: float
    length: float
    loss: float
    loss_after: float
    products: int
    evaluations: int
    escaped: bool
    reason: str


@dataclass(frozen=True)
class Ray:
    """How far to go along one direction, and what that gains.

    Attributes:
        length: t, with the sign that was chosen; 0 if nothing was gained.
        gain: Decrease of the loss at t.
        evaluations: Trials.
    """

    length: float
    gain: float
    evaluations: int


def ray_direction(gradient: Tensor, values: Tensor, vectors: Tensor, least: float) -> Tensor:
    """``−Σ_i sign(gᵀv_i) max(|gᵀv_i| / |λ_i|, t₀) v_i`` over eigenpairs with λ_i < 0, scaled to length 1.

    Args:
        gradient: g, ``(P,)``.
        values: λ, ``(k,)``, negative.
        vectors: v as columns, ``(P, k)``.
        least: t₀.
    """
    slopes = vectors.mT @ gradient
    sizes = torch.maximum(slopes.abs() / values.abs(), torch.full_like(values, least))
    direction: Tensor = vectors @ (-torch.where(slopes >= 0, 1.0, -1.0).to(slopes.dtype) * sizes)
    unit: Tensor = direction / torch.linalg.vector_norm(direction)
    return unit


def search_rays(
    gain: Callable[[float], float],
    slope: float,
    curvature: float,
    start: float,
    max_trials: int,
    rounding: float = 0.0,
) -> Ray:
    """The best of the lengths t₀·2ʲ along d, and along −d where the slope at t₀ does not tell the sides apart.

    Where the loss does not change by more than its rounding, as next to a saddle of high order, t is doubled too.

    Args:
        gain: ``t ↦ f(θ) − f(θ + t d)``; not finite means too far.
        slope: gᵀd, at most 0.
        curvature: dᵀHd, negative.
        start: t₀.
        max_trials: Most evaluations, of both sides together.
        rounding: Changes of the loss up to this are none.
    """
    symmetric = abs(slope) <= abs(curvature) * start / 4
    sides = (1.0, -1.0) if symmetric else (1.0,)
    rays = [_search(gain, side * start, max_trials // len(sides), rounding) for side in sides]
    best = max(rays, key=lambda ray: ray.gain)
    return Ray(best.length, best.gain, sum(ray.evaluations for ray in rays))


def _search(gain: Callable[[float], float], start: float, most: int, rounding: float) -> Ray:
    """Double t while that gains a quarter more, or changes nothing; otherwise cut it by 4 until there is a gain."""
    t, best, evaluations = start, gain(start), 1
    while abs(best) <= rounding and evaluations < most:
        t *= 2
        best = gain(t)
        evaluations += 1
    if best > rounding:
        while evaluations < most:
            further = gain(2 * t)
            evaluations += 1
            if not further > _GROWTH * best:
                break
            t, best = 2 * t, further
        return Ray(t, best, evaluations)
    while evaluations < most and abs(t) > _SHORTEST * abs(start):
        t /= 4
        best = gain(t)
        evaluations += 1
        if best > rounding:
            return Ray(t, best, evaluations)
    return Ray(0.0, 0.0, evaluations)


_GROWTH = 1.25  # of the gain, for which the step is doubled: less comes from saturation, far from where H was taken
_SHORTEST = 1e-6  # of t₀; below, it is the rounding of the loss that is searched


def first_length(parameters: Sequence[Tensor]) -> float:
    """t₀: one percent of ‖θ‖, at least 0.01."""
    return max(0.01 * math.sqrt(sum(p.detach().double().square().sum().item() for p in parameters)), 0.01)
