"""Newton's method with conjugate gradients, with the full Hessian or the Gauss-Newton matrix."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.ranks.collectives import ranks_of
from hessopt.checks import check_choice, check_count, check_type
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.objective import Objective
from hessopt.closure.protocol import Closure, Evaluation
from hessopt.closure.runner import ClosureRunner
from hessopt.closure.step_curvature import StepCurvature, output_of
from hessopt.errors import ClosureError, ModelError
from hessopt.network.arguments import Params, network_of
from hessopt.network.processes import check_start, refuse_spread, unwrapped
from hessopt.network.saved_state import SavedState, asks_for_state
from hessopt.newton_cg.curvature_choice import CurvatureChoice
from hessopt.newton_cg.kept import Kept
from hessopt.newton_cg.preconditioners import RunningDiagonal
from hessopt.newton_cg.record import NewtonStep, both_models
from hessopt.newton_cg.trial import Setting, search_line, search_radius
from hessopt.newton_cg.truncated_cg import Exit, Path, truncated_cg
from hessopt.search.rules import LevenbergMarquardt, TrustRadius

Curvature: TypeAlias = Literal["auto", "hessian", "ggn"]

_log = logging.getLogger(__name__)


class NewtonCG(SavedState):
    r"""Truncated Newton method: a model of the loss is minimized by conjugate gradients, inside a trust region.

    .. math::
       \begin{aligned}
            &\textbf{input}: \theta_0, \; \gamma \text{ (lr)}, \; \Delta \text{ (radius)}, \; \omega \text{ (weight
                decay)}, \; \bar\eta \text{ (forcing)}, \; f(\theta)                                            \\
            &\textbf{for each step}                                                                            \\
            &\hspace{5mm} g \leftarrow \nabla f(\theta) \;\; (-\nabla f \text{ if maximize}) + \omega \theta    \\
            &\hspace{5mm} B \leftarrow \omega I + \nabla^2 f = \omega I + J^\top \nabla^2 \ell \, J + T
                \;\text{ or, without } T, \; \omega I + J^\top \nabla^2 \ell \, J                               \\
            &\hspace{5mm} \eta \leftarrow \min(\bar\eta, \; 0.9 \, (\lVert g \rVert /
                \lVert g_{\text{before}} \rVert)^2)                                                             \\
            &\hspace{5mm} \textbf{repeat}                                                                      \\
            &\hspace{10mm} d \leftarrow \text{the path of conjugate gradients for } g^\top d + \tfrac12 d^\top B d
                \text{ to } \lVert g + B d \rVert \le \eta \lVert g \rVert, \text{ cut at }
                \lVert d \rVert = \Delta                                                                        \\
            &\hspace{10mm} \rho \leftarrow \big(f(\theta) - f(\theta + \gamma d)\big) \, / \,
                \big({-\gamma g^\top d} - \tfrac12 \gamma^2 d^\top B d\big)                                      \\
            &\hspace{10mm} \textbf{if } \rho > 10^{-4}: \; \theta \leftarrow \theta + \gamma d, \;
                \Delta \text{ grows if } \rho > \tfrac34, \text{ shrinks if } \rho < \tfrac14, \;
                \textbf{stop}                                                                                  \\
            &\hspace{10mm} \textbf{else } \Delta \leftarrow t \lVert d \rVert, \; t \in [\tfrac1{16}, \tfrac12]
       \end{aligned}

    In :math:`\rho`, :math:`f` includes the weight decay. A rejected trial needs no new product, as the path is cut
    again (:class:`hessopt.newton_cg.truncated_cg.Path`); after ``max_trials`` the parameters are what they were, bit
    for bit. A direction of negative curvature is followed to the boundary. Reductions below the rounding error of the
    loss, :math:`10 \epsilon |f|`, are discounted in :math:`\rho`. So with the full Hessian, and γ = 1, convergence
    near a minimum is quadratic up to the last digits.

    With ``method=LevenbergMarquardt()``, conjugate gradients solve ``(B + λI) d = −g`` without a radius, a rejected
    step is followed by a line search back along it, and λ follows :math:`\rho` of the full step by Nielsen's rule
    (:class:`hessopt.search.damping.NielsenDamping`). Negative curvature is then followed for ``gᵀd / ‖dᵀ(B + λI)d‖``.

    **Curvature.** ``"auto"`` chooses between the two for every step, by the rule of
    :class:`hessopt.newton_cg.curvature_choice.CurvatureChoice`. Where the network's output is not known (no module; a
    module that was not called exactly once; a loss that reaches parameters in another way), it is the full Hessian,
    and that is logged once.

    **Closure.** See :mod:`hessopt.closure.protocol`: it returns the loss, ``(loss, output)`` or a
    :class:`hessopt.LeastSquares`, and may or may not call ``backward()``. If it does, ``.grad`` is the gradient
    (gradient clipping is respected); if not, no ``.grad`` is touched. Bf16 autocast may be used inside;
    :class:`torch.amp.GradScaler` takes no closures.

    **Cost.** One forward and one backward pass, whose tape is kept; a product with the full Hessian is twice a
    gradient, with the Gauss-Newton matrix 4/3 (counted in matrix products); a third for each trial. Memory: one vector
    of the parameters' size for each product of a step.

    Args:
        params: The network, or parameters in any form that :mod:`torch.optim` takes.
        lr: γ, a factor on the step; at least 0. Default: 1.
        curvature: ``"auto"``, ``"hessian"`` or ``"ggn"`` (the generalized Gauss-Newton matrix). Default: ``"auto"``.
        model: The network, if ``params`` is not the network itself; may be left out, see above.
        method: :class:`hessopt.TrustRadius` or :class:`hessopt.LevenbergMarquardt`, with its options. Default:
            ``TrustRadius(radius=1)``.
        preconditioner: Of conjugate gradients, and the norm of the radius: ``"none"``; ``"diagonal"``, a running
            estimate of the curvature's diagonal (:class:`hessopt.newton_cg.preconditioners.RunningDiagonal`, one
            product a step); or ``v ↦ M⁻¹v`` for vectors of all parameters, flattened and concatenated in the order of
            the param groups, symmetric positive definite. Default: ``"none"``.
        weight_decay: ω, the objective has the additional term ω/2·‖θ‖². Default: 0.
        maximize: Maximize the loss; the weight decay is still a penalty.
        max_products: Most products of conjugate gradients in a step. Default: 250.
        max_trials: Most trials in a step. Default: 10.
        forcing: Bound of the tolerance η, in (0, 1). Default: 0.5.
        warm_start: Begin conjugate gradients at the best multiple of the last step (one product). Default: False.

    Param groups may have their own ``lr``, ``weight_decay`` and ``maximize`` (the same in all groups). Different
    learning rates cost one product a trial.

    Attributes:
        last_step: A :class:`NewtonStep`, or None before the first step.

    Raises:
        ValueError: an argument is out of range.
        TypeError: ``model`` is not a module.
        ModelError: a module is scripted or compiled, and has no second derivative.

    Source:
        Steihaug 1983; Conn, Gould and Toint, "Trust-Region Methods" (2000); Martens 2010; η: Eisenstat and Walker
        1996, choice 2.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = NewtonCG(model)
        >>> inputs = torch.randn(32, 2)
        >>> def closure():
        ...     return nn.functional.mse_loss(model(inputs), inputs.prod(dim=1, keepdim=True))
        >>> losses = [optimizer.step(closure).item() for _ in range(20)]
        >>> losses[-1] < 0.1 * losses[0]
        True
    """

    _OWN = (
        "curvature",
        "method",
        "preconditioner",
        "max_products",
        "max_trials",
        "forcing",
        "warm_start",
        "last_step",
        "_region",
        "_damping",
    )
    _group: Any = None
    _TENSORS = ("model_ggn", "model_hessian", "direction", "diagonal")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        curvature: Curvature = "auto",
        *,
        model: nn.Module | None = None,
        method: TrustRadius | LevenbergMarquardt | None = None,
        preconditioner: str | Callable[[Tensor], Tensor] = "none",
        weight_decay: float = 0.0,
        maximize: bool = False,
        max_products: int = 250,
        max_trials: int = 10,
        forcing: float = 0.5,
        warm_start: bool = False,
    ) -> None:
        self.model, self._group = unwrapped(network_of(params, model))
        _check_eager(self.model)
        check_choice("curvature", curvature, ("auto", "hessian", "ggn"))
        method = TrustRadius() if method is None else method
        check_type("method", method, TrustRadius, LevenbergMarquardt)
        if not callable(preconditioner):
            check_choice("preconditioner", preconditioner, ("none", "diagonal"), ", or a function v ↦ M⁻¹v")
        for name, count in (("max_products", max_products), ("max_trials", max_trials)):
            check_count(name, count)
        if not 0 < forcing < 1:
            raise ValueError(f"forcing must lie in (0, 1), got {forcing}.")
        if warm_start and callable(preconditioner):
            raise ValueError(
                "warm_start needs products with M, and a preconditioner that is a function gives only those with M⁻¹; "
                'use preconditioner="none" or "diagonal".'
            )
        self.curvature: Curvature = curvature
        self.method = method
        self.preconditioner = preconditioner
        self.max_products = max_products
        self.max_trials = max_trials
        self.forcing = forcing
        self.warm_start = warm_start
        self.last_step: NewtonStep | None = None
        self._region = (method if isinstance(method, TrustRadius) else TrustRadius()).start()
        self._damping = (method if isinstance(method, LevenbergMarquardt) else LevenbergMarquardt()).start()
        self._verified = self._told = self._compared = False
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, defaults)
        refuse_spread("NewtonCG", self.model, [p for group in self.param_groups for p in group["params"]])

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Evaluates the loss of this step's batch, see :mod:`hessopt.closure.protocol`.

        Returns:
            The loss before the step, detached.

        Raises:
            ClosureError: the closure is missing, does not give a finite, differentiable loss, or does not give what
                ``curvature="ggn"`` needs; or gradient or curvature are not finite.
            DiagnosticsError: an operation has no second derivative.
            ModelError: several processes train together, and their parameters differ at the first step.

        In every one of these cases, and where the step is interrupted or runs out of memory, the parameters are as they
        were; a copy of them is kept during the step.
        """
        if asks_for_state(self, closure):
            return torch.tensor(math.nan)
        if closure is None:
            raise ClosureError(
                "NewtonCG.step() needs a closure: the loss's curvature and the trial of the step cannot be had from "
                "`.grad` alone. Pass a function that returns the loss: `optimizer.step(lambda: loss_fn(model(x), y))`. "
                "torch.amp.GradScaler cannot pass one on; use bfloat16 autocast inside the closure, which needs no "
                "scaler."
            )
        objective = Objective(self.param_groups)
        names = ("last_step", "_verified", "_told", "_compared")
        with AllOrNothing(objective.parameters, state=self.state, owner=self, names=names):
            return self._step(closure, objective)

    def _step(self, closure: Closure, objective: Objective) -> Tensor:
        """The step, which changes parameters and state at its end."""
        ranks = ranks_of(group=self._group)
        if not self._compared:
            check_start("NewtonCG", ranks, objective.parameters, [], len(self.state))
            self._compared = ranks.size > 1
        runner = ClosureRunner(closure, objective.parameters, self.model, twice_differentiable=True, ranks=ranks)
        evaluation = runner.evaluate()
        output = self._output(evaluation, objective.parameters)
        tape = StepCurvature(evaluation.loss, objective.parameters, output, verify=not self._verified, ranks=ranks)
        kept = Kept(self.state, self.param_groups[0]["params"][0], objective)
        choice = CurvatureChoice(**kept.numbers.get("choice", {}))
        auto = self.curvature == "auto" and output is not None
        kind = choice.kind if auto else "hessian" if output is None else "ggn"
        left = [p.grad for p in objective.parameters] if evaluation.backward_called else None
        slope = tape.gradient(kind) if left is None else objective.flat(left)
        if left is not None:
            ranks.mean_([slope])  # that of what DistributedDataParallel has averaged is the same again
        g = objective.gradient(slope)
        norm = float(torch.linalg.vector_norm(g))
        if auto:
            kind = choice.begin(norm, kept.model_errors(g))
        product = objective.curvature(tape.ggn if kind == "ggn" else tape.hessian)
        model = Setting(objective, g, product, evaluation.mean_loss, runner, self.max_trials)

        region, damping = kept.restored(self._region), kept.restored(self._damping)
        shift = damping.value if isinstance(self.method, LevenbergMarquardt) else 0.0
        forcing = kept.forcing(norm, self.forcing)
        path, diagonal = self._path(kept, model, forcing, math.inf if shift else region.radius, shift)
        trial = search_line(model, path, damping) if shift else search_radius(model, path, region)
        models = None
        if auto:
            if trial.accepted and choice.due(tape.work, trial.ratio, trial.count):
                models = both_models(model, trial, path, shift, tape, kind)
            choice.end(norm, region.radius, path, 1 + tape.work, models.gap if models else None)
        if trial.accepted and trial.step is not None:
            objective.move(trial.step)
        self._verified = True

        numbers = {"gradient_norm": norm, "forcing": forcing, "choice": choice.state_dict()}
        kept.keep(
            {**region.state_dict(), **numbers, **damping.state_dict()},
            model_ggn=models.ggn if models else None,
            model_hessian=models.hessian if models else None,
            direction=trial.cut.step if self.warm_start and trial.accepted else None,
            diagonal=diagonal.estimate if diagonal else None,
        )
        reason = choice.why if auto else "no output" if self.curvature == "auto" else "given"
        self.last_step = NewtonStep.of(model, norm, trial, path, (kind, reason), models, forcing, region, damping, tape)
        _log.debug("step %d: %s", kept.numbers["step"], self.last_step)
        return model.loss

    @property
    def gradient_norm(self) -> float | None:
        """‖g‖ of the objective before the last step; None before the first."""
        return None if self.last_step is None else self.last_step.gradient_norm

    def _blank(self, number: int, group: dict[str, Any], p: Tensor, zeros: Callable[[], Tensor]) -> dict[str, Any]:
        kept = (
            *(("model_ggn", "model_hessian") if self.curvature == "auto" else ()),
            *(("direction",) if self.warm_start else ()),
            *(("diagonal",) if self.preconditioner == "diagonal" else ()),
        )
        shared: dict[str, Any] = dict.fromkeys(("radius", "damping", "growth", "gradient_norm", "forcing"), math.nan)
        shared.update(step=0, choice=CurvatureChoice().state_dict())
        return {**(shared if number == 0 else {}), **{name: zeros() for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._verified = self._told = self._compared = False

    def _output(self, evaluation: Evaluation, parameters: list[Tensor]) -> Tensor | None:
        """What the loss is a function of; None for the full Hessian.

        Raises:
            ClosureError: ``curvature="ggn"``, and it is not known.
        """
        if self.curvature == "hessian":
            return None
        try:
            return output_of(evaluation, parameters, known=self.model is not None)
        except ClosureError as error:
            if self.curvature == "ggn":
                raise ClosureError(f'curvature="ggn" needs the network\'s output: {error}') from None
            if not self._told:
                level = logging.INFO if self.model is None else logging.WARNING
                _log.log(level, "NewtonCG uses the full Hessian: %s", error)
                self._told = True
            return None

    def _path(
        self, kept: Kept, model: Setting, forcing: float, radius: float, shift: float
    ) -> tuple[Path, RunningDiagonal | None]:
        """The path of conjugate gradients on ``B + shift``, and what they were preconditioned with.

        Raises:
            ClosureError: the curvature is not finite.
        """

        def damped(v: Tensor) -> Tensor:
            return model.product(v) + shift * v

        bent = damped if shift else model.product
        diagonal = None
        if self.preconditioner == "diagonal":
            diagonal = RunningDiagonal(kept.vector("diagonal"))
            diagonal.update(bent, model.gradient, torch.Generator().manual_seed(kept.numbers.get("step", 0)))
        path = truncated_cg(
            bent,
            model.gradient,
            radius=radius,
            tolerance=forcing,
            max_products=self.max_products,
            solve=self.preconditioner if callable(self.preconditioner) else diagonal.solve if diagonal else None,
            start=kept.vector("direction") if self.warm_start else None,
            metric=diagonal.metric if diagonal else None,
        )
        if path.exit is Exit.NOT_FINITE and not path.segments:
            raise ClosureError(
                "the curvature is not finite at the current parameters, which were left as they are, although the "
                "gradient is (a norm or a root at zero?)."
            )
        return path, diagonal


def _check_eager(model: nn.Module | None) -> None:
    for name, module in () if model is None else model.named_modules():
        compiled = torch._dynamo.eval_frame.OptimizedModule in type(module).__mro__
        if compiled or module._compiled_call_impl is not None or isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"module {name or type(module).__name__!r} is compiled or scripted, and compiled code has no second "
                "derivative. Pass the original nn.Module and call that in the closure; both share their parameters."
            )
