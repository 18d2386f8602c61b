"""What one step of Newton's method did, and what the two models of the gradient say about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessopt.closure.step_curvature import TRIAL_COST, StepCurvature
from hessopt.newton_cg.trial import Setting, Trial
from hessopt.newton_cg.truncated_cg import Exit, Path
from hessopt.search.damping import NielsenDamping
from hessopt.search.trust_region import TrustRegion


@dataclass(frozen=True)
class NewtonStep:
    """What one step of :class:`NewtonCG` did.

    Attributes:
        loss: The closure's loss before the step.
        trial_loss: The closure's loss at the last trial; None if there was none.
        gradient_norm: Norm of the objective's gradient (weight decay included, sign changed if maximizing).
        predicted_reduction: Reduction of the objective that the model predicts for the last trial.
        actual_reduction: Reduction of the objective by the last trial; None if it was not evaluated.
        ratio: Actual by predicted reduction, rounding discounted; None if it was not evaluated.
        accepted: The parameters were changed.
        curvature: ``"hessian"`` or ``"ggn"``.
        reason: Why that one.
        gap: What was measured of the gap between the two at this step; None if nothing was.
        exit: How the path of conjugate gradients ends at the last trial.
        iterations: Products of conjugate gradients.
        forcing: η, their tolerance.
        smallest_ritz: Smallest Ritz value of the (preconditioned) curvature on their Krylov space, an upper bound of
            its least eigenvalue; None without a product.
        radius: Δ after the step.
        damping: λ after the step.
        trials: Number of evaluations of the loss.
        products: Number of products by kind: ``"hessian"``, ``"ggn"``, ``"tensor"``.
        gradient_equivalents: Work of the whole step, see :data:`hessopt.closure.step_curvature.COST`.
    """

    loss: float
    trial_loss: float | None
    gradient_norm: float
    predicted_reduction: float
    actual_reduction: float | None
    ratio: float | None
    accepted: bool
    curvature: str
    reason: str
    gap: float | None
    exit: Exit
    iterations: int
    forcing: float
    smallest_ritz: float | None
    radius: float
    damping: float
    trials: int
    products: dict[str, int]
    gradient_equivalents: float

    @classmethod
    def of(
        cls,
        setting: Setting,
        norm: float,
        trial: Trial,
        path: Path,
        chosen: tuple[str, str],
        models: Models | None,
        forcing: float,
        region: TrustRegion,
        damping: NielsenDamping,
        tape: StepCurvature,
    ) -> NewtonStep:
        """The record of a step from its parts: ``norm`` is ‖g‖, ``chosen`` the curvature and the reason for it."""
        curvature, reason = chosen
        return cls(
            loss=float(setting.loss),
            trial_loss=trial.loss,
            gradient_norm=norm,
            predicted_reduction=trial.predicted,
            actual_reduction=trial.actual,
            ratio=trial.ratio,
            accepted=trial.accepted,
            curvature=curvature,
            reason=reason,
            gap=models.gap if models else None,
            exit=trial.cut.exit,
            iterations=path.products,
            forcing=forcing,
            smallest_ritz=path.ritz[0] if path.ritz else None,
            radius=region.radius,
            damping=damping.value,
            trials=trial.count,
            products=dict(tape.products),
            gradient_equivalents=1 + tape.work + trial.count * TRIAL_COST,
        )


@dataclass(frozen=True)
class Models:
    """Gradients that either model predicts for the end of a step, and the gap between them."""

    ggn: Tensor
    hessian: Tensor
    gap: float


def both_models(setting: Setting, trial: Trial, path: Path, shift: float, tape: StepCurvature, kind: str) -> Models:
    """Both models of the gradient at the end of the accepted step; what the used one says is known of its path."""
    objective, g, step = setting.objective, setting.gradient, trial.step
    assert step is not None
    if trial.count > 1 or isinstance(objective.rates, Tensor) or path.residual is None:
        tensor, gauss = tape.split(step)
        tensor, gauss = objective.sign * tensor, objective.sign * gauss + objective.decay * step
    else:
        bent = objective.rates * (path.residual - g - shift * trial.cut.step)
        if kind == "ggn":
            tensor, gauss = objective.sign * tape.tensor(step), bent
        else:
            gauss = objective.sign * tape.ggn(step) + objective.decay * step
            tensor = bent - gauss
    gap = torch.linalg.vector_norm(tensor) / torch.linalg.vector_norm(gauss)
    return Models(g + gauss, g + gauss + tensor, float(gap))
