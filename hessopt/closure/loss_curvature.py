"""Second derivatives of losses in their input in closed form: Fisher information of a likelihood, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.operators.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

LossName: TypeAlias = Literal["cross_entropy", "mse", "bce_with_logits", "poisson_nll"]
Loss: TypeAlias = LossName | nn.Module
Reduction: TypeAlias = Literal["mean", "sum", "batchmean"]
Columns: TypeAlias = int | Literal["exact"]

LOSSES = ("cross_entropy", "mse", "bce_with_logits", "poisson_nll")
REDUCTIONS = ("mean", "sum", "batchmean")


@dataclass(frozen=True)
class LossCurvature:
    """``∂²ℓ/∂z² = c F(z)``, with the Fisher information F of a likelihood and a factor c for each of its units.

    Attributes:
        output: z, what the loss is a function of, ``(B, …)``, on its tape if it has one.
        likelihood: Of the targets given z.
        factor: c, at least 0: a number, or a tensor that broadcasts to z and is constant within units.
    """

    output: Tensor
    likelihood: Likelihood
    factor: float | Tensor

    def columns(self, columns: Columns, sampled: bool, generator: torch.Generator) -> Tensor:
        """Columns s, ``(K, *z.shape)``, with ``E Σ_k s_k s_kᵀ = ∂²ℓ/∂z²`` within each unit.

        Args:
            columns: K, or ``"exact"``: one for each output of a sample, so that a column is within a single unit of it,
                and the expectation is exact.
            sampled: Scores of targets drawn from the model's distribution (Monte-Carlo Fisher); else ``S ε`` with a
                root S of the curvature and random signs ε.
            generator: Source of the draws.

        An output that is not finite has none: the columns are NaN, and nothing is drawn from what is no distribution.
        """
        z, share = _values(self.output), self.factor
        sound = z.isfinite().all()
        z = torch.where(sound, z, 0.0)
        if columns == "exact":
            width = z[0].numel()
            units = torch.eye(width, dtype=z.dtype, device=z.device).view(width, 1, *z.shape[1:])
            found = self.likelihood.root(z, units.expand(width, *z.shape))
        elif sampled:
            found, share = self.likelihood.scores(z, columns, generator), share / columns
        else:
            found, share = self.likelihood.root(z, random_signs((columns, *z.shape), z, generator)), share / columns
        root = share.sqrt() if isinstance(share, Tensor) else math.sqrt(share)
        return (found * root).masked_fill_(~sound, math.nan)


def class_dimension(z: Tensor) -> int:
    """Dimension of the classes, as ``torch.nn.functional.cross_entropy`` has it."""
    return -1 if z.ndim < 3 else 1


def named_curvature(loss: LossName, reduction: Reduction, z: Tensor) -> LossCurvature:
    """Of a loss by its name; targets do not matter.

    Args:
        loss: ``"cross_entropy"`` (classes along the last dimension of ``(B, C)``, the second of ``(B, C, …)``; with
            label smoothing or without), ``"mse"``, ``"bce_with_logits"`` or ``"poisson_nll"`` of logarithms of rates.
        reduction: Mean over everything, sum, or sum over everything divided by B.
        z: The output.
    """
    if reduction == "sum":
        count = 1
    elif reduction == "batchmean":
        count = len(z)
    else:
        count = z.numel() // (z.shape[class_dimension(z)] if loss == "cross_entropy" else 1)
    likelihoods: dict[str, Likelihood] = {
        "cross_entropy": Categorical(class_dimension(z)), "mse": Gaussian(), "bce_with_logits": Bernoulli(),
        "poisson_nll": Poisson(),
    }  # fmt: skip
    return LossCurvature(z, likelihoods[loss], (2.0 if loss == "mse" else 1.0) / max(count, 1))


def criterion_curvature(criterion: nn.Module, z: Tensor, target: Tensor, *more: Any) -> LossCurvature | None:
    """Of a loss module of :mod:`torch.nn` at its arguments; None where there is no closed form.

    ``CrossEntropyLoss`` with class weights, label smoothing, ignored targets and targets that are probabilities;
    ``MSELoss``; ``BCEWithLogitsLoss`` with both kinds of weights; ``PoissonNLLLoss`` of rates and of their logarithms;
    ``GaussianNLLLoss``, in mean and variance if the network gives both: then z is the two beside each other, and F,
    which is positive semidefinite, is only the expectation of the second derivative. A subclass with a ``forward`` of
    its own has none, nor have elementwise losses whose targets are broadcast.

    Args:
        criterion: The module.
        z: Its input.
        target: Of it.
        more: Further arguments.
    """
    form = _FORMS.get(getattr(type(criterion), "forward", None))
    return None if form is None else form(criterion, z, target.detach(), *more)


def check_criterion(criterion: nn.Module) -> None:
    """Raise a ValueError if the loss module is not reduced to a number, or not convex, having negative weights."""
    if getattr(criterion, "reduction", None) == "none":
        raise ValueError(
            f'the declared {type(criterion).__name__} has reduction="none", so how its values become a loss is not '
            'known. Declare one with reduction="mean" or "sum", or leave out loss= and pass a closure.'
        )
    for name in ("weight", "pos_weight"):
        weight = getattr(criterion, name, None)
        if isinstance(weight, Tensor) and bool((weight < 0).any()):
            raise ValueError(f"{name} of the declared {type(criterion).__name__} has negative entries.")


def random_signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """±1 with the dtype and device of ``like``."""
    return torch.randint(0, 2, shape, generator=generator, dtype=like.dtype, device=like.device).mul_(2).sub_(1)


def _values(z: Tensor) -> Tensor:
    """Detached, in at least float32."""
    return z.detach().to(torch.promote_types(z.dtype, torch.float32))


def _cross_entropy(loss: Any, z: Tensor, target: Tensor) -> LossCurvature:
    """With targets q the loss of a unit is ``-Σ_c a_c log p_c``, ``a = weight ∘ q``: its curvature is ``(Σ a) F``."""
    dim, values = class_dimension(z), _values(z)
    weight = values.new_ones(z.shape[dim]) if loss.weight is None else loss.weight.to(values)
    even = loss.label_smoothing * weight.mean()
    if target.is_floating_point():
        shape = [1] * z.ndim
        shape[dim] = -1
        factor = (1 - loss.label_smoothing) * (target * weight.view(shape)).sum(dim, keepdim=True) + even
        count: float | Tensor = z.numel() // z.shape[dim]
    else:
        seen = target != loss.ignore_index
        own = weight[target.where(seen, 0)] * seen
        factor = ((1 - loss.label_smoothing) * own + even * seen).unsqueeze(dim)
        count = own.sum()
    return LossCurvature(z, Categorical(dim), factor / count if loss.reduction == "mean" else factor)


def _elementwise(loss: Any, z: Tensor, target: Tensor, likelihood: Likelihood, factor: Tensor) -> LossCurvature | None:
    if target.shape != z.shape:
        return None  # broadcast: an entry of z has several targets
    return LossCurvature(z, likelihood, (factor / z.numel() if loss.reduction == "mean" else factor).expand_as(z))


def _mse(loss: Any, z: Tensor, target: Tensor) -> LossCurvature | None:
    return _elementwise(loss, z, target, Gaussian(), _values(z).new_tensor(2.0))


def _binary(loss: Any, z: Tensor, target: Tensor) -> LossCurvature | None:
    weight = _values(z).new_ones(()) if loss.weight is None else loss.weight
    if loss.pos_weight is not None:
        weight = weight * (1 + (loss.pos_weight - 1) * target)
    return _elementwise(loss, z, target, Bernoulli(), weight)


def _poisson(loss: Any, z: Tensor, target: Tensor) -> LossCurvature | None:
    if loss.log_input:
        return _elementwise(loss, z, target, Poisson(), _values(z).new_ones(()))
    if target.shape != z.shape:
        return None
    return _elementwise(loss, z, target, Gaussian(), target / (_values(z) + loss.eps).square())


def _gaussian(loss: Any, z: Tensor, target: Tensor, var: Tensor | float) -> LossCurvature | None:
    if not isinstance(var, Tensor):
        var = _values(z).new_tensor(var)
    elif var.shape != z.shape and var.shape == z.shape[:-1]:
        var = var.unsqueeze(-1)  # as in PyTorch
    precision = _values(var).clamp_min(loss.eps).reciprocal()
    if not var.requires_grad or target.shape != z.shape:
        return _elementwise(loss, z, target, Gaussian(), precision)
    shared = z.numel() // var.numel()  # entries of z that have the same variance
    factors = torch.cat([precision.expand_as(z).flatten(1), (shared * precision.square() / 2).flatten(1)], dim=1)
    both = torch.cat([z.flatten(1), var.flatten(1).to(z.dtype)], dim=1)
    return LossCurvature(both, Gaussian(), factors / z.numel() if loss.reduction == "mean" else factors)


_FORMS: dict[Any, Callable[..., LossCurvature | None]] = {
    nn.CrossEntropyLoss.forward: _cross_entropy,
    nn.MSELoss.forward: _mse,
    nn.BCEWithLogitsLoss.forward: _binary,
    nn.PoissonNLLLoss.forward: _poisson,
    nn.GaussianNLLLoss.forward: _gaussian,
}
