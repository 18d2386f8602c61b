"""Param groups, copies and state dicts that are checked completely before anything is taken up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.ranks.collectives import mesh_group, ranks_of
from diagnostics.ranks.spread import is_distributed, local
from hessopt.errors import ModelError
from hessopt.network.arguments import check_group, refuse_meta

StateDict = dict[str, Any]
Group = dict[str, Any]
Groups = Sequence[Group]

FLAGS = ("maximize", "foreach", "capturable", "differentiable", "fused")
"""Options of groups that states of older versions may lack."""


class SavedState(Optimizer):
    """Base class: param groups that are checked, copies, and a state dict of one structure from before the first step.

    :mod:`torch.distributed.checkpoint` loads into the structure of a state dict that it is given, and drops what is not
    in there. Therefore every parameter has an entry with all that it will have: what is not there yet is a zero tensor
    or the like, ``"kept"`` names what is, and ``"shape"`` is the parameter's. In ``state`` itself there is what is.

    A state that differs — of another optimizer, of another network, or incomplete — is refused with the first
    difference, and nothing has changed then.
    """

    _TENSORS: ClassVar[tuple[str, ...]] = ()
    """Names of tensors of a parameter's shape; which of them there will be can depend on arguments."""

    _MARKED: ClassVar[bool] = True
    """Whether ``"kept"`` is needed: an entry that is blank is not the same as none. ``"shape"`` comes with it."""

    _OWN: ClassVar[tuple[str, ...]] = ()
    """Names of attributes that a copy has as well, but for ``model``."""

    model: nn.Module | None

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with options of its own (``lr``, ``weight_decay`` …) if wanted.

        Raises:
            ValueError: an option is out of range, or a parameter is not one that can be trained; nothing is added then.
            ModelError: a parameter has no values, or is spread over processes in a way that is not known; likewise.
        """
        super().add_param_group(param_group)
        try:
            refuse_meta(self.param_groups[-1]["params"])
            self._check_group(self.param_groups[-1])
        except (ValueError, ModelError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: Group) -> None:
        """Raise a ValueError or a ModelError if the last group cannot be taken."""
        check_group(type(self).__name__, group, self.param_groups[0])

    def __getstate__(self) -> StateDict:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in ("model", *self._OWN)}}

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)  # states of older versions

    def _blank(self, number: int, group: Group, p: Tensor, zeros: Callable[[], Tensor]) -> dict[str, Any]:
        """The entry of a parameter before the first step.

        Args:
            number: Of the parameter; the first one has what is everyone's.
            group: Its group.
            p: The parameter.
            zeros: Makes a tensor of its shape.
        """
        raise NotImplementedError

    def state_dict(self) -> StateDict:
        """As in :mod:`torch.optim`, and complete: every parameter has an entry from before the first step on."""
        return with_hooks(self, lambda: self._completed(Optimizer.state_dict(self)))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in :mod:`torch.optim`.

        Raises:
            ValueError: the state is of another optimizer or another network, or incomplete; nothing has changed then.
        """
        # The last one, so it sees what is loaded.
        handle = self.register_load_state_dict_pre_hook(lambda _, state: self._reduced(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _completed(self, state: StateDict) -> StateDict:
        entries = dict(state["state"])
        for number, (group, p) in enumerate(members(self)):
            own = entries.get(number, {})
            blank = self._blank(number, group, p, lambda p=p: torch.zeros_like(p))  # type: ignore[misc]
            marks = {"kept": sorted(own), "shape": list(p.shape)} if self._MARKED else {}
            entries[number] = {**blank, **own, **marks}
        return {**state, "state": entries}

    def _reduced(self, state: StateDict) -> StateDict:
        """What :meth:`_completed` made, without what is not there yet; checked."""
        entries = dict(state["state"])
        for number, (key, group, p) in enumerate(check_groups(self, state)):
            if number and key not in entries and not p.requires_grad:
                continue
            blank = self._blank(number, group, p, lambda p=p: p)  # type: ignore[misc]
            shapes = {name: p.shape if value is p else None for name, value in blank.items()}
            allowed = {"kept": None, "shape": None, **dict.fromkeys(self._TENSORS, p.shape), **shapes}
            name = name_of(self, number)
            own = entries.get(key)
            required = own.get("kept", shapes) if isinstance(own, dict) else ()
            own = check_entry(type(self).__name__, name, own, allowed, required)
            if list(own.get("shape", p.shape)) != list(p.shape):
                raise ValueError(
                    f"the state is of a network whose {name} has shape {tuple(own['shape'])} instead of "
                    f"{tuple(p.shape)}. Nothing was loaded."
                )
            entries[key] = {entry: own[entry] for entry in own.get("kept", own)}
        return {**state, "state": {key: own for key, own in entries.items() if own != {}}}


def with_hooks(optimizer: Optimizer, make: Callable[[], StateDict]) -> StateDict:
    """The state dict that ``make`` builds on :mod:`torch.optim`'s, seen by post-hooks when it is complete."""
    hooks = optimizer._optimizer_state_dict_post_hooks
    optimizer._optimizer_state_dict_post_hooks = type(hooks)()
    try:
        state = make()
    finally:
        optimizer._optimizer_state_dict_post_hooks = hooks
    for hook in hooks.values():
        changed = hook(optimizer, state)
        state = state if changed is None else changed
    return state


def asks_for_state(optimizer: Optimizer, closure: object) -> bool:
    """Whether this is the step by which :mod:`torch.distributed.checkpoint` makes the state of a fresh optimizer.

    It has no closure, no learning rate, and gradients that are zero: nothing is to be moved. Costs nothing elsewhere.
    """
    if closure is not None or optimizer.state or any(float(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    trained = [p for _, p in members(optimizer) if p.requires_grad]
    nothing = all(p.grad is not None and not local(p.grad).any() for p in trained)
    if any(is_distributed(p) for p in trained):  # of which another process may have a part that is not zero
        flag = torch.tensor(nothing, device=trained[0].device)
        return bool(ranks_of(group=mesh_group(trained)).all(flag))
    return nothing


def members(optimizer: Optimizer) -> list[tuple[Group, Tensor]]:
    """All parameters with their groups."""
    return [(group, p) for group in optimizer.param_groups for p in group["params"]]


def name_of(optimizer: Optimizer, number: int) -> str:
    """What to call a parameter in messages: its name where that is known, else its number; and its shape."""
    names = [name for g in optimizer.param_groups for name in g.get("param_names", [None] * len(g["params"]))]
    p = members(optimizer)[number][1]
    model = getattr(optimizer, "model", None)
    known = {} if model is None else {id(q): name for name, q in model.named_parameters()}
    name = names[number] or known.get(id(p))
    return f"parameter {name!r}" if name else f"parameter {number} of shape {tuple(p.shape)}"


def check_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> list[tuple[Any, Group, Tensor]]:
    """The keys of the parameters in a state dict, with their groups and themselves.

    Raises:
        ValueError: the groups are of other sizes, or have the options of another optimizer.
    """
    owner = type(optimizer).__name__
    if "state" not in state or "param_groups" not in state:
        missing = "state" if "state" not in state else "param_groups"
        raise ValueError(f"the state dict lacks {missing!r}; there are {sorted(map(str, state))}. Nothing was loaded.")
    saved, own = state["param_groups"], optimizer.param_groups
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state has param groups of {sizes[0]} parameters, and {owner} has {sizes[1]}: it is of another "
            "network, or of other groups. Nothing was loaded."
        )
    for number, (theirs, mine) in enumerate(zip(saved, own, strict=True)):
        missing_options = [name for name in optimizer.defaults if name not in theirs and name not in FLAGS]
        foreign = [name for name in theirs if name not in mine and name in _options() and name not in FLAGS]
        if missing_options or foreign:
            what = f"lacks {missing_options[0]!r}" if missing_options else f"has {foreign[0]!r}"
            raise ValueError(
                f"param group {number} of the state {what}, unlike those of {owner}: it is another optimizer's. "
                "Nothing was loaded."
            )
    keys = [key for group in saved for key in group["params"]]
    return [(key, group, p) for key, (group, p) in zip(keys, members(optimizer), strict=True)]


def check_entry(owner: str, name: str, own: Any, allowed: Mapping[str, Any], required: Iterable[str]) -> dict[str, Any]:
    """The state of one parameter.

    Args:
        owner: The optimizer's name.
        name: The parameter's.
        own: The state.
        allowed: Names of what it may have; with the shapes of tensors, or None for anything.
        required: Names of what it must have.

    Raises:
        ValueError: it has something else, or lacks something.
    """
    if not isinstance(own, dict):
        raise ValueError(f"the state has no entry for {name}, which {owner} trains. Nothing was loaded.")
    foreign = [str(entry) for entry in own if entry not in allowed]
    missing = [entry for entry in required if entry not in own]
    if foreign or missing:
        what = f"has {foreign[0]!r}, which {owner} does not keep" if foreign else f"lacks {missing[0]!r}"
        raise ValueError(
            f"the state of {name} {what}: it is another optimizer's, or of other arguments, or incomplete. Nothing was "
            "loaded."
        )
    for entry, value in own.items():
        shape = allowed[entry]
        if shape is not None:
            check_shape(f"{entry!r} of {name}", value, shape)
    return own


def check_shape(what: str, value: Any, shape: Sequence[int]) -> None:
    """Raise a ValueError unless the value is a tensor of this shape; ``what`` names it."""
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if found != tuple(shape):
        raise ValueError(
            f"in the state {what} is {found} and must be {tuple(shape)}: it is another network's. Nothing was loaded."
        )


@cache
def _options() -> frozenset[str]:
    """Names of the options of all optimizers of :mod:`torch.optim`."""
    classes: Iterable[type] = (c for c in vars(torch.optim).values() if inspect.isclass(c) and issubclass(c, Optimizer))
    return frozenset(name for c in classes for name in inspect.signature(c).parameters) - {"params"}
