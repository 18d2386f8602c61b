"""SpectralNewton and KroneckerNewton of several processes take the steps of one process on all samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import hessopt
from hessopt.averages import division
from tests.distributed.worker import Scenario, outcomes, same

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

STEPS, ROWS = 20, 12
"""Rows are divided among 1, 2, 3 and 4 processes evenly."""
PROCESSES = (2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow))

EMPIRICAL = hessopt.KroneckerAveraging(factor_every=3, inverse_every=5)
EXACT = hessopt.KroneckerAveraging(columns="exact", factor_every=3, inverse_every=5)


class Twice(nn.Module):
    """One layer is called twice, and one's weight is another's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.again = nn.Linear(5, 5)
        self.again.weight, self.again.bias = self.inner.weight, self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(torch.tanh(self.inner(torch.tanh(self.first(x))))))
        return self.last(self.again(x))


def _normalised() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    net[1].running_mean += 0.1  # type: ignore[operator]
    return net.eval()  # by running statistics, as those of a batch are other ones in parts of it


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(12, 3)
    ),
    "twice": Twice,
    "normalised": _normalised,
}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "spectral": lambda net, loss, **kwargs: hessopt.SpectralNewton(
        net, loss, coordinates=hessopt.KroneckerCoordinates(averages=EXACT), weight_decay=0.01, **kwargs
    ),
    "kronecker": lambda net, loss, **kwargs: hessopt.KroneckerNewton(
        net, loss=loss, curvature="ggn", averages=_accumulating(**kwargs)
    ),
    "band": lambda net, loss, **kwargs: hessopt.KroneckerNewton(
        net, loss=loss, curvature="ggn", bandwidth=1, weight_decay=0.01, averages=_accumulating(**kwargs)
    ),
}


OPTIMIZERS |= {
    "empirical spectral": lambda net, loss: hessopt.SpectralNewton(
        net, loss, coordinates=hessopt.KroneckerCoordinates(averages=EMPIRICAL, curvature="empirical")
    ),
    "empirical kronecker": lambda net, loss: hessopt.KroneckerNewton(
        net, loss=loss, curvature="empirical", averages=EMPIRICAL
    ),
    "choice of a band": lambda net, loss: hessopt.KroneckerNewton(
        net, loss=loss, curvature="ggn", bandwidth=hessopt.KroneckerBandwidth(6, window=2), averages=EXACT
    ),
}
MOST = ("spectral", "kronecker")
"""Those that are tried in all ways."""


def _accumulating(accumulate: int = 1) -> hessopt.KroneckerAveraging:
    return hessopt.KroneckerAveraging(columns="exact", factor_every=3, inverse_every=5, accumulate=accumulate)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def batch(step: int, rank: int, processes: int, sizes: list[int] | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(ROWS, 6, generator=generator), torch.randint(0, 3, (ROWS,), generator=generator)
    if sizes is None:
        return x[rank::processes], y[rank::processes]
    start = sum(sizes[:rank])
    return x[start : start + sizes[rank]], y[start : start + sizes[rank]]


def whole(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def plain(net: nn.Module, optimizer: Optimizer, loss: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss(net(x), y).backward()
    optimizer.step()


def clipped(net: nn.Module, optimizer: Optimizer, loss: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss(net(x), y).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()


def with_closure(net: nn.Module, optimizer: Optimizer, loss: Any, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(net(x), y)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]


def without_backward(net: nn.Module, optimizer: Optimizer, loss: Any, x: Tensor, y: Tensor) -> None:
    optimizer.step(lambda: loss(net(x), y))


def accumulated(net: nn.Module, optimizer: Optimizer, loss: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    half = len(x) // 2
    for i, part in enumerate((slice(0, half), slice(half, None))):
        with net.no_sync() if i == 0 and isinstance(net, DistributedDataParallel) else nullcontext():
            (loss(net(x[part]), y[part]) * (len(x[part]) / len(x))).backward()
    optimizer.step()


WAYS: dict[str, tuple[Callable[..., None], str, str, dict[str, Any]]] = {
    "plain": (plain, "linear", "name", {}),
    "module": (plain, "linear", "module", {}),
    "closure": (with_closure, "linear", "none", {}),
    "closure of a declared loss": (with_closure, "linear", "module", {}),
    "no backward": (without_backward, "linear", "none", {}),
    "accumulated": (accumulated, "linear", "module", {"accumulate": 2}),
    "clipped": (clipped, "linear", "name", {}),
    "convolution": (plain, "convolution", "name", {}),
    "twice": (plain, "twice", "name", {}),
    "normalised": (plain, "normalised", "name", {}),
}
"""How a step is taken, of which network, how the loss is declared, and further arguments."""

CELLS = [
    (kind, way)
    for kind in OPTIMIZERS
    for way in WAYS
    if kind in MOST or way == "plain" or (kind, way) == ("band", "twice")
]


def _loss(declared: str) -> tuple[Any, Any]:
    if declared == "module":
        criterion = nn.CrossEntropyLoss()
        return criterion, criterion
    return ("cross_entropy" if declared == "name" else None), cross_entropy


def trained(kind: str, way: str, rank: int = 0, processes: int = 1, *, inside: bool = False) -> Tensor:
    """The parameters after all steps."""
    step, name, declared, more = WAYS[way]
    declaration, loss = _loss(declared)
    net = network(name)
    if processes == 1:
        optimizer = OPTIMIZERS[kind](net, declaration, **more)
        called = net
    else:
        called = DistributedDataParallel(net)
        optimizer = OPTIMIZERS[kind](net if inside else called, declaration, **more)
    for number in range(STEPS):
        step(called, optimizer, loss, *batch(number, rank, processes))
    return whole(net)


@cache
def expected(kind: str, way: str) -> Tensor:
    return trained(kind, way)


def _trained(kind: str, way: str) -> Scenario:
    return lambda rank, processes: trained(kind, way, rank, processes, inside=way == "clipped")


def _by_owners(kind: str) -> Scenario:
    """Every piece of work has an owner."""

    def scenario(rank: int, processes: int) -> Any:
        before = division.WORTH, division.LEAST
        division.WORTH = division.LEAST = 0.0
        try:
            return trained(kind, "plain", rank, processes)
        finally:
            division.WORTH, division.LEAST = before

    return scenario


def scenarios() -> dict[str, Scenario]:
    found: dict[str, Scenario] = {}
    for kind, way in CELLS:
        found[f"{kind}, {way}"] = _trained(kind, way)
    for kind in (*MOST, "band"):
        found[f"{kind}, by owners"] = _by_owners(kind)
    return found


@pytest.fixture(scope="module", params=PROCESSES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return outcomes(__name__, request.param, tmp_path_factory.mktemp("layerwise"))


@pytest.mark.parametrize(("kind", "way"), CELLS)
def test_steps_are_those_of_one_process(found: list[dict[str, Any]], kind: str, way: str) -> None:
    torch.testing.assert_close(same(found, f"{kind}, {way}"), expected(kind, way), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [*MOST, "band"])
def test_work_that_is_divided_gives_the_same_steps(found: list[dict[str, Any]], kind: str) -> None:
    torch.testing.assert_close(same(found, f"{kind}, by owners"), expected(kind, "plain"), rtol=0, atol=1e-12)
