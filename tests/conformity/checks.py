"""The register of checks of optimizers, and what they share."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from tests.conformity.optimizer_infos import Subject, Task

Check = Callable[..., None]


CHECKS: dict[str, Check] = {}


VARIANTS: dict[str, list[dict[str, Any]]] = {}


def check(**variants: list[Any]) -> Callable[[Check], Check]:
    """Register a check under the name of torch's, in all combinations of its variants."""

    def register(function: Check) -> Check:
        name = function.__name__
        CHECKS[name] = function
        combinations: list[dict[str, Any]] = [{}]
        for key, values in variants.items():
            combinations = [{**c, key: value} for c in combinations for value in values]
        VARIANTS[name] = combinations
        return function

    return register


def each(subject: Subject, device: torch.device, all_inputs: bool = True) -> Iterator[tuple[dict[str, Any], int]]:
    """Arguments, and the sign of the convex losses of the checks; with all inputs of the entry, or its first."""
    for optim_input in subject.inputs(device) if all_inputs else itertools.islice(subject.inputs(device), 1):
        torch.manual_seed(0)
        kwargs = optim_input.kwargs
        yield kwargs, subject.sign(kwargs)


def went_right(task: Task, optimizer: Optimizer, maximize: bool, steps: int, schedulers: list[Any]) -> None:
    closure = task.closure(optimizer)
    initial = closure().item()
    for _ in range(steps):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(loss) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
    final = closure().item()
    assert final > initial if maximize else final < initial


GROUP_OPTIONS = (
    "lr", "weight_decay", "maximize", "momentum", "dampening", "nesterov", "betas", "eps", "amsgrad",
)  # fmt: skip
"""Arguments that a param group can have of its own."""


def assert_equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit for bit, whatever is in it."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    plain = copy.deepcopy(state_dict)
    for group in plain["param_groups"]:
        group.pop("param_names", None)
    return plain
