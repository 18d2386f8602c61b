"""Optimizers with curvature under data parallelism: their steps are those of one process on all samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import hessopt
from tests.distributed.worker import Scenario, outcomes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

SIZES = [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
STEPS = 3
SAMPLES = 10

Make = Callable[[nn.Module], Optimizer]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def saddle() -> nn.Sequential:
    """Near a saddle point."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1e-4)
    return net


SHARDS = {1: [10], 2: [7, 3], 3: [5, 3, 2], 4: [4, 3, 2, 1]}
"""Sizes by the number of processes that have samples."""


def shard(rank: int, processes: int, *, empty: bool = False) -> tuple[Tensor, Tensor]:
    """Samples of a process; none for the last of several if asked for."""
    sizes = [*SHARDS[processes - 1], 0] if empty and processes > 1 else SHARDS[processes]
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, 3, generator=generator), torch.randn(SAMPLES, 2, generator=generator)
    return x.split(sizes)[rank], y.split(sizes)[rank]


def loss_of(z: Tensor, y: Tensor, processes: int) -> Tensor:
    """A share whose mean over processes is the mean over all samples."""
    return (z - y).square().sum() * (processes / (2 * SAMPLES))


def trained(
    net: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], processes: int, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """All parameters after some steps, as a vector, and the losses before them."""

    def closure() -> Tensor:
        loss = loss_of(net(batch[0]), batch[1], processes)
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    losses = [torch.as_tensor(optimizer.step(closure)).detach() for _ in range(STEPS)]  # type: ignore[arg-type]
    return torch.cat([p.detach().flatten() for p in net.parameters()]), torch.stack(losses)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"SaddleEscape": saddle}
CASES: dict[str, Make] = {
    "NewtonCG": lambda net: hessopt.NewtonCG(net.parameters()),
    "NewtonCG(model)": lambda net: hessopt.NewtonCG(net, preconditioner="diagonal", warm_start=True, weight_decay=0.01),
    "NewtonCG(ggn)": lambda net: hessopt.NewtonCG(net, curvature="ggn", method=hessopt.LevenbergMarquardt()),
    "SaddleEscape": lambda net: hessopt.SaddleEscape(SGD(net.parameters(), lr=0.1, momentum=0.5), model=net),
    "SaddleEscape(LBFGS)": lambda net: hessopt.SaddleEscape(torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)),
    "NullBoost": lambda net: hessopt.NullBoost(SGD(net.parameters(), lr=0.1), every=2),
}

WAYS = ("module", "module, backward", "ddp, backward", "ddp", "empty")
RUNS = [(name, way) for name in CASES for way in (WAYS if name in ("NewtonCG", "SaddleEscape") else ("ddp",))]


def _case(name: str, way: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net = NETWORKS.get(name, network)()
        batch = shard(rank, processes, empty=way == "empty")
        if way.startswith("ddp"):
            ddp = DistributedDataParallel(net)
            return trained(ddp, CASES[name](ddp), batch, processes, backward="backward" in way)
        return trained(net, CASES[name](net), batch, processes, backward="backward" in way)

    return scenario


def _differing(name: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net = network()
        with torch.no_grad():
            next(net.parameters())[0, 0] += rank
        return trained(net, CASES[name](net), shard(rank, processes), processes)

    return scenario


def _not_finite(rank: int, processes: int) -> Any:
    """The loss of the last process is not a number."""
    net = network()
    x, y = shard(rank, processes)
    optimizer = hessopt.NewtonCG(net)
    found = []
    for factor in (torch.nan if rank == processes - 1 else 1.0, 1.0):
        try:
            found.append(str(optimizer.step(lambda: mse_loss(net(x), y) * factor)))  # noqa: B023
        except hessopt.errors.ClosureError as error:
            found.append(str(error))
    return found


def scenarios() -> dict[str, Scenario]:
    found: dict[str, Scenario] = {f"{name}, {way}": _case(name, way) for name, way in RUNS}
    found |= {f"{name}, differing": _differing(name) for name in ("NewtonCG", "SaddleEscape", "NullBoost")}
    return {**found, "not finite": _not_finite}


@pytest.fixture(scope="module", params=SIZES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("newton")
    return outcomes(__name__, request.param, folder)


@pytest.mark.parametrize(("name", "way"), RUNS)
def test_steps_are_those_of_one_process(found: list[dict[str, Any]], name: str, way: str) -> None:
    net = NETWORKS.get(name, network)()
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    parameters, losses = trained(net, CASES[name](net), shard(0, 1), 1, backward="backward" in way)
    assert not torch.allclose(parameters, start)
    for own in found:
        assert not isinstance(own[f"{name}, {way}"], str), own[f"{name}, {way}"]
        torch.testing.assert_close(own[f"{name}, {way}"][0], parameters, rtol=0, atol=1e-12)
        torch.testing.assert_close(own[f"{name}, {way}"][1], losses, rtol=0, atol=1e-12)
        assert torch.equal(own[f"{name}, {way}"][0], found[0][f"{name}, {way}"][0])


@pytest.mark.parametrize("name", ["NewtonCG", "SaddleEscape", "NullBoost"])
def test_copies_that_differ_are_an_error_everywhere_at_the_first_step(found: list[dict[str, Any]], name: str) -> None:
    for own in found if len(found) > 1 else []:
        message = own[f"{name}, differing"]
        assert isinstance(message, str), message
        for words in ("ModelError", "first step", name, "DistributedDataParallel", "separate_networks"):
            assert words in message


def test_a_loss_that_is_no_number_somewhere_is_an_error_everywhere(found: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(found):
        first, second = own["not finite"]
        assert "not finite in another process" in first or rank == len(found) - 1
        assert "the closure's loss is" in first
        assert "tensor(" in second
