"""K-FAC: the Kronecker factors of curvlinops, renewed from time to time, precondition SGD with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.shared.task import Batch, Task
from examples.studies.ablation.contender import GradientStep, NotApplicable, Stepper, split_parameters


class KFACStep(GradientStep):
    """Linear and convolutional layers by K-FAC, what else there is by AdamW.

    Args:
        task: With ``loss_of_output`` and ``split``.
        lr: Of K-FAC.
        damping: Shared out over the two factors by Martens and Grosse's heuristic.
        every: Steps between renewals; a renewal uses that step's batch, and labels drawn from the network's output.
        momentum: Of the preconditioned gradient.
        schedule: See :class:`GradientStep`.
    """

    def __init__(self, task: Task, *, lr: float, damping: float, every: int, momentum: float, schedule: str) -> None:
        if task.loss_of_output is None or task.split is None:
            raise NotApplicable("K-FAC needs a loss of one output and the targets")
        if not isinstance(task.loss_of_output, nn.MSELoss | nn.CrossEntropyLoss | nn.BCEWithLogitsLoss):
            raise NotApplicable(f"curvlinops has no K-FAC for {type(task.loss_of_output).__name__}")
        kinds = (nn.Linear, nn.Conv2d)
        self.layers, rest = split_parameters(task.model, lambda module, name, p: type(module) in kinds)
        if not self.layers:
            raise NotApplicable("the network has no linear or convolutional layers")
        self.damping, self.every = damping, every
        self.steps = 0
        self._inverse: Any = None
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.SGD(self.layers, lr=lr, momentum=momentum, nesterov=momentum > 0)
        ]
        if rest:
            optimizers.append(torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.0))
        super().__init__(task, *optimizers, schedule=schedule)
        self.optimizers[0].register_step_pre_hook(self._precondition)

    def step(self, batch: Batch) -> float:
        if self.steps % self.every == 0:
            self._inverse = self._renewed(batch)
        self.steps += 1
        return super().step(batch)

    def _renewed(self, batch: Batch) -> Any:
        from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

        assert self.task.split is not None
        factors = KFACLinearOperator(
            self.task.model,
            self.task.loss_of_output,
            self.layers,
            [self.task.split(batch)],
            check_deterministic=False,
            seed=self.steps,
        )
        return KFACInverseLinearOperator(factors, damping=self.damping, use_heuristic_damping=True)

    def _precondition(self, *_: object) -> None:
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.layers]
        found: list[Tensor] = self._inverse @ slopes
        for p, d in zip(self.layers, found, strict=True):
            p.grad = d


def kfac(
    task: Task,
    *,
    lr: float = 0.01,
    damping: float = 1e-2,
    every: int = 10,
    momentum: float = 0.9,
    schedule: str = "constant",
) -> Stepper:
    return KFACStep(task, lr=lr, damping=damping, every=every, momentum=momentum, schedule=schedule)
