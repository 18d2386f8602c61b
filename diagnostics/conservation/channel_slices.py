"""The entries of a parameter that belong to one channel: rows that make it, or columns that read it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class ChannelSlices:
    """How the entries of a parameter are divided among channels.

    Attributes:
        name: Qualified name of the parameter.
        view: The shape in which channels are whole axes; ``view.numel()`` is the parameter's.
        axes: Those axes; together, in row-major order, they count the channels.
    """

    name: str
    view: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return math.prod(self.view[axis] for axis in self.axes)

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner product over the entries of each channel, two of ``parameter.shape -> (channels,)``."""
        rest = [axis for axis in range(len(self.view)) if axis not in self.axes]
        a = left.reshape(self.view)
        if left is right:
            return (torch.linalg.vector_norm(a, dim=rest) if rest else a).square().reshape(-1)
        products = a * right.reshape(self.view)
        return (products.sum(rest) if rest else products).reshape(-1)

    def scaled(self, parameter: Tensor, factors: Tensor) -> Tensor:
        """The parameter with the entries of channel i multiplied by ``factors[i]``."""
        shape = [size if axis in self.axes else 1 for axis, size in enumerate(self.view)]
        return (parameter.reshape(self.view) * factors.reshape(shape)).reshape(parameter.shape)


def outgoing(prefix: str, module: nn.Module) -> tuple[ChannelSlices, ...]:
    """The parameters that make the channels of a module's output; empty where the module is of no known kind.

    Channels are the features of a linear layer or an embedding, the maps of a convolution, those that an affine
    normalisation multiplies. The bias is among the parameters: output channel i is 1-homogeneous in (weight, bias).
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or (bias is not None and not isinstance(bias, nn.Parameter)):
        return ()
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear):
        first = ChannelSlices(f"{prefix}weight", shape, (0,))
    elif isinstance(module, nn.Embedding):
        first = ChannelSlices(f"{prefix}weight", shape, (1,))
    elif isinstance(module, _ConvTransposeNd):
        grouped = (module.groups, shape[0] // module.groups, *shape[1:])
        first = ChannelSlices(f"{prefix}weight", grouped, (0, 2))
    elif isinstance(module, _ConvNd):
        first = ChannelSlices(f"{prefix}weight", shape, (0,))
    elif is_normalisation(module):
        first = ChannelSlices(f"{prefix}weight", (shape[0], math.prod(shape[1:])), (0,))
    else:
        return ()
    if bias is None:
        return (first,)
    view = first.view if is_normalisation(module) else tuple(bias.shape)
    return first, ChannelSlices(f"{prefix}bias", view, (0,))


def incoming(prefix: str, module: nn.Module, channels: int) -> ChannelSlices | None:
    """The weight by channels of the module's input; None where there is none, or not a multiple of ``channels``.

    A linear layer may read several features of each channel, as it does behind ``flatten`` of ``(B, C, H, W)``.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear):
        if shape[1] % channels:
            return None
        return ChannelSlices(f"{prefix}weight", (shape[0], channels, shape[1] // channels), (1,))
    if isinstance(module, _ConvTransposeNd):
        slices = ChannelSlices(f"{prefix}weight", shape, (0,))
    elif isinstance(module, _ConvNd):
        slices = ChannelSlices(f"{prefix}weight", (module.groups, shape[0] // module.groups, *shape[1:]), (0, 2))
    else:
        return None
    return slices if slices.channels == channels else None


def reads_channels(module: nn.Module | None) -> bool:
    """Whether the module has a weight that multiplies the channels of its input and sums over them."""
    return isinstance(module, nn.Linear | _ConvNd) and isinstance(module.weight, nn.Parameter)


def is_normalisation(module: nn.Module | None) -> bool:
    """Whether the module is an affine normalisation of PyTorch's."""
    return isinstance(module, _BatchNorm | _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)


def every_entry(prefix: str, module: nn.Module) -> ChannelSlices:
    """The whole weight of a module as one channel."""
    return ChannelSlices(f"{prefix}weight", (1, module.get_parameter("weight").numel()), (0,))


def whole(slices: ChannelSlices) -> ChannelSlices:
    """The same parameter as one channel."""
    return ChannelSlices(slices.name, (1, math.prod(slices.view)), (0,))


def powers_of_two(count: int, generator: torch.Generator) -> Tensor:
    """Factors ¼, ½, 2 and 4, which floating-point numbers are multiplied by without rounding; float64."""
    exponents = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    return exponents[torch.randint(4, (count,), generator=generator)].exp2()
