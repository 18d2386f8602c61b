"""Local derivatives in closed form of the commonest node: an activation of a linear map, ``σ(x Wᵀ + b)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diagnostics.autograd.tape import Function
from diagnostics.graph.graph import Node

ELEMENTWISE = frozenset(
    f"{name}Backward{i}"
    for name in (
        "Celu", "Cos", "Elu", "Exp", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "LogSigmoid", "Mish",
        "Relu", "Sigmoid", "Silu", "Sin", "Softplus", "Tanh",
    )
    for i in (0, 1)
)  # fmt: skip


@dataclass(frozen=True)
class DenseLayer:
    """A node ``σ(x Wᵀ + b)`` of one parent x, ``(B, d_in)``; σ element-wise, or the identity.

    Attributes:
        weight: W, ``(d_out, d_in)``.
        activation: Where on the tape the argument of σ is; None for the identity.
    """

    weight: Tensor
    activation: GradientEdge | None

    @classmethod
    def recognise(cls, node: Node, parents: Sequence[Node]) -> DenseLayer | None:
        """The layer, if the tape of ``node`` is exactly that; otherwise None."""
        if len(parents) != 1 or parents[0].value.ndim != 2:
            return None
        function, activation = node.segment.grad_fn, None
        if function is not None and function.name() in ELEMENTWISE and len(function.next_functions) == 1:
            inner, index = function.next_functions[0]
            if inner is not None:
                function, activation = inner, GradientEdge(inner, index)
        weight = None if function is None else _weight_of_linear(function, parents[0])
        return None if weight is None else cls(weight, activation)

    def slope(self, output: Tensor) -> Tensor | None:
        """σ′ at every entry, ``(B, d_out)``, on the tape; None for the identity."""
        if self.activation is None:
            return None
        (slope,) = torch.autograd.grad(output, [self.activation], torch.ones_like(output), create_graph=True)
        return slope

    def jacobian(self, slope: Tensor | None, samples: int) -> Tensor:
        """D = diag(σ′) W, ``(B, d_out, d_in)``."""
        if slope is None:
            return self.weight.expand(samples, -1, -1)
        return einsum(slope.detach(), self.weight, "s u, u p -> s u p")

    def back(self, slope: Tensor | None, signal: Tensor) -> Tensor:
        """Dᵀ δ, ``(B, d_in)``."""
        return (signal if slope is None else signal * slope.detach()) @ self.weight

    def curvature(self, slope: Tensor | None, signal: Tensor) -> Tensor | None:
        """K = Wᵀ diag(δ σ″) W, ``(B, d_in, d_in)``; None where σ″ vanishes everywhere."""
        if slope is None or self.activation is None or not slope.requires_grad:
            return None
        (bend,) = torch.autograd.grad(slope, [self.activation], signal, retain_graph=True, allow_unused=True)
        if bend is None or not bend.any():
            return None
        return einsum(self.weight, bend, "u p, s u -> s p u") @ self.weight


def _weight_of_linear(function: Function, parent: Node) -> Tensor | None:
    """W, if ``function`` is ``x Wᵀ + b`` of the parent itself, and neither W nor b is computed from it."""
    operands = [operand for operand, _ in function.next_functions]
    match function.name():
        case "AddmmBackward0" if function._saved_alpha == 1:  # type: ignore[attr-defined]
            bias, x, weight = operands
        case "MmBackward0":
            bias, (x, weight) = None, operands
        case _:
            return None
    transposed = weight is None or (weight.name() == "TBackward0" and _is_leaf(weight.next_functions[0][0]))
    # x is the copy that the cut handed on
    is_parent = x is not None and x.name() == "CloneBackward0" and _leaf(x.next_functions[0][0]) is parent.value
    if not (is_parent and transposed and (bias is None or _is_leaf(bias))):
        return None
    mat2: Tensor = function._saved_mat2  # type: ignore[attr-defined]
    return mat2.detach().mT


def _leaf(function: Function | None) -> Tensor | None:
    return getattr(function, "variable", None)


def _is_leaf(function: Function | None) -> bool:
    return function is None or _leaf(function) is not None
