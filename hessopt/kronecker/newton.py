"""Mini-batch Newton steps with running Kronecker averages of the curvature, inside a band of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor, nn

from diagnostics.ranks.spread import is_distributed
from hessopt.averages.causes import refuse_scaler
from hessopt.averages.gathering import Curvature
from hessopt.averages.options import KroneckerAveraging, Loss, check_curvature, declared_loss
from hessopt.averages.sharded import zeros_of
from hessopt.checks import check_type
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.protocol import Closure
from hessopt.kronecker.band import KroneckerBand
from hessopt.kronecker.bandwidth import KroneckerBandwidth
from hessopt.kronecker.step import KroneckerStep
from hessopt.network.arguments import Params
from hessopt.network.cliques import Bandwidth, check_bandwidth
from hessopt.network.layerwise import LayerwiseOptimizer
from hessopt.network.saved_state import asks_for_state, name_of
from hessopt.search.rules import KroneckerDamping


class KroneckerNewton(LayerwiseOptimizer):
    r"""Newton's method for mini-batches, with running averages of layers' curvature, and of pairs of layers in a band.

    .. math::
       \begin{aligned}
            &d \leftarrow P^{-1} g, \quad \sigma \leftarrow \min\big(1, \sqrt{\Delta / g^\top d}\big)  \\
            &m \leftarrow \mu m + \sigma d, \quad \theta \leftarrow (1 - \gamma \omega) \theta - \gamma m
       \end{aligned}

    P is the damped average of ``A_vw ⊗ G_vw`` of the pairs of layers at most ``bandwidth`` apart, tapered so that it is
    positive definite (:class:`hessopt.KroneckerBand`, which documents layers and memory); σ is a trust region in place
    of trials (:class:`hessopt.kronecker.step.KroneckerStep`). With bandwidth 0 this is K-FAC. The distance of two
    layers is that of :class:`hessopt.BandedNewton`, which inverts the exact curvature of one batch.

    **Closure.** Factors are gathered in the backward pass. With a declared loss, or ``curvature="empirical"``,
    ``loss.backward(); optimizer.step()`` is enough; a closure of any of the kinds of :mod:`hessopt.closure.protocol`
    does as well, and then any loss that is a sum or mean over samples is taken.

    **Several processes** train one network in DistributedDataParallel, which is passed as it is or as its ``.module``,
    or one that :func:`torch.distributed.fsdp.fully_shard` (FSDP2) has sharded: steps are those of one process on the
    samples of all, if each has as many (docs/distributed.md).

    Args:
        params: The network, or its parameters in any form that :mod:`torch.optim` takes, with ``model=``.
        lr: γ, a factor on the step; at least 0. Default: 0.5.
        bandwidth: k, an integer of at least 0, or ``"full"``; or ``"auto"``, the same as ``KroneckerBandwidth()``: 0,
            and one of 0, 1, 2 from step 200 on, decided then, at 4, 16, … times as many steps
            (:class:`hessopt.KroneckerBandwidth`). Default: 0.
        model: The network, if ``params`` is not the network itself.
        loss: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"`` or ``"poisson_nll"`` (of logarithms of rates) of the
            network's output, reduced to the mean; a :class:`hessopt.NamedLoss`, for another reduction; or the module
            that computes the loss, as :class:`torch.nn.CrossEntropyLoss`: then the optimizer takes
            ``loss.backward(); optimizer.step()``, without a closure. A module may have class weights, label smoothing
            and ignored targets, and what it is called with need not be what the network returns
            (:func:`hessopt.closure.loss_curvature.criterion_curvature` lists the closed forms; of any other module the
            output Hessian is used, if it is a sum over samples with at most 256 outputs each). Its value is taken for
            the loss: a factor on it afterwards changes the gradient and not the curvature. What counts is a call that
            ``backward()`` follows, the first of several (:class:`hessopt.averages.passes.Choice`) unless
            ``averages=KroneckerAveraging(accumulate=n)`` takes the first n.
            ``curvature="empirical"`` needs no declaration, but has to see the loss as a module where it is scaled or
            divided. None: any loss, with a closure. Default: None.
        curvature: ``"fisher"``: Monte-Carlo columns of a declared loss, and of another one as ``"ggn"``; ``"ggn"``, the
            generalized Gauss-Newton matrix; or ``"empirical"``, the gradients of the samples. Default: ``"fisher"``.
        damping: λ, in units of the loss's output curvature (:attr:`hessopt.KroneckerBand.scale`); or a
            :class:`hessopt.KroneckerDamping`, for other units or adaptation. Default: 2e-3.
        momentum: μ, in [0, 1). Default: 0.5.
        trust: Δ, bound on the model's measure ``dᵀPd`` of a step before momentum and learning rate, in units of the
            loss's output curvature; None for no bound; or ``"graft"``: each parameter's step gets the norm of its
            gradient, as in SGD, in place of a bound. Default: 5e-3.
        weight_decay: ω, decoupled from the curvature. Default: 0.
        maximize: Maximize the loss, which must be concave in the output.
        averages: Columns, layers and schedule of the running averages. Default: ``KroneckerAveraging()``.

    Param groups may have their own ``lr``, ``weight_decay``, ``momentum`` and ``maximize`` (the same in all groups). A
    new group, or a parameter that is unfrozen, starts the averages anew; hooks are taken from the network when the
    optimizer is garbage, and copies of the network alone have none.

    Raises:
        ValueError: an argument is out of range or does nothing, or a parameter is not the network's.
        TypeError: the network is missing, or an argument is of another type.
        ModelError: the network is compiled, scripted or wrapped for parallel training.

    Source:
        Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015), for
        bandwidth 0; docs/banded.md for the band.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = KroneckerNewton(model, bandwidth=1, loss="mse")
        >>> losses = []
        >>> for _ in range(100):
        ...     inputs = torch.randn(32, 2)
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(inputs), inputs.prod(dim=1, keepdim=True))
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     losses.append(loss.item())
        >>> sum(losses[-10:]) < 0.5 * sum(losses[:10])
        True
    """

    _SHARDED = True
    _OWN = ("bandwidth", "loss", "curvature", "damping", "trust", "averages")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.5,
        bandwidth: Bandwidth | Literal["auto"] | KroneckerBandwidth = 0,
        *,
        model: nn.Module | None = None,
        loss: Loss | None = None,
        curvature: Curvature = "fisher",
        damping: float | KroneckerDamping = 2e-3,
        momentum: float = 0.5,
        trust: float | Literal["graft"] | None = 5e-3,
        weight_decay: float = 0.0,
        maximize: bool = False,
        averages: KroneckerAveraging = KroneckerAveraging(),  # noqa: B008 - frozen
    ) -> None:
        if bandwidth != "auto" and not isinstance(bandwidth, KroneckerBandwidth):
            check_bandwidth(bandwidth)
        check_type("averages", averages, KroneckerAveraging)
        if trust is not None and trust != "graft" and not (isinstance(trust, float | int) and trust > 0):
            raise ValueError(f'trust must be positive, "graft", or None for no trust region, got {trust!r}.')
        if bandwidth == 0 and averages.iterations is not None:
            raise ValueError("iterations are of conjugate gradients, of which bandwidth=0 needs none.")
        self.bandwidth = KroneckerBandwidth() if bandwidth == "auto" else bandwidth
        self.loss = declared_loss(loss)
        self.curvature: Curvature = curvature
        self.damping = damping if isinstance(damping, KroneckerDamping) else KroneckerDamping(damping)
        self.trust: float | Literal["graft"] | None = trust
        self.averages = averages
        check_curvature(curvature, self.loss, averages)
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "momentum": momentum}
        super().__init__(params, model, defaults)
        self._attach()

    def _attach(self) -> None:
        """The engine, and with it hooks."""
        self._kronecker = KroneckerStep(
            self.model,
            self.param_groups,
            self.bandwidth,
            self.curvature,
            self.loss,
            self.damping,
            self.trust,
            self.averages,
            self._group,
        )

    @property
    def band(self) -> KroneckerBand:
        """The engine: its ``report()`` says how each parameter is treated."""
        return self._kronecker.band

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks; if so, it leaves the gradients scaled and marks itself here, so it can be refused."""
        return self.band.gathering.slope_is_missing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the network, with its own ``lr`` and ``weight_decay`` if wanted."""
        super().add_param_group(param_group)
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
            closure: Evaluates the loss of this step's batch, see :mod:`hessopt.closure.protocol`. It may be left out if
                the loss is declared or the curvature is ``"empirical"``; without it nothing waits for the device,
                except at decisions about the bandwidth.

        Returns:
            The loss before the step, detached; None without a closure.

        Raises:
            ClosureError: a closure is needed, or does not give a finite, differentiable loss; or the network was not
                called since the last step.
            ModelError: the output or the loss cannot be treated, or a gradient is sparse; or several processes do
                not begin alike, or drift apart (:func:`hessopt.separate_networks`).
            NotConvexError: the loss is not convex in the output (concave, if maximizing).

        In every one of these cases, and where the step is interrupted or runs out of memory, the parameters are as they
        were.
        """
        if asks_for_state(self, closure):
            return None
        self._refuse_join()
        refuse_scaler(self)
        with AllOrNothing():
            return self._kronecker.step(self.param_groups, closure, self._check_start)

    @property
    def gradient_norm(self) -> float | None:
        """‖g‖ of all parameters together before the last step; None where it was not looked at: without a closure."""
        return self._kronecker.gradient_norm

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_averages": self._kronecker.state_dict(self.param_groups)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_averages"})
        if "_kronecker" not in self.__dict__:  # a copy, not load_state_dict
            self._attach()
            self._kronecker.load_state_dict(state["_averages"], self.param_groups)

    def _blank(self, number: int, group: dict[str, Any], p: Tensor, zeros: Callable[[], Tensor]) -> dict[str, Any]:
        shared = {"kronecker": None} if number == 0 else {}
        momentum = {"momentum_buffer": zeros_of(p) if is_distributed(p) else zeros()} if group["momentum"] else {}
        return {**shared, **momentum}

    def _completed(self, state: dict[str, Any]) -> dict[str, Any]:
        saved = self._kronecker.state_dict(self.param_groups)
        entries: dict[Any, Any] = {number: {"momentum_buffer": buffer} for number, buffer in saved["momentum"].items()}
        entries.setdefault(0, {})["kronecker"] = saved["band"]
        return super()._completed({**state, "state": {**state["state"], **entries}})

    def _reduced(self, state: dict[str, Any]) -> dict[str, Any]:
        state = super()._reduced(state)
        keys = [key for group in state["param_groups"] for key in group["params"]]
        own = [state["state"].pop(key, {}) for key in keys]
        if "kronecker" not in own[0]:
            raise ValueError(f"the state of {name_of(self, 0)} lacks 'kronecker', the averages. Nothing was loaded.")
        momentum = {i: entry["momentum_buffer"] for i, entry in enumerate(own) if "momentum_buffer" in entry}
        self._kronecker.load_state_dict({"band": own[0]["kronecker"], "momentum": momentum}, self.param_groups)
        return state
