"""Small networks of the architectures that the paper names without measuring them, each with its control."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from examples.studies.paper.networks import Network


class Convolution(nn.Module):
    """``SiLU(W * x + b)``, 3×3, the same size or half of it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.activation(self.conv(x))
        return result


class ConvolutionalChain(Network):
    """A stem to 8×8, ``depth`` convolutions of ``width`` channels, mean over positions, linear head.

    ``wiring``: a convolution reads the one before it (``"plain"``), the sum of all before it (``"residual"``), or all
    before it side by side (``"dense"``, Huang et al. 2017).
    """

    def __init__(self, wiring: str, depth: int = 6, width: int = 4) -> None:
        super().__init__()
        self.wiring = wiring
        self.stem = Convolution(3, width, stride=2)
        self.layers = nn.ModuleList(
            Convolution(width * (i + 1 if wiring == "dense" else 1), width) for i in range(depth)
        )
        self.head = nn.Linear(width * (depth + 1 if wiring == "dense" else 1), 10)
        self.nodes = ("stem", *(f"layers.{i}" for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(layer(self._read(made)))
        logits: Tensor = self.head(self._read(made).mean(dim=(2, 3)))
        return logits

    def _read(self, made: list[Tensor]) -> Tensor:
        if self.wiring == "dense":
            return torch.cat(made, dim=1)
        return sum(made[1:], made[0]) if self.wiring == "residual" else made[-1]


class UNet(Network):
    """Three halvings and three doublings of 16×16 images; ``skips=False``: the decoder sees the level below alone."""

    def __init__(self, skips: bool, width: int = 3) -> None:
        super().__init__()
        w = [width, 2 * width, 4 * width, 8 * width]
        self.skips = skips
        self.encoder = nn.ModuleList(
            [Convolution(3, w[0]), Convolution(w[0], w[1], stride=2), Convolution(w[1], w[2], stride=2)]
        )
        self.bottom = Convolution(w[2], w[3], stride=2)
        self.decoder = nn.ModuleList(Convolution(w[i + 1] + (w[i] if skips else 0), w[i]) for i in range(3))
        self.head = nn.Conv2d(w[0], 3, 1)
        self.nodes = (*(f"encoder.{i}" for i in range(3)), "bottom", *(f"decoder.{i}" for i in (2, 1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
        x = self.bottom(x)
        for i in (2, 1, 0):
            x = interpolate(x, scale_factor=2.0, mode="nearest")
            x = self.decoder[i](torch.cat([x, skips[i]], dim=1) if self.skips else x)
        image: Tensor = self.head(x)
        return image


class Heads(nn.Module):
    """Causal ``softmax(Q Kᵀ / √d) V`` of every head, and nothing else."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        mixed: Tensor = scores.masked_fill(later, float("-inf")).softmax(dim=-1) @ v
        return mixed.transpose(1, 2).flatten(2)


class Add(nn.Module):
    """The residual stream."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Block(nn.Module):
    """Pre-norm transformer block with every curved operation a module of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.mix = Heads(heads)
        self.proj = nn.Linear(width, width)
        self.add_1 = Add()
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU())
        self.down = nn.Linear(2 * width, width)
        self.add_2 = Add()

    def forward(self, x: Tensor) -> Tensor:
        seen = self.ln_1(x)
        x = self.add_1(x, self.proj(self.mix(self.q(seen), self.k(seen), self.v(seen))))
        x = self.add_2(x, self.down(self.mlp(self.ln_2(x))))
        return x


CURVED = ("ln_1", "mix", "ln_2", "mlp")
"""Of a block: the layer norms, the attention, the GELU."""


class SmallGPT(Network):
    """A language model of characters; tokens ``(B, T)`` to logits ``(B, vocabulary, T)``."""

    def __init__(
        self, depth: int = 2, width: int = 24, heads: int = 2, context: int = 16, vocabulary: int = 65
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Parameter(0.02 * torch.randn(context, width))
        self.embed = Add()
        self.h = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.nodes = tuple(f"h.{i}.{name}" for i in range(depth) for name in ("q", "k", "v"))

    @property
    def cuts(self) -> tuple[str, ...]:
        """All nodes of the graph: the measured ones, what bends between them, and the residual stream."""
        inside = ("ln_1", "q", "k", "v", "mix", "add_1", "ln_2", "mlp", "add_2")
        return ("embed", *(f"h.{i}.{name}" for i in range(len(self.h)) for name in inside), "ln_f")

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(self.wte(tokens), self.wpe)
        for block in self.h:
            x = block(x)
        logits: Tensor = self.head(self.ln_f(x))
        return logits.transpose(1, 2)
