"""From the path of conjugate gradients to new parameters: trials until the objective goes down."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from hessopt.closure.objective import Objective
from hessopt.closure.runner import ClosureRunner
from hessopt.newton_cg.truncated_cg import Cut, Path
from hessopt.search.damping import NielsenDamping
from hessopt.search.line_search import line_search
from hessopt.search.trust_region import ACCEPTANCE, TrustRegion


@dataclass(frozen=True)
class Trial:
    """The last trial of a step; it is the accepted one if ``accepted``.

    Attributes:
        cut: The point of the path that was tried.
        step: The change of the parameters that was tried, learning rates included; None if there was nothing to try.
        loss: The closure's loss there; None if it was not evaluated.
        predicted: Reduction of the objective by the model.
        actual: Reduction of the objective; None if it was not evaluated.
        ratio: Actual by predicted reduction, rounding discounted.
        accepted: It is good; the parameters are still as they were.
        count: Number of trials.
    """

    cut: Cut
    step: Tensor | None
    loss: float | None
    predicted: float
    actual: float | None
    ratio: float | None
    accepted: bool
    count: int


@dataclass(frozen=True)
class Setting:
    """What both kinds of trials need.

    Attributes:
        objective: Parameters and their groups.
        gradient: Of the objective.
        product: ``v ↦ B v`` of the model, without damping.
        loss: The closure's loss before the step.
        runner: Evaluates the closure again.
        max_trials: Most evaluations.
    """

    objective: Objective
    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    loss: Tensor
    runner: ClosureRunner
    max_trials: int

    @property
    def rounding(self) -> float:
        """Changes of the loss that mean nothing, as in :mod:`hessopt.banded.damped_step`."""
        return 10 * torch.finfo(self.loss.dtype).eps * abs(self.loss.item())

    def model(self, cut: Cut, damping: float = 0.0) -> tuple[Tensor, float, float]:
        """Step ``γ d``, its ``gᵀγd`` and ``γdᵀ B γd``; one product where groups differ in their learning rates."""
        rates = self.objective.rates
        step = rates * cut.step
        if isinstance(rates, Tensor):
            return step, float(self.gradient @ step), float(step @ self.product(step))
        curvature = cut.curvature - (damping * float(cut.step @ cut.step) if damping else 0.0)
        return step, rates * cut.slope, rates * rates * curvature

    def trial(self, step: Tensor) -> tuple[float, float]:
        """The closure's loss at ``θ + step``, and the change of the objective."""
        buffers = () if self.runner.module is None else tuple(self.runner.module.buffers())
        # The runner puts buffers back, bit for bit, which the tape would take for an error.
        with self.objective.moved(step) as objective_change, _unsafe_preserve_version_counter(buffers):
            loss = self.runner.trial_loss()
        return loss, objective_change(loss - self.loss.item())


def search_radius(setting: Setting, path: Path, region: TrustRegion) -> Trial:
    """Try the path's point within the radius; while that is rejected, shrink the radius and cut the path again.

    A step is accepted if the objective goes down by more than 1e-4 of what the model predicts, both discounted by
    rounding; a trial that is not finite is rejected. After ``max_trials`` the parameters are what they were, bit for
    bit, and the radius stays small.
    """
    rounding = setting.rounding
    count, last = 0, path.cut(region.radius)
    trial = Trial(last, None, None, 0.0, None, None, False, 0)
    while count < setting.max_trials:
        cut = last if count == 0 else path.cut(region.radius)
        step, slope, curvature = setting.model(cut)
        predicted = -slope - curvature / 2
        if not step.any():
            break
        count += 1
        if predicted <= 0:  # learning rates above 1, or different ones
            trial = Trial(cut, step, None, predicted, None, None, False, count)
            region.reject(cut.norm, slope, math.inf)
            continue

        loss, change = setting.trial(step)
        ratio = (rounding - change) / (predicted + rounding)
        trial = Trial(cut, step, loss, predicted, -change, ratio, ratio > ACCEPTANCE, count)
        if trial.accepted:
            region.accept(ratio, cut.norm)
            break
        region.reject(cut.norm, slope, change)
    return trial


def search_line(setting: Setting, path: Path, damping: NielsenDamping) -> Trial:
    """Try the path's end, which is a damped step; while that is rejected, go back along it.

    The damping follows the full step: it falls if that is accepted, and grows if not.
    """
    cut = path.cut(math.inf)
    step, slope, curvature = setting.model(cut, damping.value)
    predicted = -slope - curvature / 2
    if not step.any():
        return Trial(cut, None, None, 0.0, None, None, False, 0)
    if slope >= 0:  # learning rates above 1, or different ones
        damping.reject()
        return Trial(cut, step, None, predicted, None, None, False, 0)
    rounding = setting.rounding
    losses: dict[float, float] = {}

    def change_at(t: float) -> float:
        losses[t], change = setting.trial(t * step)
        return change

    found = line_search(change_at, slope, max_trials=setting.max_trials, rounding=rounding)
    t = found.length
    if t == 1.0 and predicted > 0:
        damping.accept((rounding - found.change) / (predicted + rounding))
    else:
        damping.reject()
    if t == 0.0:
        shortest = min(losses)
        return Trial(cut, shortest * step, losses[shortest], predicted, None, None, False, found.trials)
    predicted = -t * slope - t * t * curvature / 2
    ratio = (rounding - found.change) / (predicted + rounding)
    return Trial(cut, t * step, losses[t], predicted, -found.change, ratio, True, found.trials)
