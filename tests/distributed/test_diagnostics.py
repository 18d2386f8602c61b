"""Curvature over the batches of several processes is that of one process on all samples."""

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

import diagnostics
from tests.distributed.test_newton import SIZES, network, shard
from tests.distributed.worker import Scenario, outcomes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

Measure = Callable[[nn.Module, Any], Any]
"""Of a network and what this process has of the data."""


def summed(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().sum()


def bent(net: nn.Module, batch: Any) -> Any:
    op = diagnostics.HessianOperator(net, batch, mse_loss)
    v = torch.linspace(-1.0, 1.0, op.shape[0])
    loss, gradient = op.loss_and_gradient()
    return [op @ v, loss, gradient, *op.products(torch.stack([v, v.square()], 1))]


def eigenvalues(net: nn.Module, batch: Any) -> Tensor:
    return diagnostics.extreme_eigenpairs(diagnostics.HessianOperator(net, batch, mse_loss), which="both").values


def metrics(net: nn.Module, batch: Any) -> list[Tensor]:
    """More probes than entries, so that all blocks are exact."""
    inside = net.module if isinstance(net, DistributedDataParallel) else net
    graph = diagnostics.capture(inside, batch[0], lambda z: mse_loss(z, batch[1]))
    given = diagnostics.ShardedGraph(graph, net.process_group) if inside is not net else graph
    table = diagnostics.estimate_metrics(given, 8)
    return [table.resonance, table.tensor_norm, table.gn_norm, table.coupling]


def monitored(net: nn.Module, batch: Any) -> dict[str, float]:
    monitor = diagnostics.Monitor(net, mse_loss, probes=8, every=2)
    found = [monitor.step(batch) for _ in range(3)]
    assert [m is None for m in found] == [False, True, False]
    assert found[2] is not None
    return found[2].values


def _fisher(kind: Any) -> Measure:
    def measure(net: nn.Module, batch: Any) -> Tensor:
        op = diagnostics.FisherOperator(net, batch, mse_loss, kind=kind, likelihood="gaussian")
        return op @ torch.linspace(-1.0, 1.0, op.shape[0])

    return measure


def _determined(net: nn.Module, batch: Any) -> float:
    op = diagnostics.GaussNewtonOperator(net, batch, mse_loss)
    return op.check_deterministic().difference + float(op.check_symmetric() > 1e-12)


MEASURES: dict[str, Measure] = {
    "HessianOperator": bent,
    "several batches": lambda net, batch: bent(net, list(zip(batch[0].split(2), batch[1].split(2), strict=True))),
    "sums": lambda net, batch: (
        diagnostics.TensorOperator(net, batch, summed, reduction="sum")
        @ torch.ones(sum(p.numel() for p in net.parameters()))
    ),
    "Fisher": _fisher("type-2"),
    "empirical Fisher": _fisher("empirical"),
    "eigenvalues": eigenvalues,
    "checks": _determined,
    "estimate_metrics": metrics,
    "Monitor": monitored,
}
EMPTY = [name for name in MEASURES if name not in ("estimate_metrics",)]
"""Those that a process without samples takes part in."""


def _measured(name: str, *, empty: bool) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net = nn.Sequential(*network(), nn.BatchNorm1d(2).eval())  # has buffers
        return MEASURES[name](DistributedDataParallel(net), shard(rank, processes, empty=empty))

    return scenario


def _infinite(rank: int, processes: int) -> Any:
    x, y = shard(rank, processes)
    batch = (x, y / 0 if rank == 0 else y)
    return str(diagnostics.HessianOperator(DistributedDataParallel(network()), batch, mse_loss))


def _written(rank: int, processes: int) -> Any:
    found: list[int] = []
    monitor = diagnostics.Monitor(
        DistributedDataParallel(network()), mse_loss, metrics=("sharpness",), writers=[lambda m: found.append(m.step)]
    )
    monitor.step(shard(rank, processes))
    return found, len(monitor.history)


def _alone(rank: int, processes: int) -> Any:
    """`.module` is of the local batch, in one process alone."""
    ddp = DistributedDataParallel(network())
    return bent(ddp.module, shard(rank, processes)) if rank == processes - 1 else None


def _per_sample(rank: int, processes: int) -> Any:
    x, y = shard(rank, processes)
    graph = diagnostics.capture(network(), x, lambda z: mse_loss(z, y))
    return repr(diagnostics.estimate_metrics(diagnostics.ShardedGraph(graph), 8, per_sample=True))


def scenarios() -> dict[str, Scenario]:
    found = {name: _measured(name, empty=False) for name in MEASURES}
    found |= {f"{name}, empty": _measured(name, empty=True) for name in EMPTY}
    return {**found, "infinite": _infinite, "written": _written, "alone": _alone, "per sample": _per_sample}


@pytest.fixture(scope="module", params=SIZES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("diagnostics")
    return outcomes(__name__, request.param, folder)


@pytest.mark.parametrize("name", [*MEASURES, *(f"{name}, empty" for name in EMPTY)])
def test_curvature_is_that_of_all_samples(found: list[dict[str, Any]], name: str) -> None:
    net = nn.Sequential(*network(), nn.BatchNorm1d(2).eval())
    expected = MEASURES[name.removesuffix(", empty")](net, shard(0, 1))
    for own in found:
        torch.testing.assert_close(own[name], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own[name], found[0][name], rtol=0, atol=0)


def test_an_error_in_one_process_is_one_in_all(found: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(found):
        assert "Error" in own["infinite"]
        assert rank == 0 or "in process 0" in own["infinite"]


def test_the_first_process_writes(found: list[dict[str, Any]]) -> None:
    assert [own["written"] for own in found] == [([0] if rank == 0 else [], 1) for rank in range(len(found))]


def test_one_process_measures_its_own_batches(found: list[dict[str, Any]]) -> None:
    n = len(found)
    expected = bent(network(), shard(n - 1, n))
    torch.testing.assert_close(found[-1]["alone"], expected, rtol=1e-12, atol=1e-12)


def test_single_samples_of_several_processes_are_refused(found: list[dict[str, Any]]) -> None:
    for own in found if len(found) > 1 else []:
        assert "per_sample" in own["per sample"]
