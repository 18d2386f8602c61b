"""Square-root factors of a linear layer's curvature, kept as inputs and back-propagated seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from diagnostics.coupling import mixes_samples
from hessopt.errors import ModelError
from hessopt.linear_tape import LinearLayer


@dataclass(frozen=True)
class LinearFactor:
    """The factor ``Ĵ = S · ∂z/∂(W, b)`` of one linear layer, never formed: ``Ĵ[kb, (i, j)] = ĵ[k, b, i] · x[b, j]``.

    Rows are numbered by root column k and sample b, k slowest: ``N = K' · B``.

    Attributes:
        input: x, ``(B, d_in)``.
        cotangents: ĵ, ``(K', B, d_out)``: row k of the loss's root, back-propagated to the pre-activation.
        has_weight: The weight ``(d_out, d_in)`` is trained.
        has_bias: The bias ``(d_out,)`` is trained. Lists below hold the trained ones, the weight first.
    """

    input: Tensor
    cotangents: Tensor
    has_weight: bool
    has_bias: bool

    @property
    def size(self) -> int:
        """N, the number of rows."""
        return self.cotangents.shape[0] * self.cotangents.shape[1]

    def gram(self, damping: Sequence[float]) -> Tensor:
        """``Ĵ D⁻¹ Ĵᵀ``, ``(N, N)``, with a diagonal D that is constant on each parameter.

        Equals ``(x_b·x_b' / λ_W + 1 / λ_b) · (ĵ_kb·ĵ_k'b')``.

        Args:
            damping: The diagonal's value for each trained parameter.
        """
        scale = dict(zip(self._kinds, damping, strict=True))
        samples = self.input.new_zeros(len(self.input), len(self.input))
        if self.has_weight:
            samples += (self.input / scale["weight"]) @ self.input.mT
        if self.has_bias:
            samples += 1 / scale["bias"]
        rows = rearrange(self.cotangents, "k b i -> (k b) i")
        gram = rows @ rows.mT
        rearrange(gram, "(k b) (l c) -> k b l c", b=len(samples), c=len(samples)).mul_(samples.unsqueeze(1))
        return gram

    def trace(self) -> Tensor:
        """``‖Ĵ‖²_F``, the trace of the layer's curvature."""
        samples = self.input.square().sum(dim=1) * self.has_weight + float(self.has_bias)
        return einsum(self.cotangents.square(), samples, "k b i, b ->")

    def jvp(self, step: Sequence[Tensor]) -> Tensor:
        """``Ĵ s``, ``(N,)``, for a step s given as one tensor for each trained parameter."""
        parts = dict(zip(self._kinds, step, strict=True))
        change = self.input.new_zeros(self.cotangents.shape[1:])
        if self.has_weight:
            change += self.input @ parts["weight"].mT
        if self.has_bias:
            change += parts["bias"]
        return rearrange(einsum(self.cotangents, change, "k b i, b i -> k b"), "k b -> (k b)")

    def vjp(self, y: Tensor) -> list[Tensor]:
        """``Ĵᵀ y`` for y ``(N,)``, as one tensor for each trained parameter."""
        weights = rearrange(y, "(k b) -> k b", b=len(self.input))
        rows = einsum(weights, self.cotangents, "k b, k b i -> b i")
        products = {"weight": lambda: rows.mT @ self.input, "bias": lambda: rows.sum(dim=0)}
        return [products[kind]() for kind in self._kinds]

    @property
    def _kinds(self) -> list[str]:
        return ["weight"] * self.has_weight + ["bias"] * self.has_bias


def linear_factors(layers: Sequence[LinearLayer], output: Tensor, roots: Tensor) -> list[LinearFactor]:
    """The factors of all layers, by one batched back-propagation. The tape is freed.

    Args:
        layers: The trained layers, on the tape of ``output``.
        output: z, ``(B, …)``, with K entries a sample.
        roots: ``(K', B, K)``: row k of every sample's root.
    """
    dtype = roots.dtype
    sources = [layer.pre_activation for layer in layers]
    products: Sequence[Tensor | None] = [None] * len(layers)
    if len(roots):
        seeds = roots.reshape(len(roots), *output.shape).to(output.dtype)
        products = torch.autograd.grad(output, sources, seeds, allow_unused=True, is_grads_batched=True)
    factors = []
    for layer, product in zip(layers, products, strict=True):
        # No tape from the output to a layer: the output does not depend on it.
        cotangents = (
            layer.pre_activation.new_zeros(len(roots), *layer.pre_activation.shape) if product is None else product
        )
        factors.append(
            LinearFactor(
                layer.input.detach().to(dtype), cotangents.to(dtype), layer.weight is not None, layer.bias is not None
            )
        )
    return factors


def check_uncoupled(layers: Sequence[LinearLayer], output: Tensor, loss: Tensor | None) -> None:
    """Check that no sample's output depends on another sample, and that the loss is a sum over samples.

    Tested on the tape by :func:`diagnostics.coupling.mixes_samples`.

    Args:
        layers: The trained layers, on the tape of ``output``.
        output: z, ``(B, …)``.
        loss: The loss, to check that ``∂ℓ/∂z_b`` depends on ``z_b`` alone; None if it is known to.

    Raises:
        ModelError: samples are coupled.
    """
    sources = [layer.pre_activation for layer in layers]
    if mixes_samples([output], sources):
        raise ModelError(
            "the output of a sample depends on other samples of the batch (batch-norm in training mode, or another "
            "operation across the batch), so per-sample curvature does not exist. Put batch-norm into eval mode, use "
            "layer or group norm instead, or remove the operation."
        )
    if loss is None:
        return
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
    if gradient.requires_grad and mixes_samples([gradient], [output]):
        raise ModelError(
            "the loss is not a sum or mean over samples of a loss of each sample alone (a root of a mean, a "
            "contrastive loss), so its curvature couples the samples. Use a loss that is such a sum, e.g. the "
            "mean-squared error instead of its root, or let the closure return `hessopt.LeastSquares(residuals)`."
        )
