"""K-FAC's direction with SpectralNewton's lengths, against dense algebra."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hessopt
from examples.studies.ablation.baselines.natural_gradient import NaturalCoordinates
from tests.helpers.linear_calls import linear_calls

F64 = torch.float64


def inverse(factor: Tensor, damping: float) -> Tensor:
    return torch.linalg.inv(factor + damping**0.5 * factor.diagonal().mean() * torch.eye(len(factor), dtype=F64))


@pytest.mark.parametrize("step_lengths", ["curvature", "fixed"])
def test_the_first_step_is_the_natural_gradient_with_the_norm_of_a_spectral_step(step_lengths: Any) -> None:
    """Of wide, tall and square matrices."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 8), nn.Tanh()).to(F64)
    net.append(nn.Linear(8, 3, bias=False, dtype=F64))
    other = copy.deepcopy(net)
    coordinates = NaturalCoordinates(damping=0.05, curvature="empirical")
    optimizer = hessopt.SpectralNewton(net, coordinates=coordinates, step_lengths=step_lengths)
    x, y = torch.randn(20, 3, dtype=F64), torch.randint(3, (20,))
    functional.cross_entropy(net(x), y).backward()
    optimizer.step()

    inputs, outputs, h = linear_calls(other, x)
    loss = functional.cross_entropy(h, y)
    columns = torch.autograd.grad(loss * len(x) ** 0.5, outputs)
    layers = [(a, b) for a, b in zip(net, other, strict=True) if isinstance(a, nn.Linear)]
    lengths = [0.01] * 4 if step_lengths == "fixed" else [*optimizer.step_lengths.values()]
    for (moved, before), h, j, length in zip(layers, inputs, columns, lengths, strict=True):
        if before.bias is not None:
            h = torch.cat([h, torch.ones(len(h), 1, dtype=F64)], 1)
        d = inverse(j.T @ j, 0.05) @ (j.T @ h) @ inverse(h.T @ h / len(h), 0.05)
        d *= 0.2 * d.numel() ** 0.5 / d.norm()
        new, old = ([m.weight, *([] if m.bias is None else [m.bias[:, None]])] for m in (moved, before))
        torch.testing.assert_close(torch.cat(old, 1) - torch.cat(new, 1), length * d, rtol=1e-8, atol=1e-11)


def test_it_does_not_take_the_place_of_the_spectral_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    kinds = [type(hessopt.SpectralNewton(net, coordinates=c)) for c in (None, NaturalCoordinates())]
    assert kinds[0] is not kinds[1]
