"""SpectralNewton in the coordinates of the Kronecker-factored curvature."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diagnostics.ranks.spread import is_distributed, local
from hessopt.averages.causes import refuse_scaler
from hessopt.averages.evaluation import evaluate
from hessopt.averages.options import Loss, check_empirical, declared_loss
from hessopt.averages.recorder import check_strided
from hessopt.averages.sharded import fill, part_of, whole, zeros_of
from hessopt.checks import check_choice, check_count, check_type
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.protocol import Closure
from hessopt.errors import ClosureError
from hessopt.network.arguments import Params
from hessopt.network.layerwise import LayerwiseOptimizer
from hessopt.network.saved_state import Group, StateDict, asks_for_state, members, name_of
from hessopt.spectral.engine import FIXED, Move, SpectralEngine
from hessopt.spectral.iterate_average import IterateAverage
from hessopt.spectral.optimizer import SpectralNewton
from hessopt.spectral.options import AdamWPart, CurvatureLengths, KroneckerCoordinates, Momentum

_log = logging.getLogger(__name__)


class KroneckerSpectralNewton(SpectralNewton, LayerwiseOptimizer, coordinates=KroneckerCoordinates):
    """The kind of :class:`hessopt.SpectralNewton` that is made without ``coordinates=``; documented there."""

    _OWN = ("loss", "coordinates", "lengths", "momentum", "power", "adamw", "accumulate", "gradient_norm")
    _SHARDED = True
    _TENSORS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "average")
    _ENGINE: ClassVar[type[SpectralEngine]] = SpectralEngine

    def __init__(
        self,
        params: Params,
        loss: Loss | None = None,
        lr: float | Tensor | None = None,
        *,
        model: nn.Module | None = None,
        coordinates: KroneckerCoordinates | None = None,
        step_lengths: Literal["curvature", "fixed"] | CurvatureLengths = "curvature",
        momentum: float | Momentum | None = None,
        weight_decay: float = 0.0,
        average: float | None = 8,
        maximize: bool = False,
        adamw: AdamWPart | None = None,
        accumulate: int = 1,
    ) -> None:
        if isinstance(loss, int | float):
            raise TypeError(
                f"the second argument is the loss, got {loss!r}: pass a learning rate by name, lr={loss!r}."
            )
        self.coordinates = KroneckerCoordinates() if coordinates is None else coordinates
        if not isinstance(step_lengths, CurvatureLengths):
            check_choice("step_lengths", step_lengths, ("curvature", "fixed"), " or a hessopt.CurvatureLengths")
            self.lengths = None if step_lengths == "fixed" else CurvatureLengths()
        else:
            self.lengths = step_lengths
        if momentum is None or isinstance(momentum, Momentum):
            self.momentum = momentum or Momentum()
        else:
            self.momentum = Momentum(momentum)
        if average is not None and not 0 < average < float("inf"):
            raise ValueError(f"average must be positive and finite, or None for none, got {average!r}.")
        self.adamw = AdamWPart(betas=(0.9, 0.99)) if adamw is None else adamw
        check_type("adamw", self.adamw, AdamWPart)
        check_count("accumulate", accumulate)
        self.accumulate = accumulate
        self.loss, self.power = declared_loss(loss), average
        check_empirical(self.coordinates.curvature, self.loss, self.coordinates.averages)
        self.gradient_norm: float | None = None
        usual = 1.0 if self.lengths is not None else FIXED
        defaults = {"lr": usual if lr is None else lr, "weight_decay": weight_decay, "maximize": maximize}
        LayerwiseOptimizer.__init__(self, params, model, defaults)
        self._attach()

    def _attach(self, *, closure: bool = False) -> None:
        """The engine, and with it hooks; the average starts anew."""
        engine = self.__dict__.get("_engine")
        if engine is not None:
            engine.detach()
        self._engine = self._ENGINE(
            self.model,
            self._parameters(),
            self.loss,
            self.coordinates,
            self.momentum,
            self.lengths,
            self.adamw,
            inputs_only=self._inputs_only(closure),
            accumulate=self.accumulate,
            group=self._group,
        )
        self._average = None if self.power is None else IterateAverage(self._engine.parameters, self.power)

    def _inputs_only(self, closure: bool) -> bool:
        """Whether there are no output columns, without or with closures."""
        return self.loss is None and not closure and self.coordinates.curvature != "empirical"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks; if so, it leaves the gradients scaled and marks itself here, so it can be refused."""
        return self._engine.gathering is not None and self._engine.gathering.slope_is_missing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the network; averages start anew."""
        if "_engine" in self.__dict__:
            self.train()
        super().add_param_group(param_group)
        if "_engine" in self.__dict__:  # not there yet in the constructor
            self._attach()

    def eval(self) -> None:
        """Have the network hold the average of the iterates, if there is one: to evaluate and to save it."""
        if self._average is not None:
            self._average.swap(True)

    def train(self) -> None:
        """Have the network hold the iterates again: to train it."""
        if self._average is not None:
            self._average.swap(False)

    @property
    def step_lengths(self) -> dict[str, float]:
        """``η s`` of each layer as last used, by its name; empty before the first step."""
        return self._engine.step_lengths

    def report(self) -> dict[str, str]:
        """How each parameter is treated, by its name in the network.

        Beside them ``"left out"``: steps that were not finite, and ``"bandwidth"``: an automatic one, as last measured.
        """
        return self._engine.report({p: name for name, p in self.model.named_parameters()})

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Evaluates the loss of this step's batch, see :mod:`hessopt.closure.protocol`. Not needed where the
                loss is declared; without it nothing waits for the device but the first update of the averages and the
                refreshes of powers.

        Returns:
            The loss before the step, detached; None without a closure.

        Raises:
            ClosureError: the network holds the average (``optimizer.train()`` is missing); or the closure does not give
                a finite, differentiable loss; or the network was not called since the last step.
            ModelError: the output or the loss cannot be treated, or a gradient is sparse; or several processes do
                not begin alike, or drift apart (:func:`hessopt.separate_networks`).
            NotConvexError: the loss is not convex in the output (concave, if maximizing).

        In every one of these cases, and where the step is interrupted, the parameters are as they were.
        """
        if asks_for_state(self, closure):
            return None
        self._refuse_join()
        refuse_scaler(self)
        if self._average is not None and self._average.shown:
            raise ClosureError("the network holds the average of the iterates: call optimizer.train() before training.")
        with AllOrNothing():
            return self._step(closure)

    def _step(self, closure: Closure | None) -> Tensor | None:
        added = any(p.requires_grad for p in self._engine.untrained)
        fresh = self._engine.steps == 0 and self._engine.inputs_only
        if closure is not None and (added or fresh):
            self._attach(closure=True)
        if fresh and closure is None:
            _log.warning(
                "SpectralNewton: the loss is not known, so curvature is that of the layers' inputs alone, and step "
                "lengths are fixed at %s times lr. Declare it, loss=criterion, or pass a closure.", FIXED
            )  # fmt: skip
        engine, loss, norm = self._engine, None, None
        gradients = [p.grad for p in engine.parameters]
        sign = -1 if self.param_groups[0]["maximize"] else 1
        if engine.gathering is not None:
            engine.gathering.seeds.sign = sign
        if closure is not None:
            found = evaluate(engine.gathering, self._ranks, self.model, closure, self._parameters(), engine.parameters)
            loss, gradients, norm = found.loss, found.gradients, found.norm
        else:
            check_strided(gradients)
            gradients = [None if g is None else whole(g) for g in gradients]
        self._check_start(gradients, engine.steps)
        known = {
            p: sign * g if sign < 0 else g for p, g in zip(engine.parameters, gradients, strict=True) if g is not None
        }
        decayed = any(group["weight_decay"] for group in self.param_groups)
        self._write(engine.move(known, decayed=decayed))
        self.gradient_norm = norm
        if added and closure is None:
            self._attach()  # the parameters that were added are trained from the next step on
        return loss

    @torch.no_grad()
    def _write(self, move: Move) -> None:
        """Change parameters and state: an interrupt finds both changed, or neither.

        Parameters are written by one call; by their version one sees whether that has been.
        """
        if not move.parameters:
            return
        parameters, changes, rate = move.parameters, move.changes, -float(self.param_groups[0]["lr"])
        if any(is_distributed(p) for p in parameters):
            changes = [part_of(d, p) for p, d in zip(parameters, changes, strict=True)]
            parameters = [local(p) for p in parameters]
        if move.rates or len(self.param_groups) > 1:
            changes, rate = self._by_group(move, parameters, changes)
        if any(d.dtype != p.dtype for p, d in zip(parameters, changes, strict=True)):
            changes = [d.to(p.dtype) for p, d in zip(parameters, changes, strict=True)]
        version = parameters[0]._version
        undo = self._engine.take(move)
        try:
            torch._foreach_add_(parameters, changes, alpha=rate)
        except BaseException:
            if parameters[0]._version == version:
                undo()
            raise
        self._engine.go_on()
        if self._average is not None:
            self._average.update()

    def _by_group(self, move: Move, parameters: Sequence[Tensor], changes: list[Tensor]) -> tuple[list[Tensor], float]:
        """Changes with weight decay and learning rates, and what is to be multiplied with yet.

        Args:
            move: The move.
            parameters: What this process has of its parameters.
            changes: And of its changes.
        """
        options = {p: group for group in self.param_groups for p in group["params"]}
        own = [options[p] for p in move.parameters]
        if move.rates:
            changes = [
                d + p.to(d.dtype) * (rate * group["weight_decay"]) if group["weight_decay"] else d
                for p, d, rate, group in zip(parameters, changes, move.rates, own, strict=True)
            ]
        rates = [-float(group["lr"]) for group in own]
        if all(rate == rates[0] for rate in rates):
            return changes, rates[0]
        return list(torch._foreach_mul(changes, rates)), 1.0

    def __getstate__(self) -> StateDict:
        return {**super().__getstate__(), "_saved": self._saved()}

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_saved"})
        if "_engine" not in self.__dict__:  # a copy, not load_state_dict
            shared, own = state["_saved"]
            self._attach(closure=shared["closure"])
            self._take(shared, own)

    def _saved(self) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
        """What is everyone's, and of each parameter its own."""
        engine, average = self._engine, self._average
        trained = set(engine.parameters)
        own: list[dict[str, Tensor]] = [engine.state_of(p) if p in trained else {} for _, p in members(self)]
        if average is not None and average.steps:
            others = dict(zip(average.parameters, average.others, strict=True))
            own = [
                {**entry, "average": others[p]} if p in others else entry
                for entry, (_, p) in zip(own, members(self), strict=True)
            ]
        shared = {
            "engine": engine.state_dict(),
            "closure": not engine.inputs_only,
            "averaged": 0 if average is None else average.steps,
            "shown": average is not None and average.shown,
        }
        return shared, own

    def _take(self, shared: dict[str, Any], own: list[dict[str, Tensor]]) -> None:
        entries = {p: entry for (_, p), entry in zip(members(self), own, strict=True)}
        if self._engine.inputs_only != self._inputs_only(shared["closure"]):
            self._attach(closure=shared["closure"])
        self._engine.load_state_dict(shared["engine"], entries)
        if self._average is not None:
            self._average.steps, self._average.shown = int(shared["averaged"]), bool(shared["shown"])
            with torch.no_grad():
                for p, other in zip(self._average.parameters, self._average.others, strict=True):
                    fill(other, entries[p].get("average", p))

    def _blank(self, number: int, group: Group, p: Tensor, zeros: Callable[[], Tensor]) -> dict[str, Any]:
        shared: dict[str, Any] = {"spectral": None} if number == 0 else {}
        average = {} if self.power is None else {"average": zeros()}
        names = ("exp_avg", "exp_avg_sq") if p in self._engine.others else ("momentum_buffer",)
        return {**shared, **average, **{name: zeros_of(p) if is_distributed(p) else zeros() for name in names}}

    def _completed(self, state: StateDict) -> StateDict:
        shared, own = self._saved()
        entries: dict[Any, Any] = {number: dict(entry) for number, entry in enumerate(own) if entry}
        entries.setdefault(0, {})["spectral"] = shared
        return super()._completed({**state, "state": {**state["state"], **entries}})

    def _reduced(self, state: StateDict) -> StateDict:
        state = super()._reduced(state)
        keys = [key for group in state["param_groups"] for key in group["params"]]
        own = [state["state"].pop(key, {}) for key in keys]
        if "spectral" not in own[0]:
            raise ValueError(f"the state of {name_of(self, 0)} lacks 'spectral', the averages. Nothing was loaded.")
        self._take(own[0].pop("spectral"), own)
        return state
