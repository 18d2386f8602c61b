"""Averages of iterates: weights, and exchange in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from hessopt import KroneckerAveraging, KroneckerCoordinates, SpectralNewton
from hessopt.spectral.iterate_average import IterateAverage
from tests.conformity.checks import same_state


@pytest.mark.parametrize("power", [1, 3, 8])
def test_weights_are_the_product_of_the_recursion(power: int) -> None:
    """For k = 1 the plain mean; in general weights ``w_t Π_{s>t} (1 − w_s)``, ``w_t = min(1, k/t)``."""
    torch.manual_seed(0)
    iterates = torch.randn(20, 3, dtype=torch.float64)
    p = iterates[0].clone()
    average = IterateAverage([p], power)
    for iterate in iterates:
        p.copy_(iterate)
        average.update()
    shares = [min(1.0, power / t) for t in range(1, 21)]
    weights = torch.tensor([shares[i] * torch.tensor([1 - s for s in shares[i + 1 :]]).prod() for i in range(20)])
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(average.others[0], weights.double() @ iterates, rtol=1e-5, atol=1e-6)
    if power == 1:
        torch.testing.assert_close(average.others[0], iterates.mean(0), rtol=1e-12, atol=1e-14)


def test_parameters_and_average_are_exchanged_in_place() -> None:
    p = torch.arange(4.0)
    average = IterateAverage([p], 2)
    average.update()
    p.add_(1)
    average.update()
    iterate, mean, address = p.clone(), average.others[0].clone(), p.data_ptr()
    for _ in range(2):
        average.swap(True)  # the second time nothing happens
        assert torch.equal(p, mean)
    average.swap(False)
    assert torch.equal(p, iterate)
    assert torch.equal(average.others[0], mean)
    assert p.data_ptr() == address


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, 3)).to(torch.float64)


def batches(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(9, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def train(net: nn.Module, optimizer: SpectralNewton, xs: list[Tensor]) -> None:
    for x in xs:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), x.flatten(1)[:, :3].argmax(1)).backward()
        optimizer.step()


def test_statistics_of_batch_norm_are_recomputed_for_the_average() -> None:
    """By torch's update_bn: means over batches, with nothing of the iterates in them; and training does not see it."""
    nets = [normalised(), normalised()]
    often = KroneckerCoordinates(averages=KroneckerAveraging(0.95, factor_every=1, inverse_every=2))
    optimizers = [SpectralNewton(net, "cross_entropy", coordinates=often) for net in nets]
    loader = batches(7, 4)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, batches(0, 5))
    of_iterates = copy.deepcopy(dict(nets[0].named_buffers()))
    optimizers[0].eval()
    swa_utils.update_bn(loader, nets[0])
    seen: dict[int, list[Tensor]] = {1: [], 5: []}
    plain = copy.deepcopy(nets[0])
    with torch.no_grad():
        for x in loader:
            for number, layer in enumerate(plain):
                if number in seen:
                    seen[number].append(x.transpose(0, 1).flatten(1))
                x = layer(x)
    for number, inputs in seen.items():
        layer = nets[0][number]
        assert isinstance(layer.running_mean, Tensor)
        assert isinstance(layer.running_var, Tensor)
        torch.testing.assert_close(layer.running_mean, sum(x.mean(1) for x in inputs) / 4, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.running_var, sum(x.var(1) for x in inputs) / 4, rtol=1e-10, atol=1e-12)
        assert not torch.equal(layer.running_mean, of_iterates[f"{number}.running_mean"])
        assert layer.training
    nets[0].eval()
    assert nets[0](loader[0]).isfinite().all()
    optimizers[0].train()
    nets[0].train()
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, batches(1, 5))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    assert same_state(optimizers[0].state_dict(), optimizers[1].state_dict())
