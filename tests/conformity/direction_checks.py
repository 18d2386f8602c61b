"""Checks of the steps: that they go the right way, with schedulers, groups and frozen parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from tests.conformity.checks import GROUP_OPTIONS, assert_equal, check, each, went_right
from tests.conformity.optimizer_infos import Subject, Task


@check(contiguous=[True, False], with_lrsched=[False, True])
def test_forloop_goes_right_direction(
    subject: Subject, device: torch.device, contiguous: bool, with_lrsched: bool
) -> None:
    for makers in subject.info.scheduler_inputs if with_lrsched else [[]]:
        for kwargs, sign in each(subject, device):
            task = Task(device, contiguous=contiguous, sign=sign)
            optimizer = subject.build(task.parameters(), task.net, **kwargs)
            went_right(task, optimizer, kwargs.get("maximize", False), 20, [make(optimizer) for make in makers])


@check()
def test_param_group_with_lrscheduler_goes_right_direction(subject: Subject, device: torch.device) -> None:
    for makers in subject.info.scheduler_inputs:
        task = Task(device)
        weight, bias = task.parameters()
        optimizer = subject.build([{"params": [weight]}, {"params": [bias], "lr": 0.01}], task.net)
        went_right(task, optimizer, False, 20, [make(optimizer) for make in makers])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.9),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, factor=0.5), lr_scheduler.ExponentialLR(o, gamma=0.9)], [3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.5), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=3, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=20, cycle_momentum=False),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.005, anneal_epochs=3),
}
"""One of each class of torch.optim.lr_scheduler, and SWALR. Cycling the momentum needs one, which ours do not have."""


@check(scheduler=list(SCHEDULERS))
def test_lr_scheduler(subject: Subject, device: torch.device, scheduler: str) -> None:
    """It changes the learning rate, goes the right way, and is resumed from its state."""
    for tensor_lr in (False, True):
        torch.manual_seed(0)
        task = Task(device)
        lr: Any = torch.tensor(0.01) if tensor_lr else 0.01
        optimizer = subject.build(task.parameters(), task.net, lr=lr)
        made = SCHEDULERS[scheduler](optimizer)
        rates, closure = [], task.closure(optimizer)
        initial = closure().item()
        for _ in range(6):
            loss = optimizer.step(closure)
            made.step(loss) if scheduler == "ReduceLROnPlateau" else made.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        assert closure().item() < initial
        assert len({0.01, *rates}) > 1
        other = task.clone()
        second = subject.build(other.parameters(), other.net, lr=copy.deepcopy(lr))
        resumed = SCHEDULERS[scheduler](second)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        resumed.load_state_dict(copy.deepcopy(made.state_dict()))
        for t, o, s in ((task, optimizer, made), (other, second, resumed)):
            loss = o.step(t.closure(o))
            s.step(loss) if scheduler == "ReduceLROnPlateau" else s.step()
        assert_equal(task.parameters(), other.parameters())
        assert float(optimizer.param_groups[0]["lr"]) == float(second.param_groups[0]["lr"])


@check(dimensions=[0, 1])
def test_tensor_lr(subject: Subject, device: torch.device, dimensions: int) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        other = task.clone()
        lr = 0.1
        tensor = torch.tensor(lr) if dimensions == 0 else torch.tensor([lr])
        # The number that is in the tensor: 0.1 is another one in float64.
        optimizer = subject.build(task.parameters(), task.net, **{**kwargs, "lr": tensor.item()})
        with_tensor = subject.build(other.parameters(), other.net, **{**kwargs, "lr": tensor})
        for _ in range(5):
            optimizer.step(task.closure(optimizer))
            with_tensor.step(other.closure(with_tensor))
            torch.testing.assert_close(task.parameters(), other.parameters(), rtol=1e-5, atol=1e-6)


@check()
def test_foreach_matches_forloop(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, dtype=torch.float64, sign=sign)
        other = task.clone()
        for t, foreach in ((task, False), (other, True)):
            optimizer = subject.build(t.parameters(), t.net, **{**copy.deepcopy(kwargs), "foreach": foreach})
            for _ in range(7):
                optimizer.step(t.closure(optimizer))
        torch.testing.assert_close(task.parameters(), other.parameters())


@check()
def test_param_groups_weight_decay(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        weight, bias = task.parameters()
        own = {name: kwargs[name] for name in kwargs if name in GROUP_OPTIONS}
        rest = {name: value for name, value in kwargs.items() if name not in own}
        groups = [{"params": [weight], **own}, {"params": [bias], **copy.deepcopy(own), "weight_decay": 0.0}]
        optimizer = subject.build(groups, task.net, **rest)
        went_right(task, optimizer, kwargs.get("maximize", False), 20, [])


@check()
def test_param_groups_lr(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        weight, bias = task.parameters()
        idle = nn.Linear(5, 2, device=device)
        net = nn.ModuleDict({"used": task.net, "idle": idle})
        before = [p.detach().clone() for p in idle.parameters()]
        own = {name: kwargs[name] for name in kwargs if name in GROUP_OPTIONS}
        rest = {name: value for name, value in kwargs.items() if name not in own}
        own.setdefault("lr", 1e-3)
        # The idle one is in the loss, with a gradient at random, but its learning rate is almost zero.
        groups = [
            {"params": [weight, bias], **own},
            {"params": list(idle.parameters()), "maximize": own.get("maximize", False)},
        ]
        optimizer = subject.build(groups, net, lr=1e-28, **rest)
        slope = torch.randn(1, 2, device=device)

        def closure(
            task: Task = task, net: nn.ModuleDict = net, optimizer: Any = optimizer, slope: Tensor = slope,
            sign: int = sign,
        ) -> Any:  # fmt: skip
            optimizer.zero_grad()
            z = torch.cat([net["used"](task.x), net["idle"](task.x)], dim=1)
            loss = sign * z[:, :10].pow(2).sum() + (slope * z[:, 10:]).sum()
            loss.backward()
            return loss, z

        initial = task.loss().item()
        for _ in range(20):
            optimizer.step(closure)
        final = task.loss().item()
        assert final > initial if kwargs.get("maximize") else final < initial
        torch.testing.assert_close(before, list(idle.parameters()))


@check()
def test_add_param_group(subject: Subject, device: torch.device) -> None:
    """Of ``Optimizer``: defaults are filled in, a tensor alone will do, duplicates are refused."""
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        weight, bias = task.parameters()
        own = {name: kwargs[name] for name in kwargs if name in GROUP_OPTIONS}
        optimizer = subject.build([weight], task.net, **kwargs)
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": weight})
        optimizer.add_param_group({"params": bias, **own})
        assert len(optimizer.param_groups) == len(optimizer.state_dict()["param_groups"]) == 2
        assert float(optimizer.param_groups[1]["lr"]) == float(optimizer.param_groups[0]["lr"])
        before = bias.detach().clone()
        went_right(task, optimizer, kwargs.get("maximize", False), 20, [])
        assert not torch.equal(before, bias)


@check()
def test_parameters_that_need_no_grad(subject: Subject, device: torch.device) -> None:
    """Some of them: they stay, the others are trained."""
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        weight, bias = task.parameters()
        bias.requires_grad_(False)
        before = bias.detach().clone()
        optimizer = subject.build([weight, bias], task.net, **kwargs)
        went_right(task, optimizer, kwargs.get("maximize", False), 20, [])
        assert torch.equal(before, bias)


@check()
def test_freeze_and_unfreeze(subject: Subject, device: torch.device) -> None:
    """A layer frozen for two steps, as in torch's comparison of loops and foreach, and a parameter outside the loss."""
    for kwargs, sign in each(subject, device):
        net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(device)
        x = torch.linspace(0.1, 0.6, 6, device=device).view(3, 2)
        outside = nn.Parameter(torch.ones((), device=device))
        params = [*net.parameters(), *(() if subject.needs_linear else (outside,))]
        optimizer = subject.build(params, net, **kwargs)

        def closure(
            target: float,
            net: nn.Module = net,
            x: Tensor = x,
            optimizer: Optimizer = optimizer,
            sign: int = sign,
        ) -> Tensor:
            optimizer.zero_grad()
            loss = sign * (net(x) - target).square().sum()  # with a minimum at finite parameters
            loss.backward()
            return loss

        for i in range(7):
            net[2].requires_grad_(i not in (3, 4))
            before = [p.detach().clone() for p in net.parameters()]
            # The minimum moves before the last step: a method that has reached it has somewhere to go again.
            optimizer.step(partial(closure, 0.3 if i < 6 else 0.4))
            moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
            assert moved[2:] == [False, False] or i not in (3, 4)
            if i in (0, 6):
                assert all(moved)
        assert outside.item() == 1 or kwargs.get("weight_decay")
