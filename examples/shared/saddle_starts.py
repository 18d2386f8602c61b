"""Networks that start next to saddle points: deep linear ones, an autoencoder, a factorisation, equal hidden units."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class SaddleStart:
    """A start next to a saddle.

    Attributes:
        name: What it is.
        make: The network of a seed.
        output: What it computes.
        loss_of_output: The loss, a function of that.
        saddle: The loss at the saddle; NaN: that at the start.
        least: The least loss.
    """

    name: str
    make: Callable[[int], nn.Module]
    output: Callable[[nn.Module], Tensor]
    loss_of_output: Callable[[Tensor], Tensor]
    saddle: float
    least: float

    def loss(self, net: nn.Module) -> Tensor:
        return self.loss_of_output(self.output(net))


class Point(nn.Module):
    """A point in the plane."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([x, y]))

    def forward(self) -> Tensor:
        return self.at


class Factorisation(nn.Module):
    """U Vᵀ of rank 3, next to zero."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(scale * torch.randn(20, 3)), nn.Parameter(scale * torch.randn(15, 3))

    def forward(self) -> Tensor:
        return self.u @ self.v.mT


def small(net: nn.Module, seed: int, scale: float) -> nn.Module:
    """Parameters of size ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return net


def twins(seed: int) -> nn.Module:
    """An MLP that was trained with all hidden units alike, now 1e-6 apart: the saddle of permutation symmetry."""
    torch.manual_seed(seed)
    first, last = nn.Linear(2, 8), nn.Linear(8, 1)
    net = nn.Sequential(first, nn.Tanh(), last)
    with torch.no_grad():
        first.weight.copy_(first.weight[:1].expand(8, 2))
        first.bias.fill_(0.1)
        last.weight.fill_(0.1)
    x, y = _teacher()
    one = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        one.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        for p in (first.weight, first.bias, last.weight):  # stay in the symmetric subspace
            assert p.grad is not None
            p.grad.copy_(p.grad.mean(1 if p is last.weight else 0, keepdim=True).expand_as(p.grad))
        return loss

    one.step(closure)
    with torch.no_grad():
        first.weight.add_(1e-6 * torch.randn(8, 2))
    return net


def _teacher() -> tuple[Tensor, Tensor]:
    """What three hidden units with different weights compute."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 2, generator=generator)
    return x, torch.tanh(x @ torch.tensor([[2.0, 0.0, -1.0], [0.0, 2.0, 1.5]])) @ torch.tensor([[1.0], [-1.0], [0.8]])


def saddle_starts(device: torch.device | str = "cpu") -> list[SaddleStart]:
    """All of them; ``make`` makes networks on the CPU, the losses are those of networks on ``device``."""
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(8).to(device)
    target = torch.diag(torch.linspace(2, 0.5, 8)).to(device)
    matrix = (torch.randn(20, 3, generator=generator) @ torch.randn(3, 15, generator=generator) / 3).to(device)
    images = (torch.randn(64, 4, generator=generator) @ torch.randn(4, 16, generator=generator) / 2).to(device)
    x, y = (part.to(device) for part in _teacher())

    def call(net: nn.Module, *inputs: Tensor) -> Tensor:
        output: Tensor = net(*inputs)
        return output

    def plane(at: Tensor) -> Tensor:
        a, b = at.unbind()
        loss: Tensor = a**2 / 2 - b**2 / 2 + b**4 / 4
        return loss

    def distance(goal: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda output: F.mse_loss(output, goal)

    def deep(_: int, width: int, depth: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))

    def coder() -> nn.Module:
        widths = [16, 12, 8, 4, 8, 12, 16]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers[:-1])

    zero = torch.zeros((), device=device)
    return [
        SaddleStart("x²/2 − y²/2 + y⁴/4 from (1, 1e-8)", lambda _: Point(1.0, 1e-8), call, plane, 0.0, -0.25),
        SaddleStart(
            "deep linear, depth 2", lambda s: small(deep(s, 8, 2), s, 1e-4), lambda net: call(net, eye),
            distance(target), F.mse_loss(zero.expand(8, 8), target).item(), 0.0,
        ),
        SaddleStart(
            "deep linear, depth 4", lambda s: small(deep(s, 8, 4), s, 3e-2), lambda net: call(net, eye),
            distance(target), F.mse_loss(zero.expand(8, 8), target).item(), 0.0,
        ),
        SaddleStart(
            "deep tanh autoencoder 16-12-8-4-8-12-16", lambda s: small(coder(), s, 3e-2), lambda net: call(net, images),
            distance(images), F.mse_loss(images.mean(0).expand_as(images), images).item(), 0.0,
        ),
        SaddleStart(
            "matrix factorisation 20×15, rank 3", lambda s: small(Factorisation(1.0), s, 1e-5), call,
            distance(matrix), matrix.square().mean().item(), 0.0,
        ),
        SaddleStart(
            "MLP 2-8-1 with equal hidden units", twins, lambda net: call(net, x), distance(y), math.nan, 0.0
        ),
    ]  # fmt: skip
