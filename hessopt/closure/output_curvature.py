"""Second derivative of the loss with respect to the network's output, one sample at a time, and its square root."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diagnostics.autograd.sample_mixing import mixes_samples
from diagnostics.errors import MemoryBudgetError
from diagnostics.estimators.symmetric_eigen import eigh
from hessopt.closure.hessian_rounding import formation_rounding, unit_rows
from hessopt.errors import ClosureError, ModelError, NotConvexError

ROUNDINGS = 64
"""How often the rounding of a second derivative's formation, as it is estimated, may make an eigenvalue negative.
Cross-entropy of logits up to 1e5 in any precision takes 0.3 of it at most, a log-sum-exp written out of logits up to
1e3, whose value loses digits already in the forward pass, less than 64; losses that are not convex exceed it by orders
of magnitude."""


def output_hessians(loss: Tensor | GradientEdge, output: Tensor) -> Tensor:
    """``K_b = ∂²ℓ / ∂z_b ∂z_b`` of every sample b, by batched double back-propagation.

    Args:
        loss: Scalar ℓ, or its place, on the tape of ``output``; a sum over samples of functions of ``z_b`` alone, as
            the means and sums of PyTorch's losses are (see :func:`check_separable`).
        output: z, ``(B, …)``, with K entries a sample; not a leaf without grad.

    Returns:
        ``(B, K, K)``, symmetric, in at least float32.
    """
    batch, width = output.shape[0], output[0].numel()
    dtype = torch.promote_types(output.dtype, torch.float32)
    zeros = output.new_zeros(batch, width, width, dtype=dtype)
    gradient = _slope(loss, output)
    if not gradient.requires_grad or width == 0:
        return zeros  # the loss is piecewise linear in z
    seeds = unit_rows(output).reshape(width, *output.shape)
    (rows,) = torch.autograd.grad(gradient, output, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
    if rows is None:
        return zeros
    hessians = rearrange(rows.reshape(width, batch, width), "row b column -> b row column").to(dtype)
    return (hessians + hessians.mT) / 2


def _slope(loss: Tensor | GradientEdge, output: Tensor) -> Tensor:
    """``∂ℓ/∂z``, on its tape."""
    if not output.requires_grad:
        raise ClosureError(
            "the output that the loss is computed from has no autograd tape. Return it without `.detach()`."
        )
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ClosureError(
            f"the loss is not computed from the output, of shape {tuple(output.shape)}, that it came with: this is a "
            "copy, or of another call. Let the closure return `(loss, output)` with the very tensor."
        )
    return gradient


def loss_roots(loss: Tensor | GradientEdge, output: Tensor, sign: int = 1) -> Tensor:
    """Square roots of the loss's second derivatives: :func:`curvature_roots` of :func:`output_hessians`.

    What is negative by the rounding of their formation (:func:`hessopt.closure.hessian_rounding.formation_rounding`,
    which is estimated only where an eigenvalue is negative) counts as zero.

    Args:
        loss: ℓ, or its place, on the tape of ``output``, which is retained.
        output: z, ``(B, …)``.
        sign: -1: of minus the loss.

    Returns:
        ``(K', B, K)``, in at least float32.

    Raises:
        NotConvexError: the loss is not convex in the output, or its second derivative is not finite.
    """
    hessians = output_hessians(loss, output)
    return curvature_roots(sign * hessians, output.dtype, lambda: formation_rounding(loss, output, hessians))


def curvature_roots(
    hessians: Tensor, precision: torch.dtype | None = None, rounding: Callable[[], Tensor] | None = None
) -> Tensor:
    """Square roots ``S_b`` with ``S_bᵀ S_b = K_b``, by the spectral decomposition.

    Rows that are zero, up to rounding, for all samples are left out: the softmax cross-entropy over K classes has K-1.

    Args:
        hessians: ``(B, K, K)``, symmetric.
        precision: The dtype that they were computed in, if that is less than their own.
        rounding: Gives the error of each of them, ``(B,)``, that their formation has beyond that of their entries;
            asked for only where an eigenvalue is negative. None: there is none.

    Returns:
        ``(K', B, K)`` with ``K' <= K``: entry ``[k, b]`` is row k of ``S_b``.

    Raises:
        NotConvexError: an eigenvalue is negative beyond rounding, or not finite.
    """
    batch, width, _ = hessians.shape
    if not hessians.isfinite().all():
        raise NotConvexError(
            "the second derivative of the loss with respect to the network's output is not finite, although the loss "
            "is. Use a loss that is twice differentiable at these outputs, e.g. computed from logits."
        )
    if not hessians.numel():
        return hessians.new_zeros(0, batch, width)
    eigenvalues, eigenvectors = eigh(hessians)
    unit = 4 * width * torch.finfo(hessians.dtype).eps
    largest, lowest = torch.stack([eigenvalues.abs().amax(), eigenvalues.amin()]).tolist()
    own = 4 * width * torch.finfo(precision or hessians.dtype).eps * largest + torch.finfo(hessians.dtype).tiny
    if lowest < -own:
        excess = eigenvalues[:, 0] + own
        if rounding is not None:
            excess = excess + ROUNDINGS * rounding()
        _check_convex(excess, eigenvalues[:, 0], largest)
    kept = eigenvalues > unit * largest
    roots = rearrange(
        torch.where(kept, eigenvalues, 0).sqrt().unsqueeze(1) * eigenvectors, "b column row -> row b column"
    )
    used: Tensor = roots[kept.any(dim=0)]
    return used.contiguous()


def _check_convex(excess: Tensor, lowest: Tensor, largest: float) -> None:
    """Raise the error about the sample that exceeds rounding most, if one does."""
    worst = int(excess.argmin())
    if not float(excess[worst]) >= 0:
        raise NotConvexError(
            "the loss is not convex in the network's output: its second derivative has the eigenvalue "
            f"{float(lowest[worst]):.3g} (largest magnitude {largest:.3g}), so the Gauss-Newton matrix is not positive "
            "semidefinite. Let the closure return `(loss, output)` with an output in which the loss is convex (logits "
            "instead of probabilities), or `hessopt.LeastSquares(residuals)`; with maximize=True the loss must be "
            "concave."
        )


def residual_roots(residuals: Tensor) -> Tensor:
    """The roots of ``½ Σ r²``, whose second derivative is the identity: ``(K, B, K)`` for residuals ``(B, …)``."""
    dtype = torch.promote_types(residuals.dtype, torch.float32)
    return unit_rows(residuals).to(dtype)


def check_hessian_memory(output: Tensor, limit: int) -> None:
    """Raise a MemoryBudgetError if the ``(B, K, K)`` second derivatives and their workspace exceed ``limit`` bytes."""
    batch, width = output.shape[0], output[0].numel()
    needed = 3 * batch * width**2 * max(output.element_size(), 4)
    if needed > limit:
        raise MemoryBudgetError(
            f"the loss's second derivatives for {batch} samples with {width} outputs each need {needed / 2**30:.1f} "
            f"GiB, more than the limit of {limit / 2**30:.1f} GiB. Use a smaller batch or raise memory_limit."
        )


def check_separable(loss: Tensor | GradientEdge, output: Tensor) -> None:
    """Check that ``∂ℓ/∂z_b`` depends on ``z_b`` alone, by :func:`diagnostics.autograd.sample_mixing.mixes_samples`.

    Raises:
        ModelError: the loss couples samples.
    """
    gradient = _slope(loss, output)
    if gradient.requires_grad and mixes_samples([gradient], [output]):
        raise ModelError(
            "the loss is not a sum or mean over samples of a loss of each sample alone (a root of a mean, a "
            "contrastive loss), so its curvature couples the samples. Use a loss that is such a sum, e.g. the "
            "mean-squared error instead of its root, or let the closure return `hessopt.LeastSquares(residuals)`."
        )
