"""Gauss-Newton steps with the curvature between layers kept inside a band."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast, overload

from torch import Tensor, nn

from hessopt.averages.causes import SEE_LOSS
from hessopt.averages.options import CURVATURES, MiniBatch, check_mini_batch
from hessopt.banded.bandwidth import BandwidthChoice
from hessopt.banded.damped_step import DampedStep
from hessopt.banded.space import Factors
from hessopt.banded.step import ExactStep
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.finite import refuse_meta
from hessopt.closure.protocol import Closure
from hessopt.errors import ClosureError, ModelError
from hessopt.kronecker.band import KroneckerBand
from hessopt.kronecker.step import KroneckerStep
from hessopt.network.arguments import (
    Params,
    check_choice,
    check_count,
    check_group,
    network_of,
)
from hessopt.network.cliques import Bandwidth, check_bandwidth
from hessopt.network.layers import layers_of
from hessopt.network.processes import refuse_processes
from hessopt.network.saved_state import SavedState, asks_for_state, name_of
from hessopt.search.damping import NielsenDamping


class BandedNewton(SavedState):
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

    **Mini-batches.** The above inverts the curvature of one batch. With ``factors="kronecker"`` the curvature is a
    running average, ``A_vw ⊗ G_vw`` of pairs of layers in the band, tapered so that it is positive definite, and the
    step is that of :class:`hessopt.kronecker.step.KroneckerStep`: a trust region in place of trials, momentum, and
    weight decay that is decoupled from the curvature. Factors are gathered in the backward pass. With a loss
    declared in ``mini_batch``, or ``curvature="empirical"``, ``loss.backward(); optimizer.step()`` is enough; a closure
    of any of the kinds below does as well, and then any loss that is a sum or mean over samples is taken. Layers and
    memory are documented at :class:`hessopt.kronecker.band.KroneckerBand`.

    **Closure.** See :mod:`hessopt.closure.protocol`: it returns the loss, ``(loss, output)`` or a
    :class:`hessopt.LeastSquares`, and may or may not call ``backward()``. If it does, ``.grad`` is the gradient
    (gradient clipping is respected); if not, no ``.grad`` is touched. The loss must be convex in the output.

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
        lr: γ, a factor on the step; at least 0. Default: 1; 0.5 with ``factors="kronecker"``.
        bandwidth: k, an integer of at least 0, or ``"full"``, or ``"auto"``: chosen at the first step and at every
            ``bandwidth_every``-th, by ``bandwidth_rule``, among 0, 1, 2, 4, … up to the interaction radius
            (:class:`hessopt.banded.bandwidth.BandwidthChoice`); with ``factors="kronecker"`` 0, and one of
            0, 1, 2 from step ``bandwidth_every`` on, decided then, at 4, 16, … times as many steps
            (:class:`hessopt.kronecker.bandwidth.KroneckerBandwidth`).
            Default: ``"auto"``.
        curvature: ``"ggn"``, the generalized Gauss-Newton matrix, which is the default with exact factors; or
            ``"hessian"``, for small networks, the absolute value ``|H|`` of the whole Hessian, positive semidefinite:
            any twice differentiable loss, and steps that leave saddle points
            (:func:`hessopt.factors.hessian_factors.hessian_factors`; ``P³`` operations, ``4 P²`` numbers). With
            ``factors="kronecker"`` also ``"fisher"``, the default there: Monte-Carlo columns of a declared loss, and of
            another one as ``"ggn"``; and ``"empirical"``, the gradients of the samples, but not ``"hessian"``.
        model: The network, if ``params`` is not the network itself.
        factors: Where to solve: ``"sample"``, in the space of the N rows; ``"dense"``, in that of the parameters; or
            ``"auto"``, where :func:`hessopt.banded.systems.step_operations` counts less. The steps are the same but for
            rounding. ``"kronecker"``: running averages, for mini-batches; ``"auto"`` never takes them. An exact step
            that costs more than a hundred gradients, and more than 1e9 operations, is warned of once, in the log.
            Default: ``"auto"``.
        mini_batch: With ``factors="kronecker"``, the :class:`hessopt.MiniBatch` of its options. Default: its defaults.
        damping: λ to start from, relative to nothing: in the units of the curvature. Default: 1e-2; with
            ``line_search`` 1e-8 tr(GGN), and 50 ε tr(GGN) at least. With ``factors="kronecker"`` in
            units of the loss's output curvature, constant unless ``MiniBatch(adapt_every=…)``, and 2e-3 by default; 1
            with ``MiniBatch(damping_unit="layer")``.
        momentum: μ of exact factors, in [0, 1): the damping pulls towards μ times the last step instead of towards zero
            (:class:`hessopt.banded.metric_momentum.MomentumSolve`); the factors' own are in ``mini_batch``. Default: 0.
        weight_decay: ω, the objective has the additional term ω/2·‖θ‖²; with ``factors="kronecker"`` decoupled.
            Default: 0.
        maximize: Maximize the loss, which must be concave in the output; the weight decay is still a penalty.
        adapt_damping: Evaluate each step and adapt the damping. If False, λ stays as it is, every step is taken, and a
            line search's default is 50 ε tr(GGN), anew at each step.
        line_search: Take, of the step's multiples 1, ½, ¼, …, the first that lowers the objective, or a smaller one if
            it is better still; then λ/10 follows from a multiple of at least 0.1, and 10 λ from one of at most 0.01.
            For full batches, least squares above all. Default: False.
        max_rejections: Rejected solves until a step gives up; at least 1. Default: 5.
        min_damping: Lower bound of λ. Default: 1e-14.
        max_damping: Upper bound of λ. Default: 1e10.
        bandwidth_rule: ``"gain"``: predicted reduction of the objective by cost of a step; ``"radius"``: k_ε.
        bandwidth_every: Steps from one decision to the next. Default: 10; with ``factors="kronecker"``
            200, to the first one.
        epsilon: ε, the coupling of layers that counts as none. Default: 0.1.
        cost: ``"model"``, operations, so that runs repeat bit for bit; or ``"measured"``, seconds of the solve.
        memory_limit: Bytes that the matrices of a solve may take. Default: 4 GiB.

    Param groups may have their own ``lr``, ``weight_decay``, ``momentum`` and ``maximize`` (the same in all groups).
    With ``factors="kronecker"`` a new group, or a parameter that is unfrozen, starts the averages anew; hooks are taken
    from the network when the optimizer is garbage, and copies of the network alone have none.

    Attributes:
        last_step: A :class:`DampedStep`, or None before the first step and with ``factors="kronecker"``.

    Raises:
        ValueError: an argument is out of range or of the other kind of factors, or a parameter is not the network's.
        TypeError: the network is missing.
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

    _TENSORS = ("momentum_buffer",)
    _OWN = (
        "model",
        "bandwidth",
        "curvature",
        "factors",
        "mini_batch",
        "adapt_damping",
        "line_search",
        "max_rejections",
        "memory_limit",
        "last_step",
        "_choice",
        "_bandwidth_every",
        "_initial_damping",
        "_relative_damping",
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        bandwidth: Bandwidth | Literal["auto"] = "auto",
        curvature: Literal["ggn", "hessian", "fisher", "empirical"] | None = None,
        *,
        model: nn.Module | None = None,
        factors: Factors = "auto",
        mini_batch: MiniBatch | None = None,
        damping: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        adapt_damping: bool = True,
        line_search: bool = False,
        max_rejections: int = 5,
        min_damping: float = 1e-14,
        max_damping: float = 1e10,
        bandwidth_rule: Literal["gain", "radius"] = "gain",
        bandwidth_every: int | None = None,
        epsilon: float = 0.1,
        cost: Literal["model", "measured"] = "model",
        memory_limit: int = 4 * 2**30,
    ) -> None:
        self.model = network_of(params, model)
        if bandwidth != "auto":
            check_bandwidth(bandwidth)
        averages = factors == "kronecker"
        own = {
            "adapt_damping": adapt_damping is not True, "line_search": line_search is not False,
            "max_rejections": max_rejections != 5, "min_damping": min_damping != 1e-14,
            "max_damping": max_damping != 1e10, "bandwidth_rule": bandwidth_rule != "gain",
            "epsilon": epsilon != 0.1, "cost": cost != "model", "momentum": momentum != 0.0,
        }  # fmt: skip
        check_mini_batch(averages, mini_batch, [name for name, given in own.items() if given])
        if curvature is None:
            curvature = "fisher" if averages else "ggn"
        check_choice("curvature", curvature, CURVATURES if averages else ("ggn", "hessian"))
        if curvature == "hessian" and factors == "sample":
            raise ValueError('curvature="hessian" has no factors by samples: pass factors="dense", or "auto".')
        check_count("max_rejections", max_rejections)
        if memory_limit <= 0:
            raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit!r}.")
        self.bandwidth = bandwidth
        self.curvature = curvature
        self.factors = factors
        self.mini_batch = (mini_batch or MiniBatch()) if averages else None
        self.adapt_damping = adapt_damping
        self.line_search = line_search
        self.max_rejections = max_rejections
        self.memory_limit = memory_limit
        self.last_step: DampedStep | None = None
        self._bandwidth_every = (200 if averages else 10) if bandwidth_every is None else bandwidth_every
        self._choice = BandwidthChoice(bandwidth_rule, self._bandwidth_every, epsilon, cost)
        self._relative_damping = line_search and damping is None
        start = 1e-2 if self.mini_batch is None else 2e-3 if self.mini_batch.damping_unit == "loss" else 1.0
        value = min(max(start, min_damping), max_damping) if damping is None else damping
        self._initial_damping = NielsenDamping(value, minimum=min_damping, maximum=max_damping)
        self._kronecker: KroneckerStep | None = None
        self._prepare()
        defaults: dict[str, Any] = {
            "lr": (0.5 if averages else 1.0) if lr is None else lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "momentum": momentum if self.mini_batch is None else self.mini_batch.momentum,
        }
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, defaults)
        layers_of(self.model, self._parameters())
        self._attach()

    def _prepare(self) -> None:
        """What follows from the arguments and the network alone."""
        self._exact = ExactStep(
            self.model,
            self.bandwidth,
            self.factors,
            self.curvature,
            self._choice,
            self._initial_damping,
            relative_damping=self._relative_damping,
            adapt_damping=self.adapt_damping,
            line_search=self.line_search,
            max_rejections=self.max_rejections,
            memory_limit=self.memory_limit,
        )

    def _attach(self) -> None:
        """The mini-batch form's hooks."""
        if self.mini_batch is not None:
            self._kronecker = KroneckerStep(
                self.model,
                self.param_groups,
                self.bandwidth,
                cast(Literal["ggn", "fisher", "empirical"], self.curvature),
                self._initial_damping.value,
                self._bandwidth_every,
                self.mini_batch,
            )

    @property
    def band(self) -> KroneckerBand:
        """With ``factors="kronecker"`` the engine: its ``report()`` says how each parameter is treated.

        Raises:
            AttributeError: the factors are others, so that there is none, as `hasattr` says.
        """
        if self._kronecker is None:
            raise AttributeError(f'only factors="kronecker" has an engine; the factors are "{self.factors}".')
        return self._kronecker.band

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks; if so, it leaves the gradients scaled and marks itself here, so it can be refused."""
        return self._kronecker is not None and self._kronecker.band.gathering.slope_is_missing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the network, with its own ``lr`` and ``weight_decay`` if wanted."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        known = set(self.model.parameters())
        try:
            refuse_meta(group["params"])
            check_group(group, self.param_groups[0])
            for position, p in enumerate(group["params"]):
                if p not in known:
                    raise ValueError(
                        f"parameter {position} of group {len(self.param_groups) - 1}, of shape {tuple(p.shape)}, is "
                        "not a parameter of the network; pass the network that owns it as model=."
                    )
        except (ValueError, ModelError):
            self.param_groups.pop()
            raise
        kronecker: KroneckerStep | None = self.__dict__.get("_kronecker")  # not there yet in the constructor
        if kronecker is not None:
            kronecker.restart(self.param_groups)

    @overload  # type: ignore[override]
    def step(self, closure: Closure) -> Tensor: ...

    @overload
    def step(self, closure: None = None) -> Tensor | None: ...

    def step(self, closure: Closure | None = None) -> Tensor | None:
        """Take one step.

        Args:
            closure: Evaluates the loss of this step's batch, see :mod:`hessopt.closure.protocol`. With
                ``factors="kronecker"`` it may be left out if the loss is declared or the curvature is ``"empirical"``;
                without it nothing waits for the device, except at decisions about the bandwidth.

        Returns:
            The loss before the step, detached; None without a closure.

        Raises:
            ClosureError: the closure is missing or does not give a finite, differentiable loss.
            ModelError: the output or the loss cannot be treated, or a gradient is sparse; or several processes train
                together (:func:`hessopt.separate_networks`).
            NotConvexError: the loss is not convex in the output (concave, if maximizing).
            MemoryBudgetError: the solve does not fit into ``memory_limit``.
            SolveError: with ``adapt_damping=False``, the damping is too small for the precision.

        In every one of these cases, and where the step is interrupted or runs out of memory, the parameters are as they
        were. For that exact factors keep a copy of them during the step.
        """
        if asks_for_state(self, closure):
            return None
        refuse_processes("BandedNewton")
        if self._kronecker is not None:
            if self.__dict__.pop("found_inf", None) is not None:
                del self.__dict__["grad_scale"]
                raise ClosureError(
                    'under a GradScaler curvature="empirical" has to see by what the loss was scaled: '
                    f"{SEE_LOSS}. Or train in bfloat16, without a scaler."
                )
            with AllOrNothing():
                return self._kronecker.step(self.param_groups, closure)
        if closure is None:
            raise ClosureError(
                "BandedNewton.step() needs a closure: the loss's curvature and the trial of the step cannot be had "
                "from `.grad` alone. Pass a function that returns the loss: "
                "`optimizer.step(lambda: loss_fn(model(x), y))`."
            )
        loss: Tensor
        with AllOrNothing(self._parameters(), state=self.state, owner=self, names=("last_step",)):
            loss, self.last_step = self._exact.step(self.param_groups, self.state, closure)
        return loss

    @property
    def gradient_norm(self) -> float | None:
        """‖g‖ of all parameters together before the last step; None where it was not looked at: without a closure."""
        if self._kronecker is not None:
            return self._kronecker.gradient_norm
        return None if self.last_step is None else self.last_step.gradient_norm

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), **{name: self.__dict__[name] for name in self._OWN}}
        if self._kronecker is not None:
            state["_averages"] = self._kronecker.state_dict(self.param_groups)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        averages = state.get("_averages")
        super().__setstate__({name: value for name, value in state.items() if name != "_averages"})
        for group in self.param_groups:
            group.setdefault("maximize", False)  # states of older versions
        self._prepare()
        if "_kronecker" not in self.__dict__:  # a copy, not load_state_dict
            self._kronecker = None
            self._attach()
            if self._kronecker is not None:
                self._kronecker.load_state_dict(averages, self.param_groups)

    def _blank(self, number: int, group: dict[str, Any], p: Tensor, zeros: Callable[[], Tensor]) -> dict[str, Any]:
        shared: dict[str, Any] = {"kronecker": None}
        if self._kronecker is None:
            shared = {"step": 0, "damping": math.nan, "growth": math.nan, "bandwidth": 0}
        return {**(shared if number == 0 else {}), **({"momentum_buffer": zeros()} if group["momentum"] else {})}

    def _completed(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._kronecker is None:
            return super()._completed(state)
        saved = self._kronecker.state_dict(self.param_groups)
        entries: dict[Any, Any] = {number: {"momentum_buffer": buffer} for number, buffer in saved["momentum"].items()}
        entries.setdefault(0, {})["kronecker"] = saved["band"]
        return super()._completed({**state, "state": {**state["state"], **entries}})

    def _reduced(self, state: dict[str, Any]) -> dict[str, Any]:
        state = super()._reduced(state)
        if self._kronecker is not None:
            keys = [key for group in state["param_groups"] for key in group["params"]]
            own = [state["state"].pop(key, {}) for key in keys]
            if "kronecker" not in own[0]:
                raise ValueError(
                    f"the state of {name_of(self, 0)} lacks 'kronecker', the averages. Nothing was loaded."
                )
            momentum = {i: entry["momentum_buffer"] for i, entry in enumerate(own) if "momentum_buffer" in entry}
            self._kronecker.load_state_dict({"band": own[0]["kronecker"], "momentum": momentum}, self.param_groups)
        return state

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
