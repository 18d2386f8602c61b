"""Derivatives of a network by its inputs, in two ways that give the same numbers.

Both call the network once, on all points, and use no operation that mixes points, so that row b of whatever is
computed from them belongs to the evaluation at point b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Jet:
    """A function's value and derivatives at N points.

    Attributes:
        points: x, ``(N, d)``.
        value: u, ``(N,)``.
        gradient: ∂u/∂x, ``(N, d)``.
        second: Σ_k c_k ∂²u/∂x_k², ``(N,)``, with an equation's coefficients c.
    """

    points: Tensor
    value: Tensor
    gradient: Tensor
    second: Tensor

    def split(self, sizes: Sequence[int]) -> list[Jet]:
        """The jets of consecutive groups of points."""
        parts = (part.split(list(sizes)) for part in (self.points, self.value, self.gradient, self.second))
        return [Jet(*group) for group in zip(*parts, strict=True)]


Differentiate: TypeAlias = "Callable[[nn.Sequential, Tensor, Sequence[float]], Jet]"


def autograd(function: Callable[[Tensor], Tensor], points: Tensor, second: Sequence[float]) -> Jet:
    """By ``torch.autograd.grad`` with ``create_graph``: what users write; any function.

    Args:
        function: Points ``(N, d)`` to values ``(N, 1)``.
        points: ``(N, d)``.
        second: c, the coefficients of the second derivatives; those of zeros are not computed.
    """
    with torch.enable_grad():
        x = points.detach().requires_grad_()
        value = function(x).squeeze(1)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        total = torch.zeros_like(value)
        for k, c in enumerate(second):
            if c:
                total = total + c * torch.autograd.grad(gradient[:, k].sum(), x, create_graph=True)[0][:, k]
    return Jet(points, value, gradient, total)


def taylor(model: nn.Sequential, points: Tensor, second: Sequence[float]) -> Jet:
    r"""By forward propagation of value, gradient and weighted second derivative through linear and tanh layers.

    A linear layer applies its weight to every part, and its bias to the value. With :math:`s = \tanh a`:

    .. math:: \nabla s = s' \nabla a, \quad \sum_k c_k \partial_k^2 s = s' \sum_k c_k \partial_k^2 a
        + s'' \sum_k c_k (\partial_k a)^2, \quad s' = 1 - s^2, \; s'' = -2 s s'.

    Linear modules are called on values; their weights multiply the derivatives outside of the modules, each part
    ``(N, d_in)`` on its own: slicing and joining parts costs more than fewer, larger products save.

    Args:
        model: :class:`torch.nn.Linear` and :class:`torch.nn.Tanh` modules.
        points: ``(N, d)``.
        second: c, the coefficients of the second derivatives.

    Raises:
        TypeError: the model has another module.

    Source:
        The forward Laplacian of Li et al. 2024 (Nature Machine Intelligence 6), for weighted second derivatives.
    """
    value = points
    axes = torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
    gradient = [axis.expand_as(points) for axis in axes]
    curvature = torch.zeros_like(points)
    for layer in model:
        if not isinstance(layer, nn.Linear | nn.Tanh):
            raise TypeError(f"Taylor propagation knows nn.Linear and nn.Tanh, not {type(layer).__name__}.")
        value = layer(value)
        if isinstance(layer, nn.Linear):
            gradient = [F.linear(part, layer.weight) for part in gradient]
            curvature = F.linear(curvature, layer.weight)
        else:
            slope = 1 - value.square()
            bend = torch.zeros_like(value)
            for part, c in zip(gradient, second, strict=True):
                if c:
                    bend = bend.addcmul(part, part, value=c)
            curvature = slope * torch.addcmul(curvature, value, bend, value=-2)
            gradient = [slope * part for part in gradient]
    return Jet(points, value.squeeze(1), torch.cat(gradient, dim=1), curvature.squeeze(1))


WAYS: dict[str, Differentiate] = {"autograd": autograd, "taylor": taylor}
