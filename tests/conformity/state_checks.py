"""Checks of state: saved, loaded, copied, by name, from older versions and from other devices."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.conformity.checks import assert_equal, check, each, same_state, without_names
from tests.conformity.optimizer_infos import Subject, Task, named


@check(is_named_optim0=[False, True], is_named_optim1=[False, True])
def test_state_dict_deterministic(
    subject: Subject, device: torch.device, is_named_optim0: bool, is_named_optim1: bool
) -> None:
    for kwargs, sign in each(subject, device, all_inputs=is_named_optim0 == is_named_optim1):
        task = Task(device, sign=sign)
        optimizer = subject.build(named(task.parameters(), is_named_optim0), task.net, **kwargs)
        for _ in range(10):
            optimizer.step(task.closure(optimizer))
        other = task.clone()
        second = subject.build(named(other.parameters(), is_named_optim1), other.net, **copy.deepcopy(kwargs))
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(10):
            optimizer.step(task.closure(optimizer))
            second.step(other.closure(second))
            assert_equal(task.parameters(), other.parameters())
        assert same_state(without_names(optimizer.state_dict()), without_names(second.state_dict()))
        second.param_groups.extend(second.param_groups)
        twice = without_names(second.state_dict())["param_groups"]
        assert same_state(without_names(optimizer.state_dict())["param_groups"][-1], twice[-1])


def _network(subject: Subject, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Torch's convolution with batch normalization, or what is fully connected."""
    torch.manual_seed(1)
    if subject.needs_linear:
        net = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2))
        return net.to(device), torch.rand(8, 4, device=device)
    net = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
    return net.to(device), torch.rand(1, 4, 16, 16, device=device)


def _linear_loss(net: nn.Module, x: Tensor, optimizer: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).sum()
        loss.backward()
        return loss

    return closure


@check()
def test_can_load_older_state_dict(subject: Subject, device: torch.device) -> None:
    for kwargs, _ in each(subject, device):
        net, x = _network(subject, device)
        optimizer = subject.build(net.parameters(), net, **kwargs)
        closure = _linear_loss(net, x, optimizer)
        for _ in range(3):
            optimizer.step(closure)
        older = copy.deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            for flag in subject.info.not_og_supported_flags:
                group.pop(flag, None)
        optimizer.load_state_dict(older)
        optimizer.step(closure)


@check(is_named_optim0=[False, True], is_named_optim1=[False, True])
def test_can_load_from_to_named_state_dict(
    subject: Subject, device: torch.device, is_named_optim0: bool, is_named_optim1: bool
) -> None:
    for kwargs, _ in each(subject, device, all_inputs=is_named_optim0 and not is_named_optim1):
        net, x = _network(subject, device)
        first = subject.build(net.named_parameters() if is_named_optim0 else net.parameters(), net, **kwargs)
        for _ in range(3):
            first.step(_linear_loss(net, x, first))
        second = subject.build(
            net.named_parameters() if is_named_optim1 else net.parameters(), net, **copy.deepcopy(kwargs)
        )
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.step(_linear_loss(net, x, second))
        if is_named_optim0 or is_named_optim1:
            assert second.state_dict()["param_groups"][0]["param_names"] == [n for n, _ in net.named_parameters()]


@check(is_named_optim=[False, True])
def test_save_load_equality_with_weights_only(subject: Subject, device: torch.device, is_named_optim: bool) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(named(task.parameters(), is_named_optim), task.net, **kwargs)
        for _ in range(3):
            optimizer.step(task.closure(optimizer))
        state = optimizer.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        for weights_only in (False, True):
            buffer.seek(0)
            assert same_state(torch.load(buffer, weights_only=weights_only), state)


@check()
def test_load_nontensor_step(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        for _ in range(3):
            optimizer.step(task.closure(optimizer))
        state = copy.deepcopy(optimizer.state_dict())
        for own in state["state"].values():
            if isinstance(own.get("step"), Tensor):
                own["step"] = own["step"].item()
        optimizer.load_state_dict(state)
        optimizer.step(task.closure(optimizer))


@check()
def test_state_dict_with_cuda_params(subject: Subject, device: torch.device) -> None:
    """State of a run on the CPU goes on on the device of the parameters."""
    for kwargs, sign in each(subject, torch.device("cpu")):
        task = Task(torch.device("cpu"), dtype=torch.float64, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        for _ in range(3):
            optimizer.step(task.closure(optimizer))
        there = task.clone()
        there.net.to(device)
        there.x = there.x.to(device)
        second = subject.build(there.parameters(), there.net, **copy.deepcopy(kwargs))
        state = copy.deepcopy(optimizer.state_dict())
        second.load_state_dict(state)
        assert same_state(state, optimizer.state_dict())
        for _ in range(5):
            optimizer.step(task.closure(optimizer))
            second.step(there.closure(second))
            torch.testing.assert_close(task.parameters(), [p.cpu() for p in there.parameters()], rtol=1e-7, atol=1e-9)


@check()
def test_deepcopy_copies_all_public_attrs(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        for _ in range(3):
            optimizer.step(task.closure(optimizer))
        copied = copy.deepcopy(optimizer)
        public = [{name for name in o.__dict__ if not name.startswith("_")} for o in (optimizer, copied)]
        assert public[0] == public[1]
        assert same_state(optimizer.state_dict(), copied.state_dict())


@check(way=["deepcopy", "pickle"])
def test_copies_go_on_alike(subject: Subject, device: torch.device, way: str) -> None:
    """Ours: network and optimizer together, copied or pickled, take the same steps as the original."""
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        for _ in range(3):
            optimizer.step(task.closure(optimizer))
        pair = (task, optimizer)
        other, second = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        for _ in range(3):
            optimizer.step(task.closure(optimizer))
            second.step(other.closure(second))
        assert_equal(task.parameters(), other.parameters())
        assert same_state(optimizer.state_dict(), second.state_dict())


@check()
def test_non_empty_state(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        optimizer.step(task.closure(optimizer))
        state = optimizer.state_dict()
        assert state["state"] or state.keys() - {"state", "param_groups"}  # a wrapper's own
        for own in optimizer.state.values():
            assert len(own) > 0
