"""The networks of the paper's experiments, with PyTorch's default initialisation (not He's, as the paper says)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from examples.shared.models import resnet18
from examples.shared.models.resnet import BasicBlock

PIXELS = 3 * 32 * 32
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class Network(nn.Module):
    """A network that names the nodes the paper measures at.

    Attributes:
        nodes: Names of modules, in the order of the paper's indices.
        blocks_on_path: Names of the modules whose Jacobians give ρ; empty where the paper has none.
    """

    nodes: tuple[str, ...] = ()
    blocks_on_path: tuple[str, ...] = ()


class Layer(nn.Module):
    """``σ(LN(Wx + b))``; the layer norm is optional."""

    def __init__(self, inputs: int, outputs: int, activation: str, norm: bool = True, spectral: bool = False) -> None:
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        self.linear = spectral_norm(linear) if spectral else linear
        self.norm: nn.Module = nn.LayerNorm(outputs) if norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.activation(self.norm(self.linear(x)))
        return result


class ResidualLayer(nn.Module):
    """``x + scale · σ(Wx + b)``."""

    def __init__(self, width: int, activation: str, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.scale * self.activation(self.linear(x))
        return result


class Chain(Network):
    """Projection, blocks, linear head; the nodes are the blocks' outputs."""

    def __init__(self, projection: nn.Module, blocks: list[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.projection = projection
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.nodes = tuple(f"blocks.{i}" for i in range(len(blocks)))
        self.blocks_on_path = self.nodes

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def plain_mlp(
    depth: int,
    *,
    width: int = 64,
    activation: str = "relu",
    norm: bool = True,
    spectral: bool = False,
    classes: int = 10,
    bottleneck: int | None = None,
) -> Chain:
    """A chain of ``depth`` blocks; ``bottleneck`` is the width of the one in the middle."""
    widths = [width] * (depth + 1)
    if bottleneck is not None:
        widths[1 + depth // 2] = bottleneck
    projection = Layer(PIXELS, width, activation, norm, spectral)
    blocks: list[nn.Module] = [
        Layer(inputs, outputs, activation, norm, spectral) for inputs, outputs in pairwise(widths)
    ]
    return Chain(projection, blocks, nn.Linear(widths[-1], classes))


def residual_mlp(depth: int, *, width: int = 64, activation: str = "relu") -> Chain:
    projection = Layer(PIXELS, width, activation)
    blocks: list[nn.Module] = [ResidualLayer(width, activation, depth**-0.5) for _ in range(depth)]
    return Chain(projection, blocks, nn.Linear(width, 10))


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a + b) / math.sqrt(2)


class Concatenation(nn.Module):
    """``σ(W [a, b] + c)``, without layer norm."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = self.activation(self.linear(torch.cat([a, b], dim=-1)))
        return result


class Diamond(Network):
    """A stem, two branches of ``depth`` layers, a merge (``"sum"`` or ``"cat"``), a linear head."""

    def __init__(self, depth: int, merge: str, activation: str, width: int = 32) -> None:
        super().__init__()
        self.stem = Layer(PIXELS, width, activation)
        self.a = nn.ModuleList(Layer(width, width, activation) for _ in range(depth))
        self.b = nn.ModuleList(Layer(width, width, activation) for _ in range(depth))
        self.merge: nn.Module = Sum() if merge == "sum" else Concatenation(width, activation)
        self.head = nn.Linear(width, 10)
        self.nodes = (*(f"a.{i}" for i in range(depth)), *(f"b.{i}" for i in range(depth)), "merge")
        self.blocks_on_path = self.nodes[:-1]

    def forward(self, x: Tensor) -> Tensor:
        a = b = self.stem(x.flatten(1))
        for layer in self.a:
            a = layer(a)
        for layer in self.b:
            b = layer(b)
        logits: Tensor = self.head(self.merge(a, b))
        return logits


class Mix(nn.Module):
    """``softmax(Q Kᵀ / √d) V``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores: Tensor = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return scores @ v


class ToyAttention(Network):
    """One head of self-attention without output projection, mean over positions, linear head."""

    nodes = ("q", "k", "v", "mix")

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.mix = Mix()
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.mix(self.q(x), self.k(x), self.v(x)).mean(dim=1))
        return result


class ToyPerceptron(Network):
    """The control: three ReLU layers at every position, mean over positions, linear head."""

    nodes = ("layers.0", "layers.1")

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, width, "relu", norm=False) for _ in range(3))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x.mean(dim=1))
        return result


class ConvolutionalNetwork(Network):
    """ResNet-18 in torchvision's layout on 32×32 images, with or without its skip connections."""

    nodes: tuple[str, ...] = ("maxpool", "layer1", "layer2", "layer3", "layer4")

    def __init__(self, activation: str, skips: bool) -> None:
        super().__init__()
        body = resnet18(ACTIVATIONS[activation])
        if not skips:
            for module in body.modules():
                if isinstance(module, BasicBlock):
                    module.downsample = Zero()
        self.body = body
        self.nodes = tuple(f"body.{name}" for name in type(self).nodes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


class Zero(nn.Module):
    """No skip connection: nothing is added."""

    def forward(self, x: Tensor) -> int:
        return 0
