"""Local derivatives in closed form of a linear or convolutional layer of an activation, ``W σ(f) + b``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from diagnostics.autograd.tape import batched_vjp
from diagnostics.graph.dense_layer import ELEMENTWISE
from diagnostics.graph.graph import Node

PlainLayer: TypeAlias = nn.Linear | nn.Conv2d


def is_plain_layer(module: nn.Module | None) -> TypeIs[PlainLayer]:
    """Whether this is PyTorch's linear or 2-D convolutional layer, with weights of its own and an unchanged output."""
    return (
        isinstance(module, nn.Linear | nn.Conv2d)
        and type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
        and isinstance(module._parameters.get("weight"), Tensor)
        and not module._forward_hooks
    )


@dataclass(frozen=True)
class AffineLayer:
    """A node ``W σ(f) + b`` of one parent f; σ element-wise or the identity, W the matrix of a plain layer.

    Attributes:
        weight: W, ``(d_out, d_in)``, the same for every sample.
        received: σ(f), ``(B, …)``, on the node's own tape.
        parent: f, ``(B, …)``.
    """

    weight: Tensor
    received: Tensor
    parent: Tensor

    @classmethod
    def recognise(cls, node: Node, parents: Sequence[Node]) -> AffineLayer | None:
        """The layer, if the node is the output of such a module and its input has exactly that tape; otherwise None."""
        if len(parents) != 1 or not is_plain_layer(node.module) or not node.received:
            return None
        received, parent = node.received[0], parents[0].value
        if not isinstance(received, Tensor) or not is_activation(received, parent):
            return None
        if received.shape[:1] != parent.shape[:1] or node.shape[:1] != parent.shape[:1]:
            return None
        return cls(_matrix(node.module, received), received, parent)

    def slope(self, output: Tensor) -> Tensor | None:
        """σ′ at every entry, ``(B, d_in)``, on the tape; None for the identity."""
        if is_same(self.received, self.parent):
            return None
        unit = torch.ones_like(self.received)
        (slope,) = torch.autograd.grad(self.received, [self.parent], unit, create_graph=True)
        return slope.flatten(1)

    def jacobian(self, slope: Tensor | None, samples: int) -> Tensor:
        """D = W diag(σ′), ``(B, d_out, d_in)``."""
        return self.weight.expand(samples, -1, -1) if slope is None else self.weight * slope.detach().unsqueeze(1)

    def back(self, slope: Tensor | None, signal: Tensor) -> Tensor:
        """Dᵀ δ, like the parent."""
        arriving = signal.flatten(1) @ self.weight
        return (arriving if slope is None else arriving * slope.detach()).view_as(self.parent)

    def curvature(self, slope: Tensor | None, signal: Tensor) -> Tensor | None:
        """K = diag(σ″ Wᵀ δ), ``(B, d_in, d_in)``; None where σ″ vanishes everywhere."""
        if slope is None or not slope.requires_grad:
            return None
        arriving = signal.flatten(1) @ self.weight
        (bend,) = torch.autograd.grad(slope, [self.parent], arriving, retain_graph=True, allow_unused=True)
        if bend is None or not bend.any():
            return None
        return torch.diag_embed(bend.flatten(1))


def is_activation(received: Tensor, parent: Tensor) -> bool:
    """Whether ``received`` is the node ``parent`` itself, or an element-wise operation of it, up to its shape."""
    count = _activations_between(received, parent)
    return count is not None and count <= 1


def is_same(received: Tensor, parent: Tensor) -> bool:
    """Whether ``received`` is the node ``parent`` itself, up to its shape."""
    return _activations_between(received, parent) == 0


def _activations_between(received: Tensor, parent: Tensor) -> int | None:
    """Element-wise operations on the tape from ``parent`` to ``received``; None if there are others."""
    function, count = received.grad_fn, 0
    while function is not None and len(function.next_functions) == 1:
        if function.name() in ELEMENTWISE:
            count += 1
        elif function.name() not in _RESHAPING:
            return None
        function = function.next_functions[0][0]
    return count if getattr(function, "variable", None) is parent else None


def _matrix(layer: PlainLayer, received: Tensor) -> Tensor:
    """W, by one vector-Jacobian product for each output of one sample."""
    if isinstance(layer, nn.Linear) and received.ndim == 2:
        return layer.weight.detach()
    one = torch.zeros_like(received[:1]).requires_grad_()
    output: Tensor = type(layer).forward(layer, one)  # type: ignore[arg-type]
    one_hot = torch.eye(output.numel(), dtype=output.dtype, device=output.device).view(-1, *output.shape)
    (rows,) = batched_vjp([output], [one], [one_hot])
    assert rows is not None
    return rows.reshape(output.numel(), -1)


_RESHAPING = frozenset({"CloneBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})
