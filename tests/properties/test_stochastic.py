"""Stochastic nodes by reparameterisation: the noise of one pass is part of the network (Remark 88)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from tests.helpers.oracle import check_against_double_backprop, joint_double_backprop, joint_error


class Sample(nn.Module):
    """mu + sigma · eps, with eps drawn inside."""

    def forward(self, mu: Tensor, log_variance: Tensor) -> Tensor:
        return mu + torch.exp(0.5 * log_variance) * torch.randn_like(mu)


class Autoencoder(nn.Module):
    """A variational autoencoder, with the latent sample as a node."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mu, self.log_variance = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.sample, self.decoder = Sample(), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.encoder(x))
        mu, log_variance = self.mu(h), self.log_variance(h)
        return self.decoder(self.sample(mu, log_variance)), mu, log_variance


NODES = ["encoder", "mu", "log_variance", "sample", "decoder.0"]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 5, dtype=torch.float64)


def _evidence_bound(x: Tensor) -> Callable[[tuple[Tensor, Tensor, Tensor]], Tensor]:
    def loss(z: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        reconstruction, mu, log_variance = z
        divergence = -0.5 * (1 + log_variance - mu.square() - log_variance.exp()).sum(1)
        return F.mse_loss(reconstruction, x) + 0.1 * divergence.mean()

    return loss


def test_blocks_of_a_sampled_node_equal_double_backpropagation_with_the_same_noise(x: Tensor) -> None:
    torch.manual_seed(1)
    graph = check_against_double_backprop(Autoencoder().double(), x, _evidence_bound(x), NODES)
    assert graph["sample"].parents == ("mu", "log_variance")
    assert graph.outputs == ("mu", "log_variance", "output[0]")
    assert not graph.coupled


def test_the_noise_is_that_of_the_next_forward_pass_and_stays_fixed(x: Tensor) -> None:
    model, loss = Autoencoder().double(), _evidence_bound(x)
    torch.manual_seed(2)
    graph = diagnostics.capture(model, x, loss, NODES)
    state = torch.get_rng_state()
    first, second = (diagnostics.hessian_blocks(graph).total.assemble() for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(graph.loss.detach(), loss(model(x)).detach())  # the same draw
    names = [node.name for node in graph.nodes]
    other = joint_double_backprop(model, x, loss, names)  # the draw after it: another network
    assert joint_error(diagnostics.hessian_blocks(graph).total, other.total) > 1e-2


def test_captures_from_the_same_state_are_the_same_and_from_another_are_not(x: Tensor) -> None:
    model, loss = Autoencoder().double(), _evidence_bound(x)
    torch.manual_seed(3)
    same = [diagnostics.capture(model, x, loss, NODES)["sample"].value for _ in range(2)]
    assert torch.equal(*same)
    torch.randn(1)
    assert not torch.equal(same[0], diagnostics.capture(model, x, loss, NODES)["sample"].value)


def test_noise_in_the_loss_is_fixed_too(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    torch.manual_seed(4)
    check_against_double_backprop(model, x, lambda z: (z + torch.randn_like(z)).exp().mean())


@pytest.mark.parametrize("distribution", [torch.distributions.Normal, torch.distributions.Laplace])
def test_reparameterised_distributions_are_exact(
    distribution: type[torch.distributions.Distribution], x: Tensor
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.location, self.scale, self.head = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(distribution(self.location(x), F.softplus(self.scale(x))).rsample())

    torch.manual_seed(5)
    graph = check_against_double_backprop(Net().double(), x, lambda z: z.exp().mean())
    assert graph["head"].parents == ("location", "scale")
