"""The step of :class:`hessopt.BandedNewton`: from the closure to the new parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hessopt.banded.bandwidth import AutoBandwidth, bandwidth_cliques
from hessopt.banded.damped_step import DampedStep, line_step, search_step, take_step
from hessopt.banded.linear_solve import least_damping
from hessopt.banded.metric_momentum import MomentumSolve
from hessopt.banded.quadratic_model import QuadraticModel
from hessopt.banded.rows import NO_BACKWARD, AnyClosure, RowChoice, Rows, Subset
from hessopt.banded.space import Space, SpaceChoice
from hessopt.banded.step_cost import FEW_GRADIENTS, ROW_FLOOR, CostWarning, gradient_operations
from hessopt.banded.systems import BandedSystem
from hessopt.closure.backward_calls import gradients_of, without_recomputation
from hessopt.closure.finite import refuse_not_finite
from hessopt.closure.protocol import Evaluation
from hessopt.closure.runner import ClosureRunner
from hessopt.errors import ModelError
from hessopt.factors.exact_curvature import ExactCurvature
from hessopt.factors.hessian_factors import forward_distances, hessian_factors
from hessopt.factors.sample_factors import Factor
from hessopt.network.cliques import Bandwidth, Cliques
from hessopt.network.layers import Layer
from hessopt.network.parameter_uses import Use
from hessopt.network.saved_state import Group, Groups
from hessopt.search.damping import NielsenDamping
from hessopt.search.rules import Damped, LineSearch, Search

SEARCH_FLOOR = 50
"""Least damping of a line search, in traces of the Gauss-Newton matrix times the rounding unit. Below, solves fail
every now and then."""

State: TypeAlias = Any  # torch.optim.Optimizer's, a defaultdict by parameter; the first one's has what is everyone's


class ExactStep:
    """Levenberg-Marquardt steps with the maximum-determinant completion of the band.

    Args:
        model: The network.
        bandwidth: k, ``"full"`` or what chooses it.
        space: Where to solve, ``"sample"``, ``"parameter"`` or ``"auto"``.
        curvature: ``"ggn"`` or ``"hessian"``.
        search: λ, and how far to go; None: by the rows.
        memory_limit: Bytes.
        rows: How the rows of a step are drawn, for closures that take them.
    """

    def __init__(
        self,
        model: nn.Module,
        bandwidth: Bandwidth | AutoBandwidth,
        space: Space,
        curvature: str,
        search: Search | None,
        memory_limit: int,
        rows: Rows | None = None,
    ) -> None:
        self.bandwidth, self.search = bandwidth, search
        # |H|'s rows are as many as its columns: nothing would be gained in their space, and digits lost.
        self._space = SpaceChoice("parameter" if curvature == "hessian" else space, memory_limit)
        self._exact = ExactCurvature(model, memory_limit)
        self._model, self._memory_limit = model, memory_limit
        self._hessian, self._verified = curvature == "hessian", False
        self._cost = CostWarning(self._hessian)
        self._rows = None if rows is None else RowChoice(rows, rows.residuals and search is None)

    def step(self, groups: Groups, state: State, closure: AnyClosure) -> tuple[Tensor, DampedStep]:
        """Change the parameters; returns the loss before, detached, and what happened."""
        parameters = [p for group in groups for p in group["params"]]
        own = state[parameters[0]]
        subset = None if self._rows is None else self._rows.subset(closure, own, parameters[0].device)
        recorder = self._exact.recorder(parameters)
        runner = ClosureRunner(
            closure if subset is None else subset,
            parameters,
            self._model,
            twice_differentiable=self._hessian,
            no_backward=None if subset is None else NO_BACKWARD,
        )
        try:
            with recorder.recording(), without_recomputation():
                evaluation = runner.evaluate()
            layers = self._exact.layers(recorder.uses)
            gradients = _gradients(evaluation, layers, groups)
            distances, factors = self._curvature(evaluation, layers, recorder.uses, gradients[0][0].dtype, groups)
            model = self._quadratic_model(evaluation, layers, gradients, factors, groups)
            settling = self._rows is not None and not self._rows.settled(own)
            gradient = gradient_operations(recorder.uses) if settling or not self._cost.given else 0.0
        finally:
            recorder.forget()
        loss = evaluation.loss.detach()
        del evaluation  # free what is left of the tape before the solves
        follows = self._rows is not None and self._rows.follows(own)
        search = self._search_of(model, follows)
        damping = self._damping(model, search, own)
        system = self._space.system(model, distances, self.bandwidth)
        cliques = self._cliques(distances, model, system, damping.value, own)
        if not self._cost.given:
            rows, size = model.factors[0].size, sum(p.numel() for p in parameters)
            self._cost.check(system.operations(cliques), gradient, rows, size)
        momentum = 0.0 if self._rows is None else self._rows.momentum(own)
        banded = partial(QuadraticModel.step, cliques=cliques, system=system)
        solve = MomentumSolve(model, banded, groups, state, momentum)
        maximize = groups[0]["maximize"]
        if isinstance(search, LineSearch):
            done = line_step(model, solve, runner.trial_loss, loss, damping, adapt=search.adapt, maximize=maximize)
        elif isinstance(search, Damped):
            done = search_step(
                model, solve, runner.trial_loss, loss, damping, max_rejections=search.max_rejections, maximize=maximize
            )
        else:
            done = take_step(model, solve, loss, damping.value)
        solve.keep(done.length)
        own["step"] = own.get("step", 0) + 1
        own.update(damping.state_dict())
        if subset is not None:
            if settling:
                self._settle_rows(subset, own, model, cliques, gradient, loss)
            done = self._look_at_all_rows(closure, runner, groups, own, replace(done, rows=len(subset.rows)))
        return loss, done

    def _settle_rows(
        self,
        subset: Subset,
        own: dict[str, Any],
        model: QuadraticModel,
        cliques: Cliques,
        gradient: float,
        loss: Tensor,
    ) -> None:
        """Choose the number of rows to go on with, by what the first step's gradient took."""
        assert self._rows is not None
        count = len(subset.rows)
        outputs = model.factors[0].size // count

        def affordable(rows: int) -> bool:
            operations = self._space.operations(rows * outputs, model, cliques)
            return operations <= max(FEW_GRADIENTS * gradient * rows / count, ROW_FLOOR)

        self._rows.settle(own, loss, affordable)

    def _look_at_all_rows(
        self, closure: AnyClosure, runner: ClosureRunner, groups: Groups, own: dict[str, Any], done: DampedStep
    ) -> DampedStep:
        """Evaluate the objective on all rows if it is time."""
        assert self._rows is not None
        whole = self._rows.whole(closure, own, groups[0]["params"][0].device)
        if whole is None:
            return done
        runner.closure = whole
        loss = runner.trial_loss()
        assert whole.squares is not None
        if self._rows.learn(own, loss + _penalty(groups), whole.squares.to(groups[0]["params"][0].dtype)):
            del own["damping"], own["growth"]  # the line search's, which may be next to nothing
        return replace(done, whole_loss=loss, closure_runs=done.closure_runs + 1)

    def _curvature(
        self,
        evaluation: Evaluation,
        layers: Sequence[Layer],
        uses: Sequence[Use],
        dtype: torch.dtype,
        groups: Groups,
    ) -> tuple[NDArray[np.float64], Sequence[Factor]]:
        """Distances of the layers, and their factors."""
        if not self._hessian:
            structure = self._exact.structure(evaluation, layers, uses)
            factors = self._exact.factors(evaluation, layers, uses, structure.rows, _sign(groups[0]), dtype)
            return structure.distances, factors
        rows = hessian_factors(
            evaluation.loss, layers, dtype, memory_limit=self._memory_limit, verify=not self._verified
        )
        self._verified = True
        return forward_distances(evaluation, layers, uses), rows

    def _search_of(self, model: QuadraticModel, follows: bool) -> Search:
        """The search, or that of the rows: undamped steps that fit few of them exactly want lengths rather than λ.

        Where draws follow the residuals, steps are damped.

        Where the rows are about as many as the parameters, undamped steps are ill-conditioned.
        """
        if self.search is not None:
            return self.search
        parameters = sum(p.numel() for own in model.parameters for p in own)
        few = self._rows is not None and not follows and 2 * model.factors[0].size <= parameters
        return LineSearch() if few else Damped()

    def _damping(self, model: QuadraticModel, search: Search, state: dict[str, Any]) -> NielsenDamping:
        least = least_damping(model.factors, residuals=model.residuals is not None)
        start = search.start()
        minimum = min(max(start.minimum, least), start.maximum)
        damping = replace(start, value=max(start.value, minimum), minimum=minimum)
        if isinstance(search, LineSearch) and (search.adapt or search.damping is None):
            floor = SEARCH_FLOOR * torch.finfo(model.gradients[0][0].dtype).eps * model.trace()
            damping.minimum = min(max(floor, minimum), damping.maximum)
            damping.value = max(damping.value, damping.minimum)
            if not search.adapt:
                return damping
        if "damping" in state:
            damping.load_state_dict(state)
        return damping

    def _cliques(
        self,
        distances: NDArray[np.float64],
        model: QuadraticModel,
        system: BandedSystem,
        damping: float,
        state: dict[str, Any],
    ) -> Cliques:
        """Cliques of this step's bandwidth, which is chosen first if it is time."""
        if not isinstance(self.bandwidth, AutoBandwidth):
            return bandwidth_cliques(distances, self.bandwidth)
        chosen = state["bandwidth"] = self.bandwidth.choose(state, distances, model, system, damping)
        return bandwidth_cliques(distances, chosen)

    def _quadratic_model(
        self,
        evaluation: Evaluation,
        layers: Sequence[Layer],
        gradients: list[list[Tensor]],
        factors: Sequence[Factor],
        groups: Groups,
    ) -> QuadraticModel:
        dtype, group_of = gradients[0][0].dtype, _group_of(groups)
        return QuadraticModel(
            parameters=[layer.parameters for layer in layers],
            factors=factors,
            gradients=gradients,
            lr=[[float(group_of[p]["lr"]) for p in layer.parameters] for layer in layers],
            weight_decay=[[float(group_of[p]["weight_decay"]) for p in layer.parameters] for layer in layers],
            residuals=None if self._hessian else _residuals(evaluation, dtype, groups),
        )


