"""LBFGS of torch.optim, alone and after Adam, and methods of scipy.optimize; all for full-batch problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from examples.shared.task import Batch, Task
from examples.studies.ablation.baselines.gradient import adamw
from examples.studies.ablation.contender import Finished, Stepper, need_full_batch, trained, write
from examples.studies.ablation.meter import loss_of

Array = npt.NDArray[np.float64]


class LBFGSStep:
    """Ten iterations a step; the first evaluation of a step repeats one of the step before."""

    def __init__(self, task: Task, *, history_size: int, lr: float) -> None:
        self.task = task
        self.optimizer = torch.optim.LBFGS(
            trained(task.model),
            lr=lr,
            max_iter=10,
            history_size=history_size,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )

    def step(self, batch: Batch) -> float:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.task.evaluate_loss(batch))
            loss.backward()
            return loss

        return float(self.optimizer.step(closure))


def lbfgs(task: Task, *, history_size: int = 100, lr: float = 1.0) -> Stepper:
    need_full_batch(task)
    return LBFGSStep(task, history_size=history_size, lr=lr)


class AdamThen:
    """Adam for the first ``adam_share`` of the budget, another optimizer for the rest.

    Attributes:
        share: Of the budget that is used up; the runner sets it.
    """

    def __init__(self, adam: Stepper, then: Stepper, adam_share: float) -> None:
        self.adam, self.then, self.adam_share = adam, then, adam_share
        self.share = 0.0

    def step(self, batch: Batch) -> float:
        return (self.adam if self.share < self.adam_share else self.then).step(batch)


def adam_then_lbfgs(task: Task, *, lr: float = 1e-3, adam_share: float = 0.2, history_size: int = 100) -> Stepper:
    """The usual way to train physics-informed networks."""
    return AdamThen(adamw(task, lr=lr), lbfgs(task, history_size=history_size), adam_share)


class FlatLoss:
    """A task's loss on one batch as a function of a flat vector of parameters, evaluated once at a point.

    Args:
        task: The task.
        batch: The batch.
        products: Keep a tape of gradients, for products with the Hessian.
    """

    def __init__(self, task: Task, batch: Batch, *, products: bool = False) -> None:
        self.task, self.batch, self.products = task, batch, products
        self.parameters = trained(task.model)
        self._at: Array | None = None
        self._gradient: list[Tensor] | None = None

    def here(self) -> Array:
        """The parameters as they are."""
        return _flat(self.parameters)

    def go_to(self, x: Array) -> None:
        """Set the parameters, and evaluate the loss if it was not the last to be evaluated."""
        if self._at is None or not np.array_equal(x, self._at):
            self._at, self._gradient = x.copy(), None
            write(torch.from_numpy(self._at), self.parameters)
            self._loss = loss_of(self.task.evaluate_loss(self.batch))

    def value(self, x: Array) -> float:
        self.go_to(x)
        return self._loss.item()

    def gradient(self, x: Array) -> Array:
        return _flat(self._gradients(x))

    def product(self, x: Array, v: Array) -> Array:
        """Of the Hessian and v."""
        parts: list[Tensor] = []
        rest = torch.from_numpy(v)
        for p in self.parameters:
            part, rest = rest[: p.numel()], rest[p.numel() :]
            parts.append(part.view_as(p).to(p))
        on_tape = [(g, part) for g, part in zip(self._gradients(x), parts, strict=True) if g.requires_grad]
        gradients, seeds = zip(*on_tape, strict=True)
        found = torch.autograd.grad(gradients, self.parameters, seeds, retain_graph=True, allow_unused=True)
        return _flat(self._filled(found))

    def _gradients(self, x: Array) -> list[Tensor]:
        self.go_to(x)
        if self._gradient is None:
            found = torch.autograd.grad(self._loss, self.parameters, create_graph=self.products, allow_unused=True)
            self._gradient = self._filled(found)
        return self._gradient

    def _filled(self, found: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = zip(found, self.parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]


class ScipyRun:
    """A run of ``scipy.optimize.minimize`` as one step.

    Attributes:
        after_iteration: Called with the loss after each iteration, with the parameters as they are then.
    """

    def __init__(self, task: Task, method: str, options: dict[str, Any], *, products: bool) -> None:
        self.task, self.method, self.options, self.products = task, method, options, products
        self.after_iteration: Callable[[float], None] = lambda loss: None

    def step(self, batch: Batch) -> float:
        loss = FlatLoss(self.task, batch, products=self.products)

        def value(x: Array) -> tuple[float, Array]:
            return loss.value(x), loss.gradient(x)

        def callback(intermediate_result: Any) -> None:
            loss.go_to(np.asarray(intermediate_result.x))
            self.after_iteration(float(intermediate_result.fun))

        more: dict[str, Any] = {"method": self.method, "options": self.options}
        if self.products:
            more["hessp"] = loss.product
        result = minimize(value, loss.here(), jac=True, callback=callback, **more)
        loss.go_to(result.x)
        raise Finished(str(result.message))


def _flat(tensors: Sequence[Tensor]) -> Array:
    flat: Array = torch.cat([t.detach().reshape(-1) for t in tensors]).cpu().numpy().astype(np.float64)
    return flat


def scipy_lbfgsb(task: Task, *, maxcor: int = 10) -> Stepper:
    """L-BFGS-B without bounds, until it finds no lower value."""
    need_full_batch(task)
    options = {"maxcor": maxcor, "maxiter": 10**9, "maxfun": 10**9, "ftol": 0.0, "gtol": 0.0}
    return ScipyRun(task, "L-BFGS-B", options, products=False)


def scipy_trust_ncg(task: Task, *, initial_trust_radius: float = 1.0) -> Stepper:
    """Conjugate gradients in a trust region."""
    need_full_batch(task)
    options = {
        "initial_trust_radius": initial_trust_radius, "max_trust_radius": 1e10, "maxiter": 10**9, "gtol": 0.0
    }  # fmt: skip
    return ScipyRun(task, "trust-ncg", options, products=True)
