"""Gauss-Newton steps with the curvature between layers kept inside a band."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessopt.banded.bandwidth import AutoBandwidth
from hessopt.banded.damped_step import DampedStep
from hessopt.banded.rows import RowClosure, Rows, check_arguments
from hessopt.banded.space import Space
from hessopt.banded.step import ExactStep
from hessopt.checks import check_choice, check_type
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.protocol import Closure
from hessopt.errors import ClosureError
from hessopt.network.arguments import Params
from hessopt.network.cliques import Bandwidth, check_bandwidth
from hessopt.network.layerwise import LayerwiseOptimizer
from hessopt.network.processes import refuse_processes
from hessopt.network.saved_state import asks_for_state
from hessopt.search.rules import Damped, Fixed, LineSearch, Search


class BandedNewton(LayerwiseOptimizer):
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

    **Networks.** Any. A layer is a module that owns trained parameters directly. Linear layers, on any leading
    dimensions, called any number of times, tied, and in derivatives of the network of any order (physics-informed
    residuals), are never expanded; other functions of a parameter give the rows of a Jacobian sample by sample. Each
    layer's factor is checked against back-propagation at every step; where the check fails (samples mix, as in
    batch-norm in training mode; a parameter used through a function of it alone, in an operator in place, inside of
    ``torch.func``), its rows are back-propagated one by one: exact, N times as dear, and logged as a warning.

    **Mini-batches.** This inverts the curvature of one batch. :class:`hessopt.KroneckerNewton` averages that of many.

    **Closure.** See :mod:`hessopt.closure.protocol`: it returns the loss, ``(loss, output)`` or a
    :class:`hessopt.LeastSquares`, and may or may not call ``backward()``. If it does, ``.grad`` is the gradient
    (gradient clipping is respected); if not, no ``.grad`` is touched. The loss must be convex in the output.

    **Rows.** With ``rows=N`` a step draws some of the N rows of a least-squares problem (:class:`hessopt.Rows`), and
    ``closure(rows)`` returns the :class:`hessopt.LeastSquares` of those whose numbers it is given, an ascending int64
    tensor on the parameters' device: each residual scaled as in the whole problem, ``LeastSquares(r[rows] * (2 / N) **
    0.5)`` for the mean square of N. The optimizer rescales them, so that objective, gradient and curvature are those of
    all rows in expectation. The trials of a step are on the same rows. ``backward()`` is left to the optimizer.

    **Cost.** N = batch × outputs (outputs − 1 for the softmax). In sample space, one N×N Cholesky factorization for
    each clique and separator, N³/3, and one Gram matrix for each layer; in parameter space ``P_C³/3`` for each and
    ``N P_v P_w`` for the pairs inside the band. Besides, two back-propagations (one of N / batch vectors at once)
    and one more evaluation of the loss for each trial. A rejected trial repeats the solve and the evaluation only.
    Memory in numbers: in sample space (n + 4) N² for n layers, less where ``memory_limit`` asks for it; in parameter
    space N P + 3 P²; N times the pre-activations; and N P_v for every layer without a closed form.

    **Precision.** The step is a difference that loses digits when the damping is small: its relative error is
    about ε·‖GGN‖/(λ+ω). Therefore λ is kept above 10·ε·tr(GGN), which matters in float32 and hardly ever in float64.

    Args:
        params: The network, or its parameters in any form that :mod:`torch.optim` takes, with ``model=``.
        lr: γ, a factor on the step; at least 0. Default: 1.
        bandwidth: k, an integer of at least 0, or ``"full"``; or ``"auto"``, the same as ``AutoBandwidth()``, which
            chooses it among 0, 1, 2, 4, … up to the interaction radius, at every tenth step
            (:class:`hessopt.AutoBandwidth`). Default: ``"auto"``.
        model: The network, if ``params`` is not the network itself.
        curvature: ``"ggn"``, the generalized Gauss-Newton matrix; or ``"hessian"``, for small networks, the absolute
            value ``|H|`` of the whole Hessian, positive semidefinite: any twice differentiable loss, and steps that
            leave saddle points (:func:`hessopt.factors.hessian_factors.hessian_factors`; ``P³`` operations, ``4 P²``
            numbers). Default: ``"ggn"``.
        space: Where to solve: ``"sample"``, in the space of the N rows, which ``|H|`` does not have; ``"parameter"``,
            in that of the parameters; or ``"auto"``, where :func:`hessopt.banded.systems.banded_operations` counts
            less. The steps are the same but for rounding. A step that costs more than a hundred gradients, and more
            than 1e9 operations, is warned of once, in the log. Default: ``"auto"``.
        search: λ, and how far to go: :class:`hessopt.Damped`, which tries steps with more and more damping;
            :class:`hessopt.LineSearch`, which tries multiples of a step; or :class:`hessopt.Fixed`, which tries
            nothing. Default: None, ``Damped()``, and ``LineSearch()`` on random rows while these are at most half as
            many as the parameters and draws do not follow the residuals.
        momentum: μ, in [0, 1): the damping pulls towards μ times the last step instead of towards zero
            (:class:`hessopt.banded.metric_momentum.MomentumSolve`). Default: 0; at least ``1 − n/N`` where draws of
            rows follow the residuals (:class:`hessopt.Rows`).
        weight_decay: ω, the objective has the additional term ω/2·‖θ‖². Default: 0.
        maximize: Maximize the loss, which must be concave in the output; the weight decay is still a penalty.
        memory_limit: Bytes that the matrices of a solve may take. Default: 4 GiB.
        rows: The number of rows of a least-squares problem, or a list of the numbers in its strata (conditions), of
            which each step draws some; the same as ``Rows(rows)``, which has the options. Default: None, a step is on
            what ``closure()`` evaluates.

    Param groups may have their own ``lr``, ``weight_decay``, ``momentum`` and ``maximize`` (the same in all groups).

    Attributes:
        last_step: A :class:`hessopt.DampedStep`, or None before the first step.

    Raises:
        ValueError: an argument is out of range, or a parameter is not the network's.
        TypeError: the network is missing, or an argument is of another type.
        ModelError: the network is compiled, scripted or wrapped for parallel training.

    Source:
        docs/banded.md. The damping rule is Nielsen's (:class:`hessopt.search.damping.NielsenDamping`).

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

    _OWN = ("bandwidth", "curvature", "space", "search", "memory_limit", "rows", "last_step")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        bandwidth: Bandwidth | Literal["auto"] | AutoBandwidth = "auto",
        *,
        model: nn.Module | None = None,
        curvature: Literal["ggn", "hessian"] = "ggn",
        space: Space = "auto",
        search: Search | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        memory_limit: int = 4 * 2**30,
        rows: int | Sequence[int] | Rows | None = None,
    ) -> None:
        if bandwidth != "auto" and not isinstance(bandwidth, AutoBandwidth):
            check_bandwidth(bandwidth)
        check_choice("curvature", curvature, ("ggn", "hessian"))
        check_choice("space", space, ("auto", "sample", "parameter"))
        if curvature == "hessian" and space == "sample":
            raise ValueError('curvature="hessian" has no factors by samples: pass space="parameter", or "auto".')
        if search is not None:
            check_type("search", search, Damped, LineSearch, Fixed)
        if memory_limit <= 0:
            raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit!r}.")
        self.bandwidth = AutoBandwidth() if bandwidth == "auto" else bandwidth
        self.curvature = curvature
        self.space: Space = space
        self.search = search
        self.memory_limit = memory_limit
        self.rows = rows if rows is None or isinstance(rows, Rows) else Rows(rows)
        self.last_step: DampedStep | None = None
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "momentum": momentum}
        super().__init__(params, model, defaults)
        self._prepare()

    def _prepare(self) -> None:
        """What follows from the arguments and the network alone."""
        self._exact = ExactStep(
            self.model, self.bandwidth, self.space, self.curvature, self.search, self.memory_limit, self.rows
        )

    def step(self, closure: Closure | RowClosure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Evaluates the loss of this step's batch, see :mod:`hessopt.closure.protocol`; with ``rows=``, that
                of the rows that it is given.

        Returns:
            The loss before the step, detached; with ``rows=``, its estimate by the rows that were drawn.

        Raises:
            ClosureError: the closure is missing or does not give a finite, differentiable loss; or it does not take
                rows where they are drawn, or not return the residuals of these, or takes an argument where none is.
            ModelError: the output or the loss cannot be treated, or a gradient is sparse; or several processes train
                together (:func:`hessopt.separate_networks`).
            NotConvexError: the loss is not convex in the output (concave, if maximizing).
            MemoryBudgetError: the solve does not fit into ``memory_limit``.
            SolveError: without :class:`hessopt.Damped`, the damping is too small for the precision.

        In every one of these cases, and where the step is interrupted or runs out of memory, the parameters are as they
        were; a copy of them is kept during the step.
        """
        if asks_for_state(self, closure):
            return torch.tensor(math.nan)
        refuse_processes("BandedNewton")
        if closure is None:
            raise ClosureError(
                "BandedNewton.step() needs a closure: the loss's curvature and the trial of the step cannot be had "
                "from `.grad` alone. Pass a function that returns the loss: "
                "`optimizer.step(lambda: loss_fn(model(x), y))`."
            )
        check_arguments(closure, self.rows)
        loss: Tensor
        with AllOrNothing(self._parameters(), state=self.state, owner=self, names=("last_step",)):
            loss, self.last_step = self._exact.step(self.param_groups, self.state, closure)
        return loss

    @property
    def gradient_norm(self) -> float | None:
        """‖g‖ of all parameters together before the last step; None before the first."""
        return None if self.last_step is None else self.last_step.gradient_norm

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _blank(self, number: int, group: dict[str, Any], p: Tensor, zeros: Callable[[], Tensor]) -> dict[str, Any]:
        shared: dict[str, Any] = {"step": 0, "damping": math.nan, "growth": math.nan, "bandwidth": 0}
        if self.rows is not None:
            shared |= {"subset": 0, "whole": math.nan}
        adapts = self.rows is not None and self.rows.residuals and self.search is None
        if self.rows is not None and adapts:
            shared |= {"start": math.nan, "lately": math.nan}
            shared["squares"] = torch.zeros(self.rows.total, dtype=p.dtype, device=p.device)
        moves = group["momentum"] or adapts
        return {**(shared if number == 0 else {}), **({"momentum_buffer": zeros()} if moves else {})}
