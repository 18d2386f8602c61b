"""Small networks that can break a block recursion."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Chain(nn.Sequential):
    """Linear and activation, alternating; the activations are inside the nodes."""

    def __init__(self, *widths: int, activation: type[nn.Module] = nn.Tanh) -> None:
        layers = [nn.Sequential(nn.Linear(a, b), activation()) for a, b in pairwise(widths[:-1])]
        super().__init__(*layers, nn.Linear(*widths[-2:]))


class ResidualCat(nn.Module):
    """Residual blocks, then a merge of an early and a late node by ``cat`` into Linear → GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 4)
        self.block1 = nn.Linear(4, 4)
        self.block2 = nn.Linear(4, 4)
        self.merge = nn.Sequential(nn.Linear(8, 5), nn.GELU())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        early = torch.tanh(self.stem(x))
        late = early + torch.tanh(self.block1(early))
        late = late + torch.tanh(self.block2(late))
        return self.head(self.merge(torch.cat([early, late], -1)))


class Diamond(nn.Module):
    """Two branches between a stem and a nonlinear merge: their nodes are unrelated, but both merge."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, 4), nn.SiLU())
        self.left = nn.Sequential(nn.Linear(4, 3), nn.SiLU())
        self.right = nn.Sequential(nn.Linear(4, 2), nn.SiLU())
        self.merge = nn.Sequential(nn.Linear(5, 4), nn.SiLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        return self.head(self.merge(torch.cat([self.left(stem), self.right(stem)], -1)))


class CalledTwice(nn.Module):
    """One module, called twice: two nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 4)
        self.step = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        h = torch.tanh(self.step(h)) * h
        return self.head(torch.tanh(self.step(h)))


class Attention(nn.Module):
    """Single-head attention on ``(B, S, d)``, with queries, keys, values and the mixture as nodes."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v, self.out = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        written_out = torch.softmax(q @ k.mT / 3**0.5, -1) @ v
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else written_out
        return self.out(torch.tanh(mixed)).mean(1)


class Normalised(nn.Module):
    """LayerNorm inside nodes, before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, 4), nn.LayerNorm(4), nn.GELU()) for a in (5, 4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Recurrent(nn.Module):
    """A network that returns a tuple: an LSTM over a sequence ``(B, T, d)``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        sequence, _ = self.lstm(x)
        return self.head(torch.tanh(sequence)).mean(1)


class Counterexample(nn.Module):
    """``w → q → u ← v``, u nonlinear, v and w unrelated: the smallest network on which the printed Eq. 2 fails."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(3, 3)
        self.v = nn.Linear(3, 3)
        self.q = nn.Linear(3, 3)
        self.u = nn.Sequential(nn.Linear(6, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.u(torch.cat([self.q(self.w(x)), self.v(x)], -1))


class SkipIntoMerge(nn.Module):
    """``v → u(v, q(v))``, u nonlinear: the printed Eq. 2 fails on the diagonal at v."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(3, 3)
        self.q = nn.Linear(3, 3)
        self.u = nn.Sequential(nn.Linear(6, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        return self.u(torch.cat([v, self.q(v)], -1))


class DeadEnd(nn.Module):
    """A node that does not reach the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.head = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.used(x))
        self.unused(h)
        return self.head(h)