def _residuals(evaluation: Evaluation, dtype: torch.dtype, groups: Groups) -> Tensor | None:
    """The residuals in the order of the factors' rows, if the gradient is that of their squares alone."""
    decays = any(group["weight_decay"] for group in groups)
    if not evaluation.is_least_squares or evaluation.backward_called or decays:
        return None
    residuals = evaluation.output.detach().to(dtype)
    return residuals.reshape(len(residuals), -1).T.reshape(-1)


def _gradients(evaluation: Evaluation, layers: Sequence[Layer], groups: Groups) -> list[list[Tensor]]:
    """Gradient of the objective (to be minimized) for each layer."""
    parameters = [p for layer in layers for p in layer.parameters]
    slopes = (
        [p.grad for p in parameters]
        if evaluation.backward_called
        else gradients_of(evaluation.loss, parameters, retain_graph=True)
    )
    group_of = _group_of(groups)
    # One dtype for all, at least float32: there is no Cholesky factorization in half precision.
    dtype = reduce(torch.promote_types, (t.dtype for t in [*parameters, evaluation.loss]), torch.float32)
    gradients: dict[Tensor, Tensor] = {}
    for p, slope in zip(parameters, slopes, strict=True):
        if slope is not None and slope.layout != torch.strided:
            raise ModelError(
                f"a parameter of shape {tuple(p.shape)} has a sparse gradient, of which there is no Jacobian; "
                "build its layer with sparse=False."
            )
        group = group_of[p]
        decay = group["weight_decay"] * p.detach().to(dtype)
        gradients[p] = decay if slope is None else decay + _sign(group) * slope.detach().to(dtype)
    refuse_not_finite(list(gradients.values()), list(gradients))
    return [[gradients[p] for p in layer.parameters] for layer in layers]


@torch.no_grad()
def _penalty(groups: Groups) -> float:
    """``½ Σ ω θ²``."""
    terms = [g["weight_decay"] / 2 * p.square().sum() for g in groups if g["weight_decay"] for p in g["params"]]
    return float(torch.stack(terms).sum()) if terms else 0.0


def _group_of(groups: Groups) -> dict[Tensor, Group]:
    return {p: group for group in groups for p in group["params"]}


def _sign(group: Group) -> int:
    return -1 if group["maximize"] else 1
