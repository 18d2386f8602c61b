"""The largest eigenvalue of the Hessian through training, next to the one at which the step size becomes unstable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.lanczos import extreme_eigenpairs
from diagnostics.operators.curvature import HessianOperator

Phase: TypeAlias = Literal["stable", "progressive sharpening", "flattening", "edge of stability", "catapult"]


@dataclass(frozen=True)
class Sharpness:
    """One measurement of a :class:`SharpnessTracker`.

    Attributes:
        step: Training steps before it.
        value: λ_max of the Hessian of the loss.
        residual: ‖Hv − λv‖: an eigenvalue lies within it of ``value``.
        loss: The loss of the batch.
        threshold: The λ_max beyond which the step size is unstable on a quadratic, weight decay subtracted.
        ratio: λ_max over that: ηλ_max/2 for gradient descent.
        phase: Its label, by the rule of :class:`SharpnessTracker`.
        products: Hessian-vector products used.
    """

    step: int
    value: float
    residual: float
    loss: float
    threshold: float
    ratio: float
    phase: Phase
    products: int


class SharpnessTracker:
    """Follows λ_max of the loss through training, by Lanczos iterations that start from the last eigenvector.

    Gradient descent with step η on a quadratic is stable for λ < 2/η; heavy ball with momentum μ for ``2(1 + μ)/η``,
    divided by ``1 − τ`` with dampening τ; Nesterov's for ``2(1 + μ)/((1 + 2μ)η)``. A weight decay of the optimizer adds
    to every eigenvalue and is subtracted from the threshold. Full batches assumed: mini-batches settle below.

    The phase of a measurement, with ``ratio = λ_max/threshold``, b the ``band``:

    - ``"edge of stability"``: ``|ratio − 1| ≤ b``;
    - ``"catapult"``: ``ratio > 1 + b``: unstable along the top eigenvector; the loss grows until λ_max falls, or for
      good;
    - below ``1 − b``, by the slope of log λ_max over the last ``window`` measurements: ``"progressive sharpening"``
      where it rose by more than ``trend``, ``"flattening"`` where it fell by more, ``"stable"`` otherwise.

    Training is left bit for bit as it is. The model is measured in the mode in which it is: the trained loss is the one
    whose sharpness counts.

    Args:
        model: The network.
        loss_fn: ``loss_fn(z, targets) -> scalar``.
        optimizer: A ``torch.optim.SGD``, whose first group's numbers are read at each measurement; or the threshold
            itself as a number.
        every: Measure at every so many calls of :meth:`step`.
        rtol: Lanczos iterations stop where the residual is below rtol · λ_max.
        max_products: The most Hessian-vector products of one measurement.
        band: See above.
        window: See above.
        trend: See above.

    Attributes:
        history: The measurements, in order.

    Raises:
        ValueError: An argument is out of range.
        DiagnosticsError: The optimizer has no such threshold (it is not SGD).

    Source: Cohen et al. 2021 (edge of stability, thresholds); Lewkowycz et al. 2020 (catapult).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer | float,
        *,
        every: int = 1,
        rtol: float = 1e-3,
        max_products: int = 60,
        band: float = 0.2,
        window: int = 5,
        trend: float = 0.05,
    ) -> None:
        if every < 1 or window < 2:
            raise ValueError(f"every must be at least 1 and window at least 2, got {every} and {window}.")
        if not (0 < band < 1 and trend > 0):
            raise ValueError(f"band must be in (0, 1) and trend positive, got {band} and {trend}.")
        if isinstance(optimizer, torch.optim.Optimizer):
            if not isinstance(optimizer, torch.optim.SGD):
                raise DiagnosticsError(
                    f"{type(optimizer).__name__} scales every entry by its own factor, so no λ_max of the Hessian is "
                    "its threshold. Pass a torch.optim.SGD, or a threshold as a number."
                )
        elif not optimizer > 0:
            raise ValueError(f"the threshold must be positive, got {optimizer}.")
        self.model = model
        self.loss_fn = loss_fn
        self.every = every
        self.history: list[Sharpness] = []
        self._optimizer = optimizer
        self._rtol, self._max_products = rtol, max_products
        self._band, self._window, self._trend = band, window, trend
        self._vector: Tensor | None = None
        self._steps = 0

    def step(self, batch: tuple[Any, Any]) -> Sharpness | None:
        """Count a training step, and measure on ``batch`` = ``(inputs, targets)`` if one is due; else None."""
        step, self._steps = self._steps, self._steps + 1
        return self.measure(batch, step) if step % self.every == 0 else None

    def measure(self, batch: tuple[Any, Any], step: int | None = None) -> Sharpness:
        """Measure now; ``step`` is what to call it (None: the number of steps so far)."""
        op = HessianOperator(self.model, batch, self.loss_fn, progress=False)
        start = self._vector if self._vector is not None and len(self._vector) == op.shape[0] else None
        top = extreme_eigenpairs(
            op, which="largest", rtol=self._rtol, max_products=min(self._max_products, op.shape[0]), start=start
        )
        self._vector = top.vectors[:, 0]
        value, threshold = top.values[0].item(), self.threshold()
        ratio = value / threshold
        measured = Sharpness(
            step=self._steps if step is None else step,
            value=value,
            residual=top.residuals[0].item(),
            loss=op.loss_and_gradient()[0].item(),
            threshold=threshold,
            ratio=ratio,
            phase=self._phase(value, ratio),
            products=top.products,
        )
        self.history.append(measured)
        return measured

    def threshold(self) -> float:
        """The λ_max beyond which the optimizer's present settings are unstable on a quadratic."""
        if not isinstance(self._optimizer, torch.optim.Optimizer):
            return float(self._optimizer)
        return stability_threshold(self._optimizer.param_groups[0])

    def _phase(self, value: float, ratio: float) -> Phase:
        if ratio > 1 + self._band:
            return "catapult"
        if ratio >= 1 - self._band:
            return "edge of stability"
        before = [m.value for m in self.history[-(self._window - 1) :] if m.value > 0]
        if not before or value <= 0:
            return "stable"
        change = math.log(value / before[0])
        if abs(change) <= self._trend:
            return "stable"
        return "progressive sharpening" if change > 0 else "flattening"


