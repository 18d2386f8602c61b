"""How far the loss stays the same to second order along null vectors: the half-width of a null channel."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.probes import generator_for
from diagnostics.operators.curvature import HessianOperator
from diagnostics.operators.null_cones import NullCone
from diagnostics.operators.replay import along_the_tape


@dataclass(frozen=True)
class ChannelWidth:
    """Widths of a null channel; made by :func:`channel_width`.

    Attributes:
        index: min(n₊, n₋) / k, see :attr:`diagnostics.operators.null_cones.NullCone.index_width`.
        null: Half-width ε* of each null vector that was tried.
        random: Half-width of as many random unit vectors of the same Krylov space.
        tolerance: τ.
    """

    index: float
    null: tuple[float, ...]
    random: tuple[float, ...]
    tolerance: float

    @property
    def ratio(self) -> float:
        """Median half-width of the null vectors over that of the random ones: 1 where null vectors are ordinary."""
        return statistics.median(self.null) / statistics.median(self.random)


def channel_width(
    op: HessianOperator,
    cone: NullCone,
    *,
    tolerance: float = 0.01,
    directions: int = 4,
    generator: torch.Generator | None = None,
) -> ChannelWidth:
    """Half-widths ε* along null vectors, and along random directions in the same Krylov space as the control.

    ``ε*`` is the largest ε up to which ``|½[L(θ + εv) + L(θ − εv)] − L(θ)| ≤ τ |L(θ)|``: the symmetric part of the
    change, which the gradient does not enter and of which a null vector lacks the second order. It is found by doubling
    from ``10⁻³ max(1, ‖θ‖)`` and bisection to 1 %, so a later return below the tolerance does not count.

    Args:
        op: The Hessian that the cone is of, at unchanged parameters.
        cone: Its null vectors.
        tolerance: τ.
        directions: How many null vectors are tried, those of largest ``‖Hv‖`` first, and as many random directions.
        generator: Source of the random ones. None: a new one with seed 0.

    Returns:
        Half-widths; infinite where the loss is not left after 2³⁰ times the first ε.

    Raises:
        ValueError: ``tolerance`` or ``directions`` is out of range.
        DiagnosticsError: there are no null vectors, or L is 0.
        StaleGraphError: the parameters have changed since ``op`` was made.
    """
    if not tolerance > 0 or directions < 1:
        raise ValueError(f"need tolerance > 0 and directions >= 1, got {tolerance} and {directions}.")
    if not cone.basis.shape[1]:
        raise DiagnosticsError("there are no null vectors in this Krylov space (T is semidefinite): no channel.")
    center = loss_at(op, None)
    if center == 0:
        raise DiagnosticsError("the loss is 0, so that a share of it is no tolerance.")
    chosen = cone.lengths.argsort(descending=True)[:directions]
    source = generator_for(op, generator)
    k = len(cone.ritz.values)
    mixed = torch.randn(k, len(chosen), dtype=op.dtype, device=source.device, generator=source).to(op.device)
    random = cone.ritz.vectors @ (mixed / torch.linalg.vector_norm(mixed, dim=0))
    theta = math.hypot(*(float(torch.linalg.vector_norm(p.detach())) for p in op.space.parameters.values()))

    def half_width(v: Tensor) -> float:
        def inside(epsilon: float) -> bool:
            average = (loss_at(op, epsilon * v) + loss_at(op, -epsilon * v)) / 2
            return abs(average - center) <= tolerance * abs(center)  # False for what is not finite

        return _largest(inside, 1e-3 * max(1.0, theta))

    null = tuple(half_width(v) for v in cone.basis[:, chosen].unbind(1))
    return ChannelWidth(cone.index_width, null, tuple(half_width(v) for v in random.unbind(1)), tolerance)


@torch.no_grad()
def loss_at(op: HessianOperator, offset: Tensor | None) -> float:
    """The operator's loss at parameters moved by a flat vector, ``(P,)``; the model's own are not touched.

    Not finite is a valid answer.
    """
    op.replay.check_fresh()
    moved: dict[str, Tensor] = {}
    if offset is not None:
        moved = {name: op.space.parameters[name].detach() + part for name, part in op.space.unflatten(offset).items()}
    total, samples = 0.0, 0
    with op.replay.replayed(), along_the_tape(op.device):
        for batch in op.batches:
            weight = batch.size if op.reduction == "mean" and not op.batches.single else 1
            total, samples = total + weight * op.replay.value(batch, moved), samples + weight
    return total / samples if op.reduction == "mean" and not op.batches.single else total


def _largest(inside: Callable[[float], bool], start: float) -> float:
    """The largest ε up to which doubling finds no exception, to 1 %."""
    low = high = start
    if inside(start):
        for _ in range(30):
            high = 2 * low
            if not inside(high):
                break
            low = high
        else:
            return math.inf
    else:
        for _ in range(60):
            low = high / 2
            if inside(low):
                break
            high = low
        else:
            return 0.0
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if inside(middle) else (low, middle)
    return low
