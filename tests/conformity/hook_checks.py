"""Checks of hooks on steps and on state dicts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.conformity.checks import check, each
from tests.conformity.optimizer_infos import Subject, Task


def _hooked(subject: Subject, device: torch.device) -> Optimizer:
    task = Task(device)
    return subject.build(task.parameters(), task.net)


def _mark(optimizer: Optimizer) -> None:
    optimizer.state["test"] = 1


def _unmark(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    state["marked"] = state["state"].pop("test", None) is not None
    return state


def _set_2(optimizer: Optimizer, state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = 0.002


def _return_3(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    other = copy.deepcopy(state)
    other["param_groups"][0]["lr"] = 0.003
    return other


def _look(optimizer: Optimizer) -> None:
    optimizer.state["saw 3"] = optimizer.param_groups[0]["lr"] == 0.003
    optimizer.state["looked"] = True


@check()
def test_state_dict_pre_hook(subject: Subject, device: torch.device) -> None:
    optimizer = _hooked(subject, device)
    optimizer.register_state_dict_pre_hook(_mark)
    assert optimizer.state_dict()["state"]["test"] == 1


@check()
def test_state_dict_post_hook(subject: Subject, device: torch.device) -> None:
    optimizer = _hooked(subject, device)
    optimizer.register_state_dict_post_hook(_unmark)
    assert optimizer.state_dict()["marked"] is False


@check()
def test_state_dict_pre_post_hook(subject: Subject, device: torch.device) -> None:
    optimizer = _hooked(subject, device)
    optimizer.register_state_dict_pre_hook(_mark)
    optimizer.register_state_dict_post_hook(_unmark)
    state = optimizer.state_dict()
    assert "test" not in state["state"]
    assert state["marked"] is True


@check()
def test_load_state_dict_pre_hook_and_prepend(subject: Subject, device: torch.device) -> None:
    optimizer = _hooked(subject, device)
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(_set_2)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(_return_3, prepend=True)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002


@check()
def test_load_state_dict_post_hook(subject: Subject, device: torch.device) -> None:
    optimizer = _hooked(subject, device)
    optimizer.register_load_state_dict_post_hook(_look)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state["saw 3"]
    assert optimizer.state["looked"]


@check()
def test_load_state_dict_pre_post_hook(subject: Subject, device: torch.device) -> None:
    optimizer = _hooked(subject, device)
    optimizer.register_load_state_dict_pre_hook(_return_3)
    optimizer.register_load_state_dict_post_hook(_look)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["saw 3"]
    assert optimizer.state["looked"]


@check(kind=["pre", "post"])
def test_step_hook(subject: Subject, device: torch.device, kind: str) -> None:
    """``test_step_pre_hook`` and ``test_step_post_hook``."""
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        calls: list[Any] = []
        register = getattr(optimizer, f"register_step_{kind}_hook")
        handle = register(lambda *args, calls=calls: calls.append(args))
        for _ in range(2):
            optimizer.step(task.closure(optimizer))
        assert len(calls) == 2
        assert calls[0][0] is optimizer
        handle.remove()
        optimizer.step(task.closure(optimizer))
        assert len(calls) == 2


@check()
def test_step_all_hooks(subject: Subject, device: torch.device) -> None:
    for kwargs, sign in each(subject, device):
        task = Task(device, sign=sign)
        optimizer = subject.build(task.parameters(), task.net, **kwargs)
        plain = SGD(task.parameters())
        events: list[int] = []
        # A wrapper's base is an optimizer of its own, whose step is seen as well.
        mine = (optimizer, plain)
        handles = [
            register_optimizer_step_pre_hook(lambda o, *_, e=events, m=mine: e.append(0) if o in m else None),
            register_optimizer_step_post_hook(lambda o, *_, e=events, m=mine: e.append(3) if o in m else None),
        ]
        for o in mine:
            handles.append(o.register_step_pre_hook(lambda *_, e=events: e.append(1)))
            handles.append(o.register_step_post_hook(lambda *_, e=events: e.append(2)))
        optimizer.step(task.closure(optimizer))
        plain.step(task.closure(optimizer))
        optimizer.step(task.closure(optimizer))
        assert events == [0, 1, 2, 3] * 3
        for handle in handles:
            handle.remove()
        optimizer.step(task.closure(optimizer))
        assert len(events) == 12
