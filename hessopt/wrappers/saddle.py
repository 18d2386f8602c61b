"""Escape from saddle points along negative curvature, around any optimizer of torch.optim."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.estimators.lanczos import ExtremeEigenpairs, extreme_eigenpairs
from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.graph.graph import Graph
from diagnostics.matrix_free.routing import route
from hessopt.checks import check_count
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.finite import refuse_not_finite
from hessopt.closure.loss_hessian import LossHessian
from hessopt.closure.protocol import Closure
from hessopt.closure.runner import ClosureRunner
from hessopt.closure.step_curvature import StepCurvature
from hessopt.errors import ClosureError
from hessopt.network.saved_state import asks_for_state
from hessopt.wrappers.base import OptimizerWrapper, RunsClosures
from hessopt.wrappers.escape import CurvatureCheck, Ray, first_length, ray_direction, search_rays
from hessopt.wrappers.stationarity import Stationarity

_logger = logging.getLogger(__name__)


class SaddleEscape(OptimizerWrapper):
    r"""Wraps an optimizer: near saddle points it first moves along directions of negative curvature.

    .. math::
        H v_i = \lambda_i v_i, \qquad \lambda_1 \le \dots \le \lambda_k < -\tau \|H\|_2 ,\qquad
        d \propto -\sum_i \operatorname{sign}(g^\top v_i)
        \max\Big(\frac{|g^\top v_i|}{|\lambda_i|}, t_0\Big) v_i,\qquad
        \theta \leftarrow \theta + t\,d .

    1. **When.** A check is due at the first step, where the gradient has become small, and where the loss stands still
       (:class:`hessopt.wrappers.stationarity.Stationarity`); it costs one more run of the closure and at most
       ``max_products`` Hessian-vector products. Beyond 1000 gradients' worth, checks that would take more than half as
       much as the steps are put off (``stationarity.put_off`` counts the steps, the first is logged). Other steps are
       those of the wrapped optimizer, at its cost.
    2. **Direction.** The k smallest eigenpairs by Lanczos iterations that start from those of the last check. For one
       direction, d = −sign(gᵀv)·v. For several, it is the saddle-free Newton step in the space of the eigenvectors,
       with ``|λ|`` in place of λ (Dauphin et al. 2014), but at least t₀ along each. τ is relative to ‖H‖₂, because in
       deep linear networks of depth 3 and more H itself vanishes at the origin.
    3. **Length.** From t₀ (1 % of ‖θ‖, at least 0.01) t is doubled while the loss goes down (or stays the same to
       rounding, as it does next to saddles of high order), or cut by 4 until it does.
       Where the slope does not matter at t₀, that is ``|gᵀd| ≤ ¼ t₀ |dᵀHd|``, both signs are tried and the better one
       is taken: at a symmetric saddle the gradient does not tell (Cor. 86).
    4. **Whether.** Only where the gradient is small *relative to curvature*: the safe step of steepest descent, whose
       length is 1/‖H‖₂, gains ``‖g‖² / 2‖H‖₂``, which must be at most the share of the loss that makes a plateau (1 %).
       Then the move is made if it gains more than that, and if ``|gᵀd| ≤ ½ |λ₁ t|``, so that it is curvature and not
       slope that gains it. Negative curvature on a slope, which every network has, is no saddle, and a convex function
       has none. Otherwise the parameters stay as they were, bit for bit.
    5. **Then** the wrapped optimizer takes its step at the new point, with its state for these parameters emptied
       (momentum and second moments of the saddle), if ``reset_state``.

    Param groups, state and defaults are the wrapped optimizer's own, so learning-rate schedulers take either. Groups
    whose learning rate is less than 1e-8 of the largest are not moved.

    Args:
        base: The optimizer to wrap; any, also one that runs its closure several times, like LBFGS.
        model: The network: its buffers (batch statistics) are protected in trials. None: trials are made without.
        directions: k, most eigenvectors of negative curvature to use at once. Default: 1.
        threshold: τ. Default: 1e-4.
        max_products: Hessian-vector products of a check. Default: 40.
        max_trials: Trial evaluations of a check. Default: 40.
        reset_state: Empty the wrapped optimizer's state after an escape. Default: True.
        stationarity: When to check, and what checks may cost beside steps.
        memory_limit: Bytes for the Lanczos basis of a check, which restarts when it is full. Default: 4 GiB.

    Attributes:
        base: The wrapped optimizer.
        last_check: A :class:`CurvatureCheck`, or None before the first.
        escapes: Number of escapes so far.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: an argument is out of range.

    Source:
        Escape along negative eigenvectors with both signs: Cor. 86 of arXiv 2604.11639. ``|H|`` in the Krylov space:
        Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, "Identifying and attacking the saddle point problem in
        high-dimensional non-convex optimization" (2014).

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        >>> for p in model.parameters():
        ...     _ = nn.init.zeros_(p)  # a saddle: the gradient vanishes
        >>> x = torch.eye(3)
        >>> optimizer = SaddleEscape(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (model(x) - x).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> optimizer.last_check.escaped, closure().item() < 2.5
        (True, True)
    """

    _OWN = (
        "directions", "threshold", "max_products", "max_trials", "reset_state", "stationarity", "last_check", "escapes",
        "memory_limit", "_vectors",
    )  # fmt: skip
    _KEY = "saddle_escape"
    _DENSE = False

    def __init__(
        self,
        base: Optimizer,
        *,
        model: nn.Module | None = None,
        directions: int = 1,
        threshold: float = 1e-4,
        max_products: int = 40,
        max_trials: int = 40,
        reset_state: bool = True,
        stationarity: Stationarity | None = None,
        memory_limit: int = 4 * 2**30,
    ) -> None:
        self._begin(base, model)
        for name, value in (("directions", directions), ("max_trials", max_trials)):
            check_count(name, value)
        if max_products < directions + 1:
            raise ValueError(f"max_products must be more than directions ({directions}), got {max_products}.")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is a share of the largest eigenvalue, in [0, 1), got {threshold}.")
        if not memory_limit > 0:
            raise ValueError(f"memory_limit is a number of bytes, got {memory_limit}.")
        self.directions = directions
        self.memory_limit = memory_limit
        self.threshold = threshold
        self.max_products = max_products
        self.max_trials = max_trials
        self.reset_state = reset_state
        self.stationarity = Stationarity() if stationarity is None else stationarity
        self.last_check: CurvatureCheck | None = None
        self.escapes = 0
        self._vectors: Tensor | None = None
        self._finish()

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Check the curvature if that is due, and take a step of the wrapped optimizer.

        Args:
            closure: Evaluates the loss of this step's batch, see :mod:`hessopt.closure.protocol`.

        Returns:
            What the wrapped optimizer returned: the loss before its own step.

        Raises:
            ClosureError: the closure is missing or does not give a finite, differentiable loss with a finite gradient.
            ModelError: several processes train together, and their parameters differ at the first step.
            MemoryBudgetError: not even the least basis fits into ``memory_limit``.

        In these cases, and where the step is interrupted, parameters and state are as they were; but what the wrapped
        optimizer leaves behind if its own step is interrupted is its own business. At steps with a check a copy of the
        parameters is kept.
        """
        if asks_for_state(self, closure):
            self.base.step()
            return torch.tensor(math.nan)
        if closure is None:
            raise ClosureError(
                "SaddleEscape.step() needs a closure: curvature and trial losses cannot be had from `.grad` alone. "
                "Pass a function that returns the loss, with or without calling backward()."
            )
        if not self.stationarity.due:
            if self.stationarity.wanted and self.stationarity.put_off == 0:
                _logger.warning(
                    "curvature checks have cost as much as %d gradients in %d steps: the next one is put off until it "
                    "brings them to at most %g of the steps (Stationarity's overhead)",
                    self.stationarity.spent,
                    self.stationarity.steps,
                    self.stationarity.overhead,
                )
            return self._base_step(closure)
        names = ("last_check", "escapes", "_vectors")
        guard = AllOrNothing(self._moved(), state=self.state, owner=self, names=names)
        guard.undo.append(partial(self.stationarity.load_state_dict, self.stationarity.state_dict()))
        with guard:
            check = self.last_check = self._check(closure)
            self.stationarity.checked(check.escaped, 2 + 2 * check.products + check.evaluations)
            _logger.info("curvature check: %s", check.reason)
            if check.escaped:
                self.escapes += 1
                if self.reset_state:
                    self.base.state.clear()
                else:
                    guard.keep_state()
                return self._base_step(closure)  # or the escape is not made either
        return self._base_step(closure)

    def _base_step(self, closure: Closure) -> Tensor:
        """A step of the wrapped optimizer, watched."""
        base: Any = self.base
        if isinstance(base, RunsClosures):
            with self._guard(changed=False):
                loss = base.step(closure)
            assert loss is not None  # there was a closure
            assert base.gradient_norm is not None
            self.stationarity.observe(float(loss), base.gradient_norm)
            return loss
        seen: list[tuple[float, float]] = []
        watched: Any = self._for_base(closure, lambda run, norm: seen.append((run.mean_loss.item(), norm)))
        with self._guard(changed=False):
            result: Tensor = base.step(watched)
        self.stationarity.observe(*seen[0])
        return result

    def explain(self, graph: Graph) -> dict[str, float]:
        """Which nodes' nonlinearities make the curvature along the last direction of escape: shares of ``vᵀHv``.

        Args:
            graph: ``diagnostics.capture(model, inputs, loss_fn)`` of the same model and batch, *before* the escape or
                near that point; its parameters' names are those of the model.

        Returns:
            ``vᵀ T(u) v`` by node u, and ``vᵀ G v`` under ``"gauss-newton"``; they add up to ``vᵀ H v``.

        Raises:
            RuntimeError: no check has been made yet.
        """
        if self._vectors is None:
            raise RuntimeError("no curvature check has been made yet, so there is no direction to explain.")
        vector, start = self._vectors[:, 0], 0
        tangents: dict[str, Tensor] = {}
        names = {id(p): name for name, p in graph.parameters.items()}
        for p in self._moved():
            part = vector[start : start + p.numel()].view(1, *p.shape).to(p.dtype)
            start += p.numel()
            if id(p) not in names:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is not one of the graph's model.")
            tangents[names[id(p)]] = part
        routed = route(graph, tangents, by_source=True)

        def along(products: Mapping[str, Tensor]) -> float:
            return float(sum((t * products[name]).sum().item() for name, t in tangents.items() if name in products))

        assert routed.tensor_by_source is not None
        shares = {u: along(products) for u, products in routed.tensor_by_source.items()}
        return {"gauss-newton": along(routed.gn), **shares}

    def _own_state(self) -> dict[str, Any]:
        return {"escapes": self.escapes, "vectors": self._vectors, "stationarity": self.stationarity.state_dict()}

    def _blank_own_state(self) -> dict[str, Any]:
        moved = self._moved()
        size = sum(p.numel() for p in moved)
        columns = min(self.directions, max(size // 2, 1))
        return {"vectors": torch.zeros(size, columns, dtype=moved[0].dtype, device=moved[0].device)} if moved else {}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        found, wanted = sorted(own["stationarity"]), sorted(self.stationarity.state_dict())
        if found != wanted:
            raise ValueError(f"the state's 'stationarity' has {found} instead of {wanted}. Nothing was loaded.")

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self.escapes, self._vectors = own["escapes"], own["vectors"]
        self.stationarity.load_state_dict(own["stationarity"])

    def _moved(self) -> list[Tensor]:
        """What an escape moves: not the groups whose learning rate is next to nothing beside the largest."""
        largest = max(float(group["lr"]) for group in self.param_groups) if "lr" in self.param_groups[0] else 0.0
        return [
            p
            for group in self.param_groups
            if largest == 0 or float(group["lr"]) > 1e-8 * largest
            for p in group["params"]
            if p.requires_grad
        ]

    def _check(self, closure: Closure) -> CurvatureCheck:
        parameters = self._moved()
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        ranks = self._ranks()
        runner = ClosureRunner(closure, parameters, self.model, twice_differentiable=True, ranks=ranks)

        def give_back() -> None:
            runner.rewind()  # the wrapped optimizer's own run of the closure sees what this one saw
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient

        try:
            evaluation = runner.evaluate()
            maximize = bool(self.param_groups[0].get("maximize"))
            sign = -1.0 if maximize else 1.0
            op = LossHessian(StepCurvature(evaluation.loss, parameters, verify=True, ranks=ranks), maximize=maximize)
            g = op.gradient
            if not g.isfinite().all():
                refuse_not_finite(_parts(g, parameters), parameters, self.model)
            pairs = self._eigenpairs(op)
            loss = evaluation.mean_loss.item()
            del evaluation, op  # the tape, before trials need memory

            def gain(t: float, direction: Sequence[Tensor]) -> float:
                saved = [p.detach().clone() for p in parameters]
                try:
                    _move(parameters, direction, t)
                    return sign * (loss - runner.trial_loss())
                finally:
                    _restore(parameters, saved)

            check = self._decide(parameters, g, pairs, loss, sign, gain)
            give_back()
            return check
        except BaseException:
            give_back()
            raise

    def _eigenpairs(self, op: LinearOperator) -> ExtremeEigenpairs:
        n = op.shape[0]
        if n == 1:
            return extreme_eigenpairs(op)
        k = min(self.directions, n // 2)
        start = (
            self._vectors[:, 0].to(op.device, op.dtype)
            if self._vectors is not None and len(self._vectors) == n
            else None
        )
        most = max(self.max_products, 2 * k)
        enough = max(self.threshold / 10, 1e-7)  # of ‖H‖: less is no negative curvature
        pairs = extreme_eigenpairs(
            op,
            k,
            "both",
            rtol=enough,
            floor=enough,
            max_products=most,
            start=start,
            memory_limit=self.memory_limit,
        )
        self._vectors = pairs.vectors[:, :k]
        return pairs

    def _decide(
        self,
        parameters: Sequence[Tensor],
        g: Tensor,
        pairs: ExtremeEigenpairs,
        loss: float,
        sign: float,
        gain: Callable[[float, Sequence[Tensor]], float],
    ) -> CurvatureCheck:
        norm, g_norm = pairs.values.abs().amax().item(), torch.linalg.vector_norm(g).item()
        k = max(1, len(pairs.values) // 2)
        values, residual = pairs.values[:k], pairs.residuals[0].item()
        rounding = 10 * torch.finfo(g.dtype).eps * abs(loss)
        negative = values < -self.threshold * norm

        def check(
            reason: str, slope: float = math.nan, evaluations: int = 0, escape: Ray | None = None
        ) -> CurvatureCheck:
            return CurvatureCheck(
                eigenvalues=tuple(values.tolist()),
                residual=residual,
                norm=norm,
                gradient_norm=g_norm,
                slope=slope,
                length=0.0 if escape is None else escape.length,
                loss=loss,
                loss_after=loss if escape is None else loss - sign * escape.gain,
                products=pairs.products,
                evaluations=evaluations,
                escaped=escape is not None,
                reason=reason,
            )

        if not negative.any():  # a Ritz value is a curvature that H has: its error does not matter here
            return check(f"no negative curvature: the smallest eigenvalue is {values[0]:.3g} ± {residual:.1g}")
        descent = g_norm**2 / (2 * norm)
        if descent > self.stationarity.plateau * abs(loss):
            slope_first = f"on a slope: steepest descent gains {descent:.3g} of {abs(loss):.3g}"
            return check(f"negative curvature {values[0]:.3g} {slope_first}")
        start = first_length(parameters)
        direction = ray_direction(g, values[negative], pairs.vectors[:, :k][:, negative], start)
        slope = float(g @ direction)
        parts = _parts(direction, parameters)
        ray = search_rays(lambda t: gain(t, parts), slope, values[0].item(), start, self.max_trials, rounding)
        least = max(descent, rounding)
        if not (ray.gain > least and 2 * abs(slope) <= abs(values[0].item() * ray.length)):
            reason = f"negative curvature {values[0]:.3g} gains {ray.gain:.3g}, no more than the slope: no saddle"
            return check(reason, slope, ray.evaluations)
        _move(parameters, parts, ray.length)
        reason = f"left a saddle of curvature {values[0]:.3g}: the loss gains {ray.gain:.3g}"
        return check(reason, slope, ray.evaluations, ray)


def _parts(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, parameters, strict=True)]


@torch.no_grad()
def _move(parameters: Sequence[Tensor], direction: Sequence[Tensor], t: float) -> None:
    for p, d in zip(parameters, direction, strict=True):
        p.add_(d, alpha=t)


@torch.no_grad()
def _restore(parameters: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, saved, strict=True):
        p.copy_(value)
