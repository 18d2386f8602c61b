"""Checks of construction and of what closures may return: errors, no-ops, types."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from hessopt.errors import ClosureError, ModelError
from tests.conformity.checks import assert_equal, check, each
from tests.conformity.optimizer_infos import Subject, Task


@check()
def test_optim_infos_do_not_specify_global_cliquey_kwargs(subject: Subject, device: torch.device) -> None:
    for kwargs, _ in each(subject, device):
        assert not {"foreach", "fused", "differentiable"} & set(kwargs)


@check()
def test_errors(subject: Subject, device: torch.device) -> None:
    for wrong in subject.info.optim_error_inputs_func(device.type, torch.float32):
        params, kwargs = wrong.optimizer_error_input.params, wrong.optimizer_error_input.kwargs
        assert wrong.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        net = nn.Sequential(nn.Linear(1, 1))
        for p in _tensors_in(params):  # a network that owns them
            net.append(nn.Linear(1, 1, bias=False))
            net[-1].weight = p
        if params is None:
            params = list(net.parameters())
        if issubclass(wrong.error_type, Warning):
            with pytest.warns(wrong.error_type, match=wrong.error_regex):
                subject.build(params, net, **kwargs)
        else:
            with pytest.raises(wrong.error_type, match=wrong.error_regex):
                subject.build(params, net, **kwargs)


def _tensors_in(params: Any) -> list[nn.Parameter]:
    if isinstance(params, nn.Parameter):
        return [params]
    if isinstance(params, dict):
        return _tensors_in(params["params"])
    found = [p for entry in params or () for p in (_tensors_in(entry) if not isinstance(entry, str) else [])]
    return list(dict.fromkeys(found))


@check()
def test_step_is_noop_when_params_have_no_grad(subject: Subject, device: torch.device) -> None:
    """Torch's own do nothing; ours cannot know the loss's curvature then, say so, and change nothing."""
    for kwargs, _ in each(subject, device):
        task = Task(device)
        task.net.requires_grad_(False)
        before = copy.deepcopy(task.parameters())
        with pytest.raises((ClosureError, ModelError), match="require"):
            subject.build(task.parameters(), task.net, **kwargs).step(lambda: torch.tensor([1.0], device=device))
        assert_equal(before, task.parameters())


@check()
def test_step_is_noop_for_zero_grads(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        if kwargs.get("weight_decay"):
            continue
        for clear in (True, False):
            task = Task(device, sign=sign)
            before = copy.deepcopy(task.parameters())
            optimizer = subject.build(task.parameters(), task.net, **kwargs)

            def closure(task: Task = task, optimizer: Optimizer = optimizer, clear: bool = clear) -> Tensor:
                if clear:
                    optimizer.zero_grad()
                loss = 0 * task.loss()
                loss.backward()
                return loss

            optimizer.step(closure)
            optimizer.step(closure)
            assert_equal(before, task.parameters())


@check()
def test_optimizer_can_be_printed(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        assert type(optimizer).__name__ in repr(optimizer)
        assert "lr" in str(optimizer)
        optimizer.step(task.closure(optimizer))
        assert "lr" in repr(optimizer)


@check()
def test_second_order_optims_return_consistent_types(subject: Subject, device: torch.device) -> None:
    """Where it moves, and where the gradient is zero; the loss before the step, on no tape."""
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        expected = task.loss().item()
        moved = optimizer.step(task.closure(optimizer))
        with torch.no_grad():
            for p in task.parameters():
                p.zero_()
        still = optimizer.step(task.closure(optimizer))
        assert type(moved) is type(still) is Tensor
        assert not moved.requires_grad
        assert moved.shape == still.shape == ()
        if not isinstance(getattr(optimizer, "last_check", None), type(None)) and optimizer.last_check.escaped:
            continue  # that is another point
        assert moved.item() == pytest.approx(expected, rel=1e-6)
        assert still.item() == 0


@check(returned=["float", "None", "detached", "numpy"])
def test_closure_returns_no_tape(subject: Subject, device: torch.device, returned: str) -> None:
    """As torch's LBFGS takes it: the loss is what backward() was called on. Without that call there is none."""
    kinds = {"float": Tensor.item, "None": lambda _: None, "detached": Tensor.detach, "numpy": _numpy}
    says = {"float": "the number", "None": "returned None", "detached": "no autograd tape", "numpy": "type ndarray"}
    for kwargs, sign in each(subject, device):
        first = Task(device, sign=sign)
        tasks = [first, first.clone(), first.clone()]
        optimizers = [subject.build(task.parameters(), task.net, **kwargs) for task in tasks]

        def closure(number: int, tasks: list[Task] = tasks, optimizers: list[Optimizer] = optimizers) -> Any:
            optimizers[number].zero_grad()
            loss = tasks[number].loss()
            if number < 2:
                loss.backward()
            return loss if number == 0 else kinds[returned](loss)

        before = copy.deepcopy(tasks[2].parameters())
        values = [float(optimizers[number].step(partial(closure, number))) for number in (0, 1)]
        assert values[0] == values[1]
        assert_equal(tasks[0].parameters(), tasks[1].parameters())
        assert any(not torch.equal(p, q) for p, q in zip(before, tasks[1].parameters(), strict=True))
        with pytest.raises(ClosureError, match=f"the closure.*{says[returned]}"):
            optimizers[2].step(partial(closure, 2))
        assert_equal(before, tasks[2].parameters())


def _numpy(loss: Tensor) -> Any:
    return loss.detach().cpu().numpy()


@check(set_to_none=[True, False])
def test_zero_grad(subject: Subject, device: torch.device, set_to_none: bool) -> None:
    task = Task(device)
    optimizer = subject.build(task.parameters(), task.net)
    task.loss().backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in task.parameters())
