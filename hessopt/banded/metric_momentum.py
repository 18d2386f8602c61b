"""Momentum in the metric of the curvature: damping pulls a step towards the last one instead of towards zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hessopt.banded.quadratic_model import QuadraticModel
from hessopt.network.saved_state import Groups

Step = list[list[Tensor]]


class MomentumSolve:
    r"""The steps of :func:`hessopt.banded.damped_step.search_step`, from what is left of the last displacement φ.

    .. math::
        \varphi \leftarrow \mu \varphi - P^{-1} \nabla m(\mu \varphi), \quad
        \nabla m(d) = g + (\hat J^\top \hat J + \omega) d,

    the minimizer, where P is the full damped matrix, of ``m(d) + λ/2 ‖d − μ φ‖²``: momentum costs nothing in directions
    that the curvature determines, and accumulates in those that it leaves to the damping. With μ = 0 it is the damped
    step itself. The learning rate multiplies what comes out.

    Only the first solve has momentum, and only if what comes out goes down: after a rejection more damping would make
    the step longer, not shorter. φ is what was taken of the step, without the learning rate.

    Args:
        model: The quadratic model m.
        solve: ``solve(model, damping)``, the damped step of a model, the learning rates included.
        groups: Param groups, with ``lr`` and ``momentum`` (μ).
        state: Of the optimizer; φ is in ``"momentum_buffer"`` of each parameter.
        least: Least μ, whatever the groups say.

    Source:
        Goldshlager, Abrahamsen and Lin, "A Kaczmarz-inspired approach to accelerate the optimization of neural network
        wavefunctions" (2024), eq. 24, for the exact matrix.
    """

    def __init__(
        self,
        model: QuadraticModel,
        solve: Callable[[QuadraticModel, float], Step],
        groups: Groups,
        state: Any,
        least: float = 0.0,
    ) -> None:
        self._model, self._solve, self._state = model, solve, state
        self._momentum = {p: max(float(group["momentum"]), least) for group in groups for p in group["params"]}
        self._start = self._buffers() if any(self._momentum.values()) else None
        self._last: Step | None = None

    def __call__(self, damping: float) -> Step:
        """The step for a damping, learning rates included."""
        start, self._start = self._start, None
        if start is not None:
            moved = self._solve(self._model.at(start), damping)
            step = self._model.scaled(start)
            step = [[s + d for s, d in zip(*pair, strict=True)] for pair in zip(step, moved, strict=True)]
            if self._model.slope(step) < 0:
                self._last = step
                return step
        self._last = self._solve(self._model, damping)
        return self._last

    def keep(self, length: float) -> None:
        """Remember what was taken, a multiple of the last solve's step."""
        if not any(self._momentum.values()) or self._last is None:
            return
        for parameters, own, rates in zip(self._model.parameters, self._last, self._model.lr, strict=True):
            for p, d, lr in zip(parameters, own, rates, strict=True):
                self._state[p]["momentum_buffer"] = d * (length / lr if lr else 0.0)

    def _buffers(self) -> Step | None:
        """``μ φ``, in the precision of the gradients; None before the first step."""
        state, found = self._state, False
        start: Step = []
        for parameters, gradients in zip(self._model.parameters, self._model.gradients, strict=True):
            start.append([])
            for p, g in zip(parameters, gradients, strict=True):
                buffer = state[p].get("momentum_buffer") if p in state else None
                found = found or buffer is not None
                start[-1].append(g.new_zeros(g.shape) if buffer is None else self._momentum[p] * buffer.to(g))
        return start if found else None
