"""Gauss-Newton steps with the curvature between layers kept inside a band."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial, reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.cliques import Bandwidth, Cliques, band_cliques, check_bandwidth
from hessopt.closure import Closure, ClosureRunner, Evaluation
from hessopt.damped_step import DampedStep, search_step, take_step
from hessopt.damping import NielsenDamping
from hessopt.errors import ClosureError, NotConvexError
from hessopt.linear_factors import check_uncoupled, linear_factors
from hessopt.linear_solve import check_solve_memory, least_damping
from hessopt.linear_tape import LinearRecorder, LinearTape
from hessopt.output_curvature import (
    check_hessian_memory,
    curvature_roots,
    output_hessians,
    residual_roots,
)
from hessopt.quadratic_model import QuadraticModel

Params: TypeAlias = "nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]"


class BandedNewton(Optimizer):
    r"""Gauss-Newton method whose curvature couples layers that are at most ``bandwidth`` apart.

    Block-diagonal methods drop the curvature between layers; cutting it to a band instead can destroy positive
    definiteness. This method uses the maximum-determinant completion of the band, which is positive definite at every
    bandwidth, and whose inverse is a sum over the cliques :math:`C` and separators :math:`S` of the layers'
    interaction graph. Solves are done in the space of samples, exactly, so each step is exact up to rounding.

    .. math::
       \begin{aligned}
            &\textbf{input}: \theta_0, \; \gamma \text{ (lr)}, \; k \text{ (bandwidth)}, \; \lambda \text{ (damping)},
                \; \omega \text{ (weight decay)}, \; f(\theta), \; \nu \leftarrow 2                             \\
            &\textbf{for each step}                                                                            \\
            &\hspace{5mm} g \leftarrow \nabla f(\theta) \;\; (-\nabla f \text{ if maximize}) + \omega \theta    \\
            &\hspace{5mm} K_b \leftarrow \partial^2 f / \partial z_b \partial z_b = S_b^\top S_b, \quad
                \hat J_v \leftarrow S \, \partial z / \partial \theta_v                                         \\
            &\hspace{5mm} \textbf{repeat}                                                                      \\
            &\hspace{10mm} D \leftarrow \lambda + \omega, \quad
                \Gamma_v \leftarrow \hat J_v D_v^{-1} \hat J_v^\top                                             \\
            &\hspace{10mm} y_C \leftarrow \big(I + \textstyle\sum_{v \in C} \Gamma_v\big)^{-1}
                \textstyle\sum_{v \in C} \hat J_v D_v^{-1} g_v \text{ for every clique; } y_S \text{ likewise}   \\
            &\hspace{10mm} d_v \leftarrow -\gamma D_v^{-1} \big( g_v - \hat J_v^\top
                (\textstyle\sum_{C \ni v} y_C - \sum_{S \ni v} y_S) \big)                                       \\
            &\hspace{10mm} \rho \leftarrow \big(f(\theta) - f(\theta + d)\big) \, / \,
                \big({-g^\top d} - \tfrac12 \lVert \hat J d \rVert^2 - \tfrac12 \omega \lVert d \rVert^2\big)    \\
            &\hspace{10mm} \textbf{if } \rho > 10^{-4}: \; \theta \leftarrow \theta + d, \;
                \lambda \leftarrow \lambda \max(\tfrac13, 1 - (2\rho - 1)^3), \; \nu \leftarrow 2, \;
                \textbf{stop}                                                                                  \\
            &\hspace{10mm} \textbf{else } \lambda \leftarrow \lambda \nu, \; \nu \leftarrow 2 \nu
       \end{aligned}

    In :math:`\rho`, :math:`f` includes the weight decay. A step whose predicted reduction is not positive, or whose
    Cholesky factorization fails, counts as rejected without an evaluation. After ``max_rejections`` rejections the
    parameters are restored bit for bit and the damping stays raised, for the next call. Reductions below the rounding
    error of the loss, :math:`10 \epsilon |f|`, are discounted in :math:`\rho`.

    The distance of two layers is the length of the shortest path between them, in either direction, in the graph of
    layers and output that the autograd tape shows. ``bandwidth=0`` is block-diagonal; from ``bandwidth = n - 1`` on,
    with n layers, it is the exact damped Gauss-Newton step, as with ``"full"``.

    **Networks.** Every trained parameter must be the weight or bias of a :class:`torch.nn.Linear` that the closure
    calls exactly once, on ``(B, d_in)``, and reach the loss only through that layer and the network's output. In
    between anything is allowed that treats samples separately: activations, skip connections, concatenation,
    dropout, group norm, control flow. This is checked at every step (that samples do not mix: at the first, and
    whenever the network's structure or its training mode changes).

    **Closure.** See :mod:`hessopt.closure`: it returns the loss, ``(loss, output)`` or a
    :class:`hessopt.LeastSquares`, and may or may not call ``backward()``. If it does, ``.grad`` is the gradient
    (gradient clipping is respected); if not, no ``.grad`` is touched. The loss must be convex in the output.

    **Cost.** With N = batch × outputs (outputs − 1 for the softmax): one N×N Cholesky factorization for each clique
    and separator, O(N³/3); one N×N×d_out product for each layer and clique; one back-propagation of N / batch vectors
    at once; one more evaluation of the loss for each trial. A rejected trial repeats the solve and the evaluation
    only. Memory: two N×N matrices for each clique and separator, as far as ``memory_limit`` permits at once, and N
    numbers for each pre-activation. No parameter-sized Jacobian is stored. Small batches or few outputs are best.

    **Precision.** The step is a difference that loses digits when the damping is small: its relative error is
    about ε·‖GGN‖/(λ+ω). Therefore λ is kept above 10·ε·tr(GGN), which matters in float32 and hardly ever in float64.

    Args:
        params: The network, or its parameters in any form that :mod:`torch.optim` takes, with ``model=``.
        lr: γ, a factor on the step; at least 0. Default: 1.
        bandwidth: k, an integer of at least 0, or ``"full"``. Default: 1.
        curvature: ``"ggn"``, the generalized Gauss-Newton matrix.
        model: The network, if ``params`` is not the network itself.
        damping: λ to start from, relative to nothing: in the units of the curvature. Default: 1e-2.
        weight_decay: ω, the objective has the additional term ω/2·‖θ‖². Default: 0.
        maximize: Maximize the loss, which must be concave in the output; the weight decay is still a penalty.
        adapt_damping: Evaluate each step and adapt the damping. If False, every step is taken, with the same λ.
        max_rejections: Rejected solves until a step gives up; at least 1. Default: 5.
        min_damping: Lower bound of λ. Default: 1e-10.
        max_damping: Upper bound of λ. Default: 1e10.
        memory_limit: Bytes that the N×N matrices of a solve may take. Default: 4 GiB.

    Param groups may have their own ``lr``, ``weight_decay`` and ``maximize`` (the same in all groups).

    Attributes:
        last_step: A :class:`DampedStep`, or None before the first step.

    Raises:
        ValueError: an argument is out of range, or a parameter is not the network's.
        TypeError: the network is missing.
        ModelError: a parameter is not a linear layer's, see above.

    Source:
        docs/banded.md. The damping rule is Nielsen's (:class:`hessopt.damping.NielsenDamping`).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = BandedNewton(model, bandwidth=1)
        >>> inputs = torch.randn(32, 2)
        >>> def closure():
        ...     return nn.functional.mse_loss(model(inputs), inputs.prod(dim=1, keepdim=True))
        >>> losses = [optimizer.step(closure).item() for _ in range(20)]
        >>> losses[-1] < 0.1 * losses[0]
        True
    """

    _OWN = (
        "model",
        "bandwidth",
        "curvature",
        "adapt_damping",
        "max_rejections",
        "memory_limit",
        "last_step",
        "_initial_damping",
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        bandwidth: Bandwidth = 1,
        curvature: str = "ggn",
        *,
        model: nn.Module | None = None,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        maximize: bool = False,
        adapt_damping: bool = True,
        max_rejections: int = 5,
        min_damping: float = 1e-10,
        max_damping: float = 1e10,
        memory_limit: int = 4 * 2**30,
    ) -> None:
        self.model = _network(params, model)
        _check_bandwidth(bandwidth)
        if curvature != "ggn":
            raise ValueError(f'curvature must be "ggn", got {curvature!r}; no other is available.')
        if isinstance(max_rejections, bool) or not isinstance(max_rejections, int) or max_rejections < 1:
            raise ValueError(f"max_rejections must be an integer of at least 1, got {max_rejections!r}.")
        if memory_limit <= 0:
            raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit!r}.")
        self.bandwidth = bandwidth
        self.curvature = curvature
        self.adapt_damping = adapt_damping
        self.max_rejections = max_rejections
        self.memory_limit = memory_limit
        self.last_step: DampedStep | None = None
        self._initial_damping = NielsenDamping(damping, minimum=min_damping, maximum=max_damping)
        self._structure: tuple[Any, ...] | None = None
        self._cliques = Cliques((), ())
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, defaults)
        LinearRecorder(self.model, self._parameters())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the network, with its own ``lr`` and ``weight_decay`` if wanted."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        known = set(self.model.parameters())
        try:
            _check_group(group, self.param_groups[0])
            for position, p in enumerate(group["params"]):
                if p not in known:
                    raise ValueError(
                        f"parameter {position} of group {len(self.param_groups) - 1}, of shape {tuple(p.shape)}, is "
                        "not a parameter of the network; pass the network that owns it as model=."
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Evaluates the loss of this step's batch, see :mod:`hessopt.closure`.

        Returns:
            The loss before the step, detached.

        Raises:
            ClosureError: the closure is missing or does not give a finite, differentiable loss.
            ModelError: the network cannot be treated.
            NotConvexError: the loss is not convex in the output (concave, if maximizing).
            MemoryBudgetError: the solve does not fit into ``memory_limit``.
            SolveError: with ``adapt_damping=False``, the damping is too small for the precision.

        In every one of these cases the parameters are as they were.
        """
        if closure is None:
            raise ClosureError(
                "BandedNewton.step() needs a closure: the loss's curvature and the trial of the step cannot be had "
                "from `.grad` alone. Pass a function that returns the loss: "
                "`optimizer.step(lambda: loss_fn(model(x), y))`."
            )
        parameters = self._parameters()
        recorder = LinearRecorder(self.model, parameters)
        runner = ClosureRunner(closure, parameters, self.model)
        with recorder.recording():
            evaluation = runner.evaluate()
        tape = recorder.tape(evaluation.loss, evaluation.output)
        gradients = self._gradients(evaluation, tape)
        cliques = self._examine(evaluation, tape)
        model = self._quadratic_model(evaluation, tape, gradients)
        loss = evaluation.loss.detach()
        del evaluation, tape, recorder  # free what is left of the tape before the solves
        damping = self._damping(least_damping(model.factors))
        solve = partial(model.step, cliques=cliques, memory_limit=self.memory_limit)
        if self.adapt_damping:
            maximize = self.param_groups[0]["maximize"]
            self.last_step = search_step(
                model, solve, runner.trial_loss, loss, damping, max_rejections=self.max_rejections, maximize=maximize
            )
        else:
            self.last_step = take_step(model, solve, loss, damping.value)
        state = self.state[parameters[0]]
        state["step"] = state.get("step", 0) + 1
        state.update(damping.state_dict())
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)  # states of older versions
        self._structure = None

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _damping(self, least: float) -> NielsenDamping:
        start = self._initial_damping
        minimum = min(max(start.minimum, least), start.maximum)
        damping = replace(start, value=max(start.value, minimum), minimum=minimum)
        state = self.state.get(self._parameters()[0])
        if state:
            damping.load_state_dict(state)
        return damping

    def _examine(self, evaluation: Evaluation, tape: LinearTape) -> Cliques:
        """Cliques of the network's layers; where its structure is new, after a check that samples do not mix."""
        modes = tuple(module.training for module in self.model.modules())
        structure = (tuple(layer.name for layer in tape.layers), tape.edges, evaluation.is_least_squares, modes)
        if structure != self._structure:
            loss = None if evaluation.is_least_squares else evaluation.loss
            check_uncoupled(tape.layers, evaluation.output, loss)
            whole = self.bandwidth == "full" or self.bandwidth >= len(tape.layers) - 1
            self._cliques = band_cliques(tape.distances(), "full" if whole else self.bandwidth)
            self._structure = structure
        return self._cliques

    def _gradients(self, evaluation: Evaluation, tape: LinearTape) -> list[list[Tensor]]:
        """Gradient of the objective (to be minimized) for each layer."""
        parameters = [p for layer in tape.layers for p in layer.parameters]
        slopes = (
            [p.grad for p in parameters]
            if evaluation.backward_called
            else torch.autograd.grad(evaluation.loss, parameters, retain_graph=True, allow_unused=True)
        )
        group_of = self._group_of()
        # One dtype for all, at least float32: there is no Cholesky factorization in half precision.
        dtype = reduce(torch.promote_types, (t.dtype for t in [*parameters, evaluation.output]), torch.float32)
        gradients: dict[Tensor, Tensor] = {}
        for p, slope in zip(parameters, slopes, strict=True):
            group = group_of[p]
            decay = group["weight_decay"] * p.detach().to(dtype)
            gradients[p] = decay if slope is None else decay + _sign(group) * slope.detach().to(dtype)
            if not gradients[p].isfinite().all():
                raise ClosureError(
                    "the gradient is not finite at the current parameters, which were left as they are, although the "
                    "loss is. torch.autograd.set_detect_anomaly(True) finds the operation."
                )
        return [[gradients[p] for p in layer.parameters] for layer in tape.layers]

    def _quadratic_model(
        self, evaluation: Evaluation, tape: LinearTape, gradients: list[list[Tensor]]
    ) -> QuadraticModel:
        output, layers, sign = evaluation.output, tape.layers, _sign(self.param_groups[0])
        if evaluation.is_least_squares:
            if sign < 0:
                raise NotConvexError("a sum of squares is not concave in its residuals, so it cannot be maximized.")
            roots = residual_roots(output)
        else:
            check_hessian_memory(output, self.memory_limit)
            roots = curvature_roots(sign * output_hessians(evaluation.loss, output), output.dtype)
        roots = roots.to(gradients[0][0].dtype)
        check_solve_memory(roots.shape[0] * roots.shape[1], roots.dtype, self.memory_limit)
        group_of = self._group_of()
        return QuadraticModel(
            parameters=[layer.parameters for layer in layers],
            factors=linear_factors(layers, output, roots),
            gradients=gradients,
            lr=[[float(group_of[p]["lr"]) for p in layer.parameters] for layer in layers],
            weight_decay=[[float(group_of[p]["weight_decay"]) for p in layer.parameters] for layer in layers],
        )

    def _group_of(self) -> dict[Tensor, dict[str, Any]]:
        return {p: group for group in self.param_groups for p in group["params"]}


def _sign(group: dict[str, Any]) -> int:
    return -1 if group["maximize"] else 1


def _check_bandwidth(bandwidth: object) -> None:
    if bandwidth == "auto":
        raise ValueError('bandwidth="auto" is not available yet; choose an integer of at least 0 or "full".')
    check_bandwidth(bandwidth)


def _network(params: Params, model: nn.Module | None) -> nn.Module:
    if model is None and isinstance(params, nn.Module):
        return params
    if model is None:
        raise TypeError(
            "BandedNewton needs the network itself: pass it in place of the parameters, `BandedNewton(model)`, "
            "or besides them, `BandedNewton(model.parameters(), model=model)`."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(params, nn.Module) and params is not model:
        raise ValueError("params and model are two different networks; pass one of them.")
    return model


def _check_group(group: dict[str, Any], first: dict[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(group['lr'].shape)}.")
    for name in ("lr", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {group[name]}.")
    if bool(group["maximize"]) != bool(first["maximize"]):
        raise ValueError("maximize must be the same in all param groups: curvature has one sign for all.")
    for p in group["params"]:
        if p.is_complex():
            raise ValueError("BandedNewton has no complex parameters; use torch.view_as_real.")
