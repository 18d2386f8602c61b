"""Columns of the loss's output curvature, to be back-propagated: sampled, sketched or exact."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from hessopt.errors import ModelError
from hessopt.output_curvature import curvature_roots, output_hessians

Loss: TypeAlias = Literal["cross_entropy", "mse", "bce_with_logits"]
Reduction: TypeAlias = Literal["mean", "sum", "batchmean"]
Columns: TypeAlias = int | Literal["exact"]

LOSSES = ("cross_entropy", "mse", "bce_with_logits")
REDUCTIONS = ("mean", "sum", "batchmean")
MAX_OUTPUTS = 256
"""Outputs a sample up to which the output Hessian of a loss that is not declared is formed."""


def class_dimension(z: Tensor) -> int:
    """Dimension of the classes, as ``torch.nn.functional.cross_entropy`` has it."""
    return -1 if z.ndim < 3 else 1


def likelihood_of(loss: Loss, z: Tensor) -> Likelihood:
    """The likelihood whose negative logarithm the loss is, up to a factor."""
    match loss:
        case "cross_entropy":
            return Categorical(class_dimension(z))
        case "mse":
            return Gaussian()
        case _:
            return Bernoulli()


def loss_factor(loss: Loss, reduction: Reduction, z: Tensor) -> float:
    """The factor c of the loss on the negative log-likelihood of one unit."""
    if reduction == "sum":
        count = 1
    elif reduction == "batchmean":
        count = len(z)
    else:
        count = z.numel() // (z.shape[class_dimension(z)] if loss == "cross_entropy" else 1)
    return (2.0 if loss == "mse" else 1.0) / max(count, 1)


def declared_columns(
    loss: Loss, reduction: Reduction, z: Tensor, columns: Columns, sampled: bool, generator: torch.Generator
) -> Tensor:
    """Columns s of a declared loss, ``(K, *z.shape)``, with ``E Σ_k s_k s_kᵀ = ∂²ℓ/∂z²`` within each unit.

    Args:
        loss: ``"cross_entropy"`` (classes along the last dimension of ``(B, C)``, the second of ``(B, C, …)``),
            ``"mse"`` or ``"bce_with_logits"``.
        reduction: Of the loss: mean over everything, sum, or sum over everything divided by B.
        z: The output, detached.
        columns: K, or ``"exact"``: one for each output, and the expectation is exact.
        sampled: Scores of targets drawn from the model's distribution (Monte-Carlo Fisher); else ``S ε`` with a root S
            of the curvature in closed form and random signs ε.
        generator: Source of the draws.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    factor = loss_factor(loss, reduction, z)
    if columns == "exact":
        return _exact(loss, z) * math.sqrt(factor)
    if sampled:
        scores = likelihood_of(loss, z).scores(z, columns, generator)
    else:
        signs = _signs((columns, *z.shape), z, generator)
        scores = _root(loss, z, signs)
    return scores.mul_((factor / columns) ** 0.5)


def _root(loss: Loss, z: Tensor, u: Tensor) -> Tensor:
    """``S u`` with ``S Sᵀ`` the Fisher information of the likelihood."""
    if loss == "mse":
        return u
    if loss == "bce_with_logits":
        return z.sigmoid().mul_(z.neg().sigmoid()).sqrt() * u
    dim = class_dimension(z)
    p = z.softmax(dim)
    along = (p.sqrt() * u).sum(dim if dim < 0 else dim + 1, keepdim=True)
    return p.sqrt() * u - p * along


def _exact(loss: Loss, z: Tensor) -> Tensor:
    """All columns of the root: one for each output of a sample, so that a column is within a single unit."""
    width = z[0].numel()
    units = torch.eye(width, dtype=z.dtype, device=z.device).view(width, 1, *z.shape[1:]).expand(width, *z.shape)
    return _root(loss, z, units)


def hessian_columns(loss: Tensor, output: Tensor, columns: Columns, generator: torch.Generator) -> Tensor:
    """Columns of any loss that is a sum over samples: roots of its output Hessians, or these times random signs.

    Args:
        loss: ℓ, on the tape of ``output``, which is retained.
        output: z, ``(B, …)``.
        columns: K, or ``"exact"``.
        generator: Source of the signs.

    Raises:
        ModelError: more than ``MAX_OUTPUTS`` outputs a sample.
        NotConvexError: the loss is not convex in the output.
    """
    width = output[0].numel()
    if width > MAX_OUTPUTS:
        raise ModelError(
            f"the loss is not declared, and its output Hessian is not formed for {width} outputs a sample (at most "
            f"{MAX_OUTPUTS}). Declare the loss, loss={' | '.join(map(repr, LOSSES))}, or return an output "
            'whose rows are one position each (`logits.flatten(0, 1)`), or use curvature="empirical".'
        )
    roots = curvature_roots(output_hessians(loss, output), output.dtype)
    if not len(roots):
        return torch.zeros(1, *output.shape, dtype=roots.dtype, device=roots.device)  # a loss linear in its output
    if columns != "exact":
        signs = _signs((columns, *roots.shape[:2]), roots, generator) / columns**0.5
        roots = torch.einsum("ckb,kbi->cbi", signs, roots)
    return roots.reshape(len(roots), *output.shape)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, dtype=like.dtype, device=like.device).mul_(2).sub_(1)
