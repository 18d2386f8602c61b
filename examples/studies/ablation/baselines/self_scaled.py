"""The self-scaled Broyden method, which the literature on physics-informed networks recommends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from scipy.optimize import line_search
from torch import Tensor

from examples.shared.task import Batch, Task
from examples.studies.ablation.baselines.gradient import adamw
from examples.studies.ablation.baselines.quasi_newton import AdamThen, FlatLoss
from examples.studies.ablation.contender import Finished, NotApplicable, Stepper, need_full_batch, trained

Scaling: TypeAlias = Callable[[float, float, int], "tuple[float, float]"]

LARGEST = 5000
"""Parameters, whose dense inverse Hessian takes 200 MB."""


def ssbroyden(
    task: Task, *, adam_share: float = 0.0, lr: float = 1e-3, scaled_start: bool = True, c2: float = 0.9
) -> Stepper:
    """With Adam for a share of the budget before it, if ``adam_share`` is not 0."""
    need_full_batch(task)
    then = SelfScaledBroyden(task, scaled_start=scaled_start, c2=c2)
    return AdamThen(adamw(task, lr=lr), then, adam_share) if adam_share else then


class SelfScaledBroyden:
    """One iteration a step: a strong Wolfe line search along -Hg, then the update of H, from the identity.

    Where the line search finds nothing, H is the identity once more; the run ends where it finds nothing then.

    Args:
        task: With the same batch at every step.
        scaled_start: Whether the first update scales the identity, too, by ``h / (1 + a θ)``.
        c2: Of the curvature condition of the line search; that of the decrease has 1e-4.

    Raises:
        NotApplicable: the network has more than :data:`LARGEST` parameters.
    """

    def __init__(self, task: Task, *, scaled_start: bool = True, c2: float = 0.9) -> None:
        self.size = sum(p.numel() for p in trained(task.model))
        if self.size > LARGEST:
            raise NotApplicable(f"its dense inverse Hessian is for {LARGEST} parameters, and here are {self.size}")
        self.task, self.scaled_start, self.c2 = task, scaled_start, c2
        self._loss: FlatLoss | None = None
        self._restart()

    def _restart(self) -> None:
        self.inverse, self.updates = torch.eye(self.size, dtype=torch.float64), 0

    def step(self, batch: Batch) -> float:
        if self._loss is None:
            self._loss = FlatLoss(self.task, batch)
            self._x = self._loss.here()
            self._before = self._loss.value(self._x) + float(np.linalg.norm(self._loss.gradient(self._x))) / 2
        loss, x = self._loss, self._x
        value, gradient = loss.value(x), loss.gradient(x)
        direction = -(self.inverse @ torch.from_numpy(gradient)).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it found nothing, which the length says as well
            length, *_ = line_search(
                loss.value, loss.gradient, x, direction, gradient, value, self._before, c1=1e-4, c2=self.c2
            )
        if length is None:
            loss.go_to(x)
            if self.updates == 0:
                raise Finished("the line search found no step along the gradient")
            self._restart()
            return value
        self._x, self._before = x + length * direction, value
        change = loss.gradient(self._x) - gradient
        step, pull = (torch.from_numpy(part) for part in (length * direction, -length * gradient))
        if float(step @ torch.from_numpy(change)) > 0:  # where rounding did not undo the line search
            scaling = self_scaled if self.updates or not self.scaled_start else scaled_first
            update(self.inverse, step, torch.from_numpy(change), pull, scaling)
            self.updates += 1
        return loss.value(self._x)


def update(inverse: Tensor, s: Tensor, y: Tensor, pull: Tensor, scaling: Scaling) -> None:
    r"""Update an inverse Hessian H in place.

    .. math::
        H^+ = \frac1\tau \Big( H - \frac{H y y^\top H}{y^\top H y} + \varphi \, y^\top H y \, v v^\top \Big)
            + \frac{s s^\top}{y^\top s}, \qquad v = \frac{s}{y^\top s} - \frac{H y}{y^\top H y}

    Args:
        inverse: H, ``(P, P)``.
        s: The step, ``(P,)``.
        y: The change of the gradient, ``(P,)``, with ``yᵀs > 0``.
        pull: ``H⁻¹ s``, which is ``-α g`` where ``s = -α H g``, ``(P,)``.
        scaling: τ and φ of ``b = sᵀH⁻¹s / yᵀs``, ``h = yᵀHy / yᵀs`` and P. τ = φ = 1 is BFGS.
    """
    q = inverse @ y
    ys, yq = float(y @ s), float(y @ q)
    tau, phi = scaling(float(s @ pull) / ys, yq / ys, len(y))
    # All of it in one pass over H: its terms in s and q = Hy.
    mixed = -phi / (tau * ys)
    weights = s.new_tensor([[phi * yq / (tau * ys**2) + 1 / ys, mixed], [mixed, (phi - 1) / (tau * yq)]])
    vectors = torch.stack([s, q], dim=1)
    inverse.addmm_(vectors @ weights, vectors.T, beta=1 / tau)


def self_scaled(b: float, h: float, size: int) -> tuple[float, float]:
    r"""τ and φ of the self-scaled Broyden method.

    .. math::
        a &= b h - 1, \quad c = \sqrt{a / (1 + a)}, \quad \rho = \min(1, h (1 - c)), \quad
            \theta = \max\big(\tfrac{\rho - 1}{a}, \min(\tfrac1\rho, \tfrac{1 - b}{b})\big), \\
        \sigma &= 1 + a \theta, \quad \varphi = (1 - \theta) / \sigma, \quad \tau_1 = \min(1, 1 / b), \quad
            \tau = \begin{cases} \tau_1 \min(\sigma^{1/(1-n)}, 1/\theta) & \theta > 0 \\
                \min(\tau_1 \sigma^{1/(1-n)}, \sigma) & \theta \le 0 \end{cases}

    Source:
        Al-Baali and Khalfan 2005, "Wide interval for efficient self-scaling quasi-Newton algorithms"; for
        physics-informed networks Urbán, Stefanou and Pons 2025 (J. Comput. Phys. 523), Kiyani et al. 2025 (Comput.
        Methods Appl. Mech. Eng. 446).
    """
    theta, sigma = _theta(b, h)
    power = sigma ** (1 / (1 - size)) if size > 1 else 1.0
    first = min(1.0, 1 / b)
    tau = first * min(power, 1 / theta) if theta > 0 else min(first * power, sigma)
    return tau, (1 - theta) / sigma


def scaled_first(b: float, h: float, size: int) -> tuple[float, float]:
    """The same, with ``τ = h / (1 + a θ)``, which makes an identity as large as the inverse Hessian."""
    theta, sigma = _theta(b, h)
    return h / sigma, (1 - theta) / sigma


def _theta(b: float, h: float) -> tuple[float, float]:
    a = max(b * h - 1, 0.0)  # not negative, by the inequality of Cauchy and Schwarz
    rho = min(1.0, h / ((1 + a) * (1 + math.sqrt(a / (1 + a)))))  # h (1 - c), without the difference
    least = (rho - 1) / a if a else -math.inf  # of no effect then: v is zero
    theta = max(least, min(1 / rho, (1 - b) / b))
    return theta, 1 + a * theta