def stability_threshold(group: Mapping[str, Any]) -> float:
    """The largest stable eigenvalue of a quadratic under ``torch.optim.SGD`` with a group's settings.

    ``2(1 + μ)/((1 − τ)η)`` for momentum μ with dampening τ, ``2(1 + μ)/((1 + 2μ)η)`` for Nesterov's, less the weight
    decay; infinite for η = 0.
    """
    lr, mu = float(group["lr"]), float(group["momentum"])
    if lr == 0:
        return math.inf
    gain = 1 + 2 * mu if group["nesterov"] else 1 - float(group["dampening"]) if mu else 1.0
    return 2 * (1 + mu) / (gain * lr) - float(group["weight_decay"])


def softmax_curvature_bound(probabilities: Tensor) -> Tensor:
    """``λ_max(diag p − ppᵀ) ≤ 2 max_k p_k (1 − p_k)``: the curvature of cross-entropy in the logits, ``(…, K) -> (…)``.

    By Gershgorin: row k has ``p_k(1 − p_k)`` on the diagonal and absolute values of the same sum beside it. The
    published bound ``max_k p_k (1 − p_k)``, without the 2, is false: p = (½, ½) has λ_max = ½ and ``p(1 − p) = ¼``.

    Args:
        probabilities: p, nonnegative with sum 1 along the last dimension.

    Raises:
        DiagnosticsError: They are not.
    """
    p = probabilities
    total = p.sum(-1)
    if (p < 0).any() or not torch.allclose(total, torch.ones_like(total), rtol=0, atol=torch.finfo(p.dtype).eps ** 0.5):
        raise DiagnosticsError(
            "probabilities must be nonnegative and sum to 1 along the last dimension: use softmax(-1)."
        )
    return 2 * (p * (1 - p)).amax(-1)
