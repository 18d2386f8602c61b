"""What takes part in a study: an optimizer on a task, its defaults and the grid that it is tuned over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from examples.shared.task import Batch, Task
from examples.studies.ablation.meter import loss_of


class Stepper(Protocol):
    """An optimizer on one task.

    One whose step is a whole run has an attribute ``after_iteration``, which it calls with the loss after each of its
    iterations; one that follows a schedule has an attribute ``share``, the share of the budget that is used up. The
    runner sets both.
    """

    def step(self, batch: Batch) -> float:
        """Take one step; the loss that was computed in it."""
        ...


Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Contender:
    """An optimizer in a study.

    Attributes:
        name: Unique; what users type.
        title: For tables and figures.
        build: ``build(task, **settings)``, with the optimizer's own defaults.
        grid: Settings that it is tuned over, the most telling first: a study takes as many as it has trials.
        ours: From this package. Its defaults are a contender as well.
        packages: What it is made from, beside torch: their versions are recorded.
    """

    name: str
    title: str
    build: Callable[..., Stepper]
    grid: Sequence[Settings]
    ours: bool = False
    packages: tuple[str, ...] = ()


class NotApplicable(Exception):
    """The contender cannot treat this task; the message says why."""


class Finished(Exception):
    """The contender has nothing more to do; the message says why."""


class Schedule:
    """Learning rates over a budget.

    Args:
        optimizers: Whose param groups to change.
        name: ``"constant"``, or ``"cosine"``: learning rates go to zero with the budget.
    """

    def __init__(self, optimizers: Sequence[Optimizer], name: str) -> None:
        if name not in ("constant", "cosine"):
            raise ValueError(f'schedule must be "constant" or "cosine", got {name!r}.')
        self.optimizers, self.name = optimizers, name
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def set(self, share: float) -> None:
        """Set the learning rates for the share of the budget that is used up."""
        if self.name == "cosine":
            factor = (1 + math.cos(math.pi * min(share, 1.0))) / 2
            for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor


class GradientStep:
    """Forward, backward and a step of optimizers that only look at ``.grad``.

    Args:
        task: The task.
        optimizers: Each with its share of the parameters.
        create_graph: Keep a tape of the gradient, for Hessian-vector products.
        schedule: See :class:`Schedule`.

    Attributes:
        share: Of the budget that is used up; the runner sets it.
    """

    def __init__(
        self, task: Task, *optimizers: Optimizer, create_graph: bool = False, schedule: str = "constant"
    ) -> None:
        self.task = task
        self.optimizers = optimizers
        self.create_graph = create_graph
        self.schedule = Schedule(optimizers, schedule)
        self.share = 0.0

    def step(self, batch: Batch) -> float:
        self.task.model.zero_grad(set_to_none=True)
        loss = loss_of(self.task.evaluate_loss(batch))
        loss.backward(create_graph=self.create_graph)
        self.schedule.set(self.share)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()


class ClosureStep:
    """A step of an optimizer that takes the closure of :mod:`hessopt.closure.protocol`.

    Args:
        task: The task.
        optimizer: The optimizer.
        schedule: See :class:`Schedule`.

    Attributes:
        share: Of the budget that is used up; the runner sets it.
    """

    def __init__(self, task: Task, optimizer: Optimizer, schedule: str = "constant") -> None:
        self.task = task
        self.optimizer = optimizer
        self.schedule = Schedule([optimizer], schedule)
        self.share = 0.0

    def step(self, batch: Batch) -> float:
        self.schedule.set(self.share)
        closure: Any = lambda: self.task.evaluate_loss(batch)  # noqa: E731
        return float(self.optimizer.step(closure))


def need_full_batch(task: Task) -> None:
    if not task.full_batch:
        raise NotApplicable("its line search needs the same batch at every step")


def split_parameters(
    model: nn.Module, chosen: Callable[[nn.Module, str, nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters that are chosen by module and name, and the others."""
    taken: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                (taken if chosen(module, name, p) else rest).append(p)
    return taken, rest


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def write(vector: Tensor, parameters: Iterable[Tensor]) -> None:
    """Set the parameters to the parts of a flat vector."""
    start = 0
    for p in parameters:
        p.copy_(vector[start : start + p.numel()].view_as(p))
        start += p.numel()
