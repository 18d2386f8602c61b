"""What a move along negative curvature gains, by evaluations of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from diagnostics.operators.curvature import HessianOperator

_GROWTH = 1.25  # of the gain, for which the length is doubled
_TRIALS = 8  # evaluations of the loss on each side


def gain_along(op: HessianOperator, direction: Tensor, slope: float) -> tuple[float, float]:
    """The best of the moves ``θ + t v`` that were tried, and how much lower the loss is there.

    From t₀, one per cent of ‖θ‖ (at least 0.01), on the side that goes down and on the other too, t is doubled while
    that gains a quarter more, seven times at most: the farthest is 1.28 ‖θ‖, where the curvature at θ says little.
    Parameters, buffers and random state are as they were afterwards, also on an error.

    Args:
        op: The Hessian; its loss is that of all batches.
        direction: v, ``(P,)``, of length 1.
        slope: gᵀv.

    Returns:
        ``(t, f(θ) − f(θ + t v))``; zeros where no move lowers the loss.
    """
    start = _loss(op)
    norm = math.sqrt(sum(p.detach().double().square().sum().item() for p in op.space.parameters.values()))
    first = math.copysign(max(0.01 * norm, 0.01), -slope)

    def gain(length: float) -> float:
        with _moved(op, direction, length):
            decrease = start - _loss(op)
        return decrease if math.isfinite(decrease) else -math.inf

    sides = (_doubled(gain, side * first) for side in (1.0, -1.0))
    length, best = max(sides, key=lambda found: found[1])
    return (length, best) if best > 0 else (0.0, 0.0)


def _doubled(gain: Callable[[float], float], length: float) -> tuple[float, float]:
    best = gain(length)
    for _ in range(_TRIALS - 1):
        further = gain(2 * length)
        if not further > _GROWTH * max(best, 0.0):
            break
        length, best = 2 * length, further
    return length, best


@contextmanager
def _moved(op: HessianOperator, direction: Tensor, length: float) -> Iterator[None]:
    """Move the parameters themselves, for a loss may hold on to them; by ``.data``, which recorded tapes do not see."""
    parts = op.unflatten(direction)
    before = {name: p.detach().clone() for name, p in op.space.parameters.items()}
    try:
        for name, p in op.space.parameters.items():
            p.data.add_(parts[name], alpha=length)
        yield
    finally:
        for name, p in op.space.parameters.items():
            p.data.copy_(before[name])


def _loss(op: HessianOperator) -> float:
    """The mean loss of all batches, not finite where the network or the loss is not."""
    total = samples = 0.0
    with op.replay.replayed(), op.replay.recording():
        for batch in op.batches:
            weight = 1 if op.batches.single else batch.size
            total, samples = total + weight * op.replay.value(batch), samples + weight
    return total / samples
