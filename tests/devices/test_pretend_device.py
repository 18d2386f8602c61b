"""The accelerator that is not there: what a real one refuses it refuses, and the host's waits for it are seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.autograd.kernels import RandomState
from tests.devices.scenarios import traffic
from tests.devices.table import COUNTS, WHY
from tests.helpers.pretend_device import pretending, watch


@pytest.fixture
def pretended() -> Iterator[torch.device]:
    with pretending() as device:
        yield device


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: a + b,
        lambda a, b: b.add_(a),
        lambda a, b: a @ b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.stack([a.sum(), b.sum()]),
        lambda a, b: a.normal_(generator=torch.Generator()),
        lambda a, b: torch.where(a > 0, a, b),
    ],
)
def test_devices_do_not_mix(mixed: Callable[[Tensor, Tensor], Tensor], pretended: torch.device) -> None:
    a, b = torch.eye(3, device=pretended), torch.eye(3)
    with pytest.raises(RuntimeError, match=r"same device|others are on|device type for generator"):
        mixed(a, b)
    with pytest.raises(TypeError, match="numpy"):
        a.numpy()


def test_numbers_of_the_host_go_with_any_device(pretended: torch.device) -> None:
    a = torch.eye(3, device=pretended)
    assert torch.equal((a * torch.tensor(2.0)).cpu(), 2 * torch.eye(3))
    assert (torch.arange(4, device=pretended) % 3).tolist() == [0, 1, 2, 0]
    assert functional.mse_loss(a, 2 * a).shape == ()


@pytest.mark.parametrize(
    ("act", "reads", "copies"),
    [
        (lambda t: t.sum().item(), 1, 0),
        (lambda t: bool(t.sum() > 0), 1, 0),
        (lambda t: t.tolist(), 1, 0),
        (lambda t: t.cpu(), 1, 0),
        (lambda t: t[t > 0], 1, 0),
        (lambda t: torch.linalg.eigh(t), 1, 0),
        (lambda t: t[[0, 2]], 0, 1),
        (lambda t: t[torch.tensor([0, 2])], 0, 1),
        (lambda t: torch.tensor(1.0, device=t.device), 0, 1),
        (lambda t: torch.full((2,), 1.0, device=t.device), 0, 0),
        (lambda t: t[1:].mT @ torch.linalg.cholesky_ex(t).L[1:], 0, 0),
    ],
)
def test_what_waits_is_seen(act: Callable[[Tensor], object], reads: int, copies: int, pretended: torch.device) -> None:
    t = torch.eye(3, device=pretended)
    with watch() as found:
        act(t)
    assert (found.reads.total(), found.copies.total()) == (reads, copies)
    assert set(found.reads) | set(found.copies) <= {"caller"}


def test_a_network_is_that_of_the_host(pretended: torch.device) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(18),
        nn.Linear(18, 3),
    ).double()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    other = copy.deepcopy(net).to(pretended)
    found = []
    for module, inputs in ((net, x), (copy.deepcopy(other), x.to(pretended))):
        parameters = list(module.parameters())
        slopes = torch.autograd.grad(module(inputs).square().mean(), parameters, create_graph=True)
        sum(s.square().sum() for s in slopes).backward()  # type: ignore[union-attr]
        found.append(torch.cat([p.grad.flatten() for p in parameters]).cpu())  # type: ignore[union-attr]
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-12)
    assert all(p.device == torch.device("pretend", 0) for p in other.parameters())


def test_random_numbers_are_of_the_device(pretended: torch.device) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2), torch.rand(2, device=pretended)
    torch.manual_seed(3)
    torch.rand(5, device=pretended)
    assert torch.equal(torch.rand(2), expected[0])
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2, device=pretended), expected[1])
    own = torch.Generator(pretended).manual_seed(1)
    assert own.device.type == pretended.type
    assert torch.equal(
        torch.rand(2, device=pretended, generator=own.clone_state()), torch.rand(2, device=pretended, generator=own)
    )


def test_random_state_of_any_accelerator_is_replayed_and_restored(pretended: torch.device) -> None:
    """So that dropout is the same in every product, and training goes on as if nothing had been measured."""
    like = torch.zeros(1, device=pretended)
    torch.manual_seed(0)
    state = RandomState([like])
    expected = torch.rand(2), torch.rand(2, device=pretended)
    for context in (state.replayed(), state.kept()):
        before = torch.get_rng_state(), torch.get_device_module(pretended).get_rng_state(pretended)
        with context:
            drawn = torch.rand(2), torch.rand(2, device=pretended)
        assert torch.equal(drawn[1], expected[1]) == torch.equal(drawn[0], expected[0])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.equal(torch.get_device_module(pretended).get_rng_state(pretended), before[1])
    with state.replayed():
        assert torch.equal(torch.rand(2, device=pretended), expected[1])


def test_traffic_does_not_exceed_the_table(pretended: torch.device) -> None:
    """Fewer is better: then lower the table. More: find out why, and whether the device can be asked less often."""
    found = dict(traffic(pretended))
    assert set(found) == set(COUNTS)
    exceeded = {
        (name, place): (count, known.get(place, 0))
        for name, t in found.items()
        for counts, known in zip((t.reads, t.copies), COUNTS[name], strict=True)
        for place, count in counts.items()
        if count > known.get(place, 0)
    }
    assert not exceeded, exceeded


def test_every_read_and_copy_has_a_reason() -> None:
    assert {place for counts in COUNTS.values() for known in counts for place in known} == set(WHY)
    free = ["SpectralNewton: between refreshes", "KroneckerNewton: between refreshes", "KroneckerNewton: refresh"]
    assert all(COUNTS[name] == ({}, {}) for name in free)
