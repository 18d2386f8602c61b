"""What takes part in a study: an optimizer on a task, its defaults and the grid that it is tuned over."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    runner sets both. One whose result is not what it trains with has ``shown()``, a context with the result in the
    network.
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


STATISTICS = 20
"""Batches that normalization statistics are of, about what BatchNorm's default momentum of 0.1 remembers."""


class Shown:
    """Has averages of iterates measured, for optimizers that have ``eval()`` and ``train()``.

    BatchNorm's running statistics are of the iterates; those of the average are taken anew from the last
    :data:`STATISTICS` batches, and the others are put back. No budget is charged for that.
    """

    def __init__(self, task: Task, optimizers: Sequence[Optimizer]) -> None:
        self.task = task
        self._averaging: list[Any] = [o for o in optimizers if hasattr(o, "eval") and hasattr(o, "train")]
        self._normalizing = [
            m for m in task.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        ]
        self._batches: deque[Batch] = deque(maxlen=STATISTICS if self._averaging and self._normalizing else 0)

    def note(self, batch: Batch) -> None:
        self._batches.append(batch)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Has the network hold what would be shipped."""
        for optimizer in self._averaging:
            optimizer.eval()
        kept = [(m, m.momentum, {n: b.clone() for n, b in m.named_buffers()}) for m in self._normalizing]
        try:
            if self._batches:
                self._renew()
            yield
        finally:
            for module, momentum, buffers in kept:
                module.momentum = momentum
                for name, buffer in module.named_buffers():
                    buffer.copy_(buffers[name])
            for optimizer in self._averaging:
                optimizer.train()

    @torch.no_grad()
    def _renew(self) -> None:
        for module in self._normalizing:
            module.reset_running_stats()
            module.momentum = None  # a plain mean
        for batch in self._batches:
            self.task.evaluate_loss(batch)


class GradientStep(Shown):
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
        super().__init__(task, optimizers)
        self.optimizers = optimizers
        self.create_graph = create_graph
        self.schedule = Schedule(optimizers, schedule)
        self.share = 0.0

    def step(self, batch: Batch) -> float:
        self.note(batch)
        self.task.model.zero_grad(set_to_none=True)
        loss = loss_of(self.task.evaluate_loss(batch))
        loss.backward(create_graph=self.create_graph)
        self.schedule.set(self.share)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()


class ClosureStep(Shown):
    """A step of an optimizer that takes the closure of :mod:`hessopt.closure.protocol`.

    Args:
        task: The task.
        optimizer: The optimizer.
        schedule: See :class:`Schedule`.

    Attributes:
        share: Of the budget that is used up; the runner sets it.
    """

    def __init__(self, task: Task, optimizer: Optimizer, schedule: str = "constant") -> None:
        super().__init__(task, [optimizer])
        self.optimizer = optimizer
        self.schedule = Schedule([optimizer], schedule)
        self.share = 0.0

    def step(self, batch: Batch) -> float:
        self.note(batch)
        self.schedule.set(self.share)
        return float(self.optimizer.step(self._closure(batch)))

    def _closure(self, batch: Batch) -> Any:
        return lambda: self.task.evaluate_loss(batch)


class RowsStep(ClosureStep):
    """A step of an optimizer that draws rows itself, from all that the task has: batches are left alone."""

    def _closure(self, batch: Batch) -> Any:
        return self.task.residual_rows


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
