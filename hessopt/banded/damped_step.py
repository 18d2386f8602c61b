"""One Levenberg-Marquardt step: more damping until the objective goes down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessopt.banded.quadratic_model import QuadraticModel
from hessopt.errors import SolveError
from hessopt.search.damping import NielsenDamping

Step = list[list[Tensor]]

_MOST_SOLVES = 6
ACCEPTANCE = 1e-4
"""Least ratio of actual to predicted reduction at which a step is accepted."""


@dataclass(frozen=True)
class DampedStep:
    """What one step of an optimizer did. The *last* solve is the accepted one if ``accepted``.

    Attributes:
        loss: The closure's loss before the step.
        trial_loss: The closure's loss after the last solve's step; None if it was not evaluated.
        gradient_norm: Norm of the objective's gradient (weight decay included, sign changed if maximizing).
        predicted_reduction: Reduction of the objective that the exact Gauss-Newton model predicts for the last solve's
            step; None if that solve failed.
        actual_reduction: Reduction of the objective by the last solve's step; None if it was not evaluated.
        ratio: Actual by predicted reduction, rounding discounted; None if the step was not evaluated.
        damping: Damping of the last solve.
        accepted: The parameters were changed.
        solves: Number of solves.
        closure_runs: Number of runs of the closure, the first one included.
        length: Multiple of the last solve's step that was taken; 0 if none was.
        rows: Rows that were drawn, of which all of these numbers are, rescaled; None without ``rows=``.
        whole_loss: The closure's loss of all rows after the step; None if it was not evaluated.
    """

    loss: float
    trial_loss: float | None
    gradient_norm: float
    predicted_reduction: float | None
    actual_reduction: float | None
    ratio: float | None
    damping: float
    accepted: bool
    solves: int
    closure_runs: int
    length: float
    rows: int | None = None
    whole_loss: float | None = None


@torch.no_grad()
def search_step(
    model: QuadraticModel,
    solve: Callable[[float], Step],
    evaluate: Callable[[], float],
    loss: Tensor,
    damping: NielsenDamping,
    *,
    max_rejections: int,
    maximize: bool = False,
) -> DampedStep:
    """Change the parameters by the first step that reduces the objective, raising the damping until one does.

    A step is rejected if its solve fails (``SolveError``), if its predicted reduction is not positive,
    or if the actual reduction, once evaluated, is less than 1e-4 of the predicted one or not a number. Both reductions
    are first enlarged by the rounding error of the loss, ``10 ε |loss|``, so that close to a minimum the ratio is one
    and not noise. If the step is zero everywhere, nothing happens.

    Args:
        model: The quadratic model at the current parameters, which it refers to.
        solve: ``solve(λ)``, the step for a damping.
        evaluate: The loss at the parameters as they are when it is called.
        loss: The loss at the current parameters; its dtype is the one that the loss is computed in.
        damping: λ, adapted in place.
        max_rejections: Rejections until the search gives up; the parameters are then what they were, bit for bit.
        maximize: The objective is minus the loss (plus the penalty of the weight decay).

    Returns:
        What happened. ``closure_runs`` counts one for the evaluation of ``loss``.

    Source:
        Nielsen, report IMM-REP-1999-05 (1999); Conn, Gould and Toint, "Trust-Region Methods" (2000), section 17.4.2,
        for the rounding.
    """
    before = loss.item()
    rounding = 10 * torch.finfo(loss.dtype).eps * abs(before)
    saved = [[p.clone() for p in parameters] for parameters in model.parameters]
    runs, solves, accepted = 1, 0, False
    used, trial_loss, predicted, actual, ratio = damping.value, None, None, None, None
    while not accepted and solves < max_rejections:
        used, trial_loss, predicted, actual, ratio = damping.value, None, None, None, None
        solves += 1
        try:
            step = solve(used)
        except SolveError:
            damping.reject()  # singular to working precision: more damping is the cure
            continue
        predicted = model.predicted_reduction(step)
        if not any(bool(d.any()) for layer in step for d in layer):
            break
        if predicted > 0:
            penalty = model.penalty_change(step)
            _add(model, step)
            try:
                trial_loss = evaluate()
                runs += 1
                actual = (trial_loss - before if maximize else before - trial_loss) - penalty
                ratio = (actual + rounding) / (predicted + rounding)
                accepted = ratio > ACCEPTANCE
            finally:
                if not accepted:
                    _restore(model, saved)
        if accepted and ratio is not None:
            damping.accept(ratio)
        else:
            damping.reject()
    norm = model.gradient_norm()
    return DampedStep(
        before, trial_loss, norm, predicted, actual, ratio, used, accepted, solves, runs, 1.0 if accepted else 0.0
    )


@torch.no_grad()
def take_step(model: QuadraticModel, solve: Callable[[float], Step], loss: Tensor, damping: float) -> DampedStep:
    """Change the parameters by the step for the given damping, without a trial.

    Args:
        model: The quadratic model at the current parameters, which it refers to.
        solve: ``solve(λ)``, the step for a damping.
        loss: The loss at the current parameters.
        damping: λ.

    Raises:
        SolveError: the solve failed. The parameters are what they were.
    """
    step = solve(damping)
    predicted = model.predicted_reduction(step)
    _add(model, step)
    return DampedStep(loss.item(), None, model.gradient_norm(), predicted, None, None, damping, True, 1, 1, 1.0)


@torch.no_grad()
def line_step(
    model: QuadraticModel,
    solve: Callable[[float], Step],
    evaluate: Callable[[], float],
    loss: Tensor,
    damping: NielsenDamping,
    *,
    adapt: bool = True,
    maximize: bool = False,
) -> DampedStep:
    """Change the parameters along the step for the given damping, as far as is best among 1, ½, ¼, ….

    Lengths are halved until the objective goes down, and then for as long as it goes down further. If it does not down
    to 2⁻³⁰, the parameters stay what they were, bit for bit. ``ratio``, ``predicted_reduction`` and
    ``actual_reduction`` are those of the length that was taken. The damping of the next step follows the length.

    Args:
        model: The quadratic model at the current parameters, which it refers to.
        solve: ``solve(λ)``, the step for a damping.
        evaluate: The loss at the parameters as they are when it is called.
        loss: The loss at the current parameters.
        damping: λ, adapted in place.
        adapt: Whether the length changes λ. A failed solve does not unless it does.
        maximize: The objective is minus the loss (plus the penalty of the weight decay).

    Raises:
        SolveError: the solve failed, also with 10⁵ times the damping. The parameters are what they were.

    Source:
        Müller and Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradient descent" (2023), whose
        line search this is.
    """
    before, runs = loss.item(), 1
    saved = [[p.clone() for p in parameters] for parameters in model.parameters]
    solves, used = 0, damping.value
    while True:
        solves += 1
        try:
            step = solve(used)
        except SolveError:
            if solves == _MOST_SOLVES:
                raise
            used *= 10
        else:
            break
    best: tuple[float, float, float] | None = None  # reduction, loss, length
    for halvings in range(31 if any(bool(d.any()) for layer in step for d in layer) else 0):
        scaled = [[d * 0.5**halvings for d in layer] for layer in step]
        penalty = model.penalty_change(scaled)
        try:
            _add(model, scaled)
            trial_loss = evaluate()
        finally:
            _restore(model, saved)
        runs += 1
        actual = (trial_loss - before if maximize else before - trial_loss) - penalty
        if actual > (0.0 if best is None else best[0]):
            best = actual, trial_loss, 0.5**halvings
        elif best is not None:
            break
    length = 0.0 if best is None else best[2]
    if adapt:
        damping.value = used
        damping.follow_length(length)
    norm = model.gradient_norm()
    if best is None:
        predicted = model.predicted_reduction(step)
        return DampedStep(before, None, norm, predicted, None, None, used, False, solves, runs, length)
    taken = [[d * length for d in layer] for layer in step]
    predicted = model.predicted_reduction(taken)
    _add(model, taken)
    ratio = best[0] / predicted if predicted > 0 else None
    return DampedStep(before, best[1], norm, predicted, best[0], ratio, used, True, solves, runs, length)


def _add(model: QuadraticModel, step: Sequence[Sequence[Tensor]]) -> None:
    for pair in zip(model.parameters, step, strict=True):
        for p, d in zip(*pair, strict=True):
            p.add_(d.to(p.dtype))


def _restore(model: QuadraticModel, saved: Sequence[Sequence[Tensor]]) -> None:
    for pair in zip(model.parameters, saved, strict=True):
        for p, value in zip(*pair, strict=True):
            p.copy_(value)
