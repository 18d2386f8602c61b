"""What optimizers share that wrap another one: its groups, its state, its closure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.ranks.collectives import Ranks, ranks_of
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.backward_calls import gradients_of
from hessopt.closure.finite import gradient_norm
from hessopt.closure.protocol import Closure, Evaluation
from hessopt.closure.runner import ClosureRunner
from hessopt.errors import ModelError
from hessopt.network.arguments import refuse_meta
from hessopt.network.processes import average_gradients, check_start, refuse_spread, unwrapped
from hessopt.network.saved_state import check_entry, check_groups, members, name_of, with_hooks


@runtime_checkable
class RunsClosures(Protocol):
    """An optimizer that takes closures by :mod:`hessopt.closure.protocol` as they are: those of this package."""

    @property
    def gradient_norm(self) -> float | None:
        """‖g‖ over its parameters before the last step; None if no step had a closure."""

    def step(self, closure: Closure | None = None) -> Tensor | None:
        """Take one step; returns the loss before it, if there was a closure."""


class OptimizerWrapper(Optimizer):
    """Base class: param groups, state and defaults are the wrapped optimizer's own, so schedulers take either.

    Subclasses name what they keep in ``_OWN`` (for copies and pickles) and their key in state dicts in ``_KEY``, set
    what they keep between :meth:`_begin` and :meth:`_finish`, and implement ``step``, ``_own_state`` and
    ``_load_own_state``.

    Attributes:
        base: The wrapped optimizer.
        model: The network, whose buffers belong to the loss; or None.
    """

    _OWN: ClassVar[tuple[str, ...]] = ()
    _KEY: ClassVar[str]
    _DENSE: ClassVar[bool] = True  # sparse gradients are refused
    base: Optimizer
    model: nn.Module | None
    _group: Any = None
    _alike = False

    def _begin(self, base: Optimizer, model: nn.Module | None) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}.")
        refuse_meta(p for group in base.param_groups for p in group["params"])
        if getattr(base, "rows", None) is not None:
            raise ValueError(
                f"{type(self).__name__} calls closures itself, without an argument, and cannot be around an optimizer "
                "that draws rows for them. Construct that without rows=, and draw the points of a step in the closure."
            )
        if any(p.is_complex() for group in base.param_groups for p in group["params"]):
            raise ValueError(f"{type(self).__name__} has no complex parameters; use torch.view_as_real.")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        model, self._group = unwrapped(model)
        refuse_spread(type(self).__name__, model, [p for group in base.param_groups for p in group["params"]])
        self._constructing = True
        self.base = base
        self.model = model

    def _finish(self) -> None:
        super().__init__(self.base.param_groups, self.base.defaults)
        self._constructing = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if not self.__dict__.get("_constructing"):
            self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's own."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if not self.__dict__.get("_constructing"):
            self.base.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        if not self.__dict__.get("_constructing"):
            self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; this one's own is in the entry of the first parameter, under a key of its own."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        return with_hooks(self, lambda: self._with_own(self.base.state_dict()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave.

        One of the wrapped optimizer alone goes into ``base.load_state_dict``.

        Raises:
            ValueError: the state is of another optimizer or another network, or incomplete; nothing has changed then.
        """
        state = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        entries, own = self._without_own(state)
        own = copy.deepcopy(own)
        self._check_own_state(own)
        self.base.load_state_dict({**state, "state": entries})
        self._load_own_state(own)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _with_own(self, state: dict[str, Any]) -> dict[str, Any]:
        entries = dict(state["state"])
        for number, (_, p) in enumerate(members(self)):
            theirs = entries.get(number, {})
            mark: dict[str, Any] = {"shape": list(p.shape), "base": sorted(theirs)}
            if number == 0:
                found = {name: value for name, value in self._own_state().items() if value is not None}
                mark |= {**self._blank_own_state(), **found, "kept": sorted(found)}
            entries[number] = {**theirs, self._KEY: mark}
        return {**state, "state": entries}

    def _without_own(self, state: dict[str, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
        """The wrapped optimizer's entries, and this one's own; checked."""
        owner, entries, own = type(self).__name__, dict(state["state"]) if "state" in state else {}, {}
        for number, (key, _, p) in enumerate(check_groups(self, state)):
            if number and key not in entries and not p.requires_grad:
                continue
            name = name_of(self, number)
            if not isinstance(entries.get(key), dict) or self._KEY not in entries[key]:
                raise ValueError(
                    f"the state of {name} lacks {self._KEY!r}, what {owner} itself keeps: it is incomplete, or another "
                    "optimizer's; one of the wrapped optimizer alone goes into `base.load_state_dict`. Nothing was "
                    "loaded."
                )
            theirs = {entry: value for entry, value in entries[key].items() if entry != self._KEY}
            mark = entries[key][self._KEY]
            first = ("kept", *self._own_state()) if number == 0 else ()
            allowed, kept = dict.fromkeys(("shape", "base", *first)), mark.get("kept", ())
            check_entry(owner, f"{self._KEY!r} of {name}", mark, allowed, ("shape", "base", *first[:1], *kept))
            if list(mark["shape"]) != list(p.shape):
                raise ValueError(
                    f"the state is of a network whose {name} has shape {tuple(mark['shape'])} instead of "
                    f"{tuple(p.shape)}. Nothing was loaded."
                )
            check_entry(type(self.base).__name__, name, theirs, dict.fromkeys(mark["base"]), mark["base"])
            if number == 0:
                own = {entry: mark[entry] if entry in mark["kept"] else None for entry in self._own_state()}
            entries[key] = theirs
        return {key: entry for key, entry in entries.items() if entry != {}}, own

    def _own_state(self) -> dict[str, Any]:
        """What is kept, None where there is none yet."""
        raise NotImplementedError

    def _blank_own_state(self) -> dict[str, Any]:
        """What stands for entries that are None, where their shapes are known beforehand."""
        return {}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        """Raise a ValueError unless :meth:`_load_own_state` will do."""

    def _load_own_state(self, own: dict[str, Any]) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "model", *self._OWN)
        return {**{name: self.__dict__[name] for name in names}, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" in state:
            self.__dict__.update(state, _constructing=False)
            super().__setstate__({})
        else:  # from load_state_dict
            self.base.__setstate__(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"

    def _parameters(self) -> list[Tensor]:
        """All of the groups, in their order."""
        return [p for group in self.param_groups for p in group["params"]]

    def _ranks(self) -> Ranks:
        """The processes that train the network, compared once."""
        ranks = ranks_of(group=self._group)
        if not self._alike:
            check_start(type(self).__name__, ranks, self._trained(), [], len(self.state))
            self._alike = ranks.size > 1
        return ranks

    def _trained(self) -> list[Tensor]:
        """Those that require grad."""
        return [p for p in self._parameters() if p.requires_grad]

    def _guard(self, *, changed: bool, names: Sequence[str] = ()) -> AllOrNothing:
        """What restores parameters and state if the step does not end.

        What the wrapped optimizer does in its own step is its own business, unless that runs the closure several times,
        which may end in between.

        Args:
            changed: What the wrapped optimizer does is not the whole step: parameters and state are kept.
            names: Attributes of this one that are restored too.
        """
        if not changed and not isinstance(self.base, torch.optim.LBFGS):
            return AllOrNothing(owner=self, names=names)
        guard = AllOrNothing(self._trained(), state=self.state, owner=self, names=names)
        guard.keep_state()
        return guard

    def _for_base(
        self, closure: Closure, before_base: Callable[[Evaluation, float], None], *, curvature: bool = False
    ) -> Callable[[], Any]:
        """The closure as optimizers of torch.optim expect it: it leaves gradients behind and returns the loss.

        Args:
            closure: See :mod:`hessopt.closure.protocol`.
            before_base: Called after each run, with gradients in ``.grad``, and with their norm.
            curvature: ``before_base`` differentiates the loss again.

        Raises:
            ClosureError: in a run, the loss or a gradient is not finite.
        """
        trained = self._trained()

        def wrapped() -> Tensor:
            ranks = self._ranks()
            runner = ClosureRunner(
                closure, trained, self.model, tape=curvature, twice_differentiable=curvature, ranks=ranks
            )
            evaluation = runner.evaluate()
            if not evaluation.backward_called:
                gradients = gradients_of(evaluation.loss, trained, retain_graph=curvature)
                for p, gradient in zip(trained, gradients, strict=True):
                    p.grad = gradient
            if self._DENSE:
                check_dense_gradients(trained)
            average_gradients(type(self).__name__, ranks, trained)
            norm = gradient_norm([p.grad for p in trained], trained, self.model)
            before_base(evaluation, norm)
            return evaluation.mean_loss

        return wrapped


def check_dense_gradients(parameters: list[Tensor]) -> None:
    """Raise :class:`hessopt.errors.ModelError` if a gradient is sparse."""
    for p in parameters:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise ModelError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, and subspaces of parameters are "
                "dense: use Embedding(…, sparse=False)."
            )
