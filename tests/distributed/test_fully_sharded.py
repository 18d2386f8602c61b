"""SpectralNewton and KroneckerNewton of networks that FSDP2 shards take the steps of one process on all samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessopt
from hessopt.averages import division
from tests.distributed.test_layerwise import (
    NETWORKS,
    OPTIMIZERS,
    Twice,
    accumulated,
    batch,
    clipped,
    network,
    plain,
    with_closure,
    without_backward,
)
from tests.distributed.worker import Scenario, outcomes, same

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

STEPS = 20
PROCESSES = (2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow))
NETWORKS["narrow"] = lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3))

WAYS: dict[str, tuple[Any, str, bool, dict[str, Any]]] = {
    "plain": (plain, "linear", False, {}),
    "module": (plain, "linear", True, {}),
    "closure": (with_closure, "linear", False, {}),
    "accumulated": (accumulated, "linear", True, {"accumulate": 2}),
    "clipped": (clipped, "linear", False, {}),
    "convolution": (plain, "convolution", False, {}),
    "twice": (plain, "twice", False, {}),
    "narrow": (plain, "narrow", False, {}),
}
"""How a step is taken, of which network, whether the loss is declared as a module, and further arguments."""

KINDS = ("spectral", "kronecker", "band")
CELLS = [(kind, way) for kind in KINDS for way in WAYS if kind != "band" or way == "plain"]
CELLS.append(("empirical spectral", "plain"))


def sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if not isinstance(net, Twice):  # modules that share parameters are of one group
        for layer in net.children():
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def whole(net: nn.Module) -> Tensor:
    return torch.cat(
        [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in net.parameters()]
    )


def trained(kind: str, way: str, rank: int = 0, processes: int = 1, steps: int = STEPS) -> Tensor:
    step, name, module, more = WAYS[way]
    loss: Any = nn.CrossEntropyLoss() if module else cross_entropy
    net = network(name)
    if processes > 1:
        net = sharded(net)
    declared = loss if module else None if way == "closure" else "cross_entropy"
    optimizer = OPTIMIZERS[kind](net, declared, **more)
    for number in range(steps):
        step(net, optimizer, loss, *batch(number, rank, processes))
    if kind == "spectral":
        optimizer.eval()  # type: ignore[attr-defined]
        shown = whole(net)
        optimizer.train()  # type: ignore[attr-defined]
        return torch.cat([whole(net), shown])
    return whole(net)


def _trained(kind: str, way: str) -> Scenario:
    return lambda rank, processes: trained(kind, way, rank, processes)


def _by_owners(kind: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        before = division.WORTH, division.LEAST
        division.WORTH = division.LEAST = 0.0
        try:
            return trained(kind, "plain", rank, processes)
        finally:
            division.WORTH, division.LEAST = before

    return scenario


def _empty(kind: str) -> Scenario:
    """A process without samples takes part in what the network exchanges."""

    def scenario(rank: int, processes: int) -> Any:
        net = sharded(network("linear"))
        optimizer = OPTIMIZERS[kind](net, "cross_entropy")
        for number in range(8):
            x, y = batch(number, rank, processes, [0] * (processes - 1) + [12])
            optimizer.zero_grad()
            output = net(x)
            (cross_entropy(output, y) if len(x) else output.sum() * 0.0).backward()
            optimizer.step()
        return whole(net)

    return scenario


def _refused(kind: str) -> Scenario:
    """Derivatives with respect to sharded parameters."""

    def scenario(rank: int, processes: int) -> Any:
        net = sharded(network("linear"))
        without_backward(net, OPTIMIZERS[kind](net, None), cross_entropy, *batch(0, rank, processes))

    return scenario


def _diagonal(rank: int, processes: int) -> Any:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * self.scale)

    return repr(hessopt.KroneckerNewton(sharded(Scaled()), loss="cross_entropy"))


def _tensor_parallel(kind: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (processes,))
        net = parallelize_module(network("linear"), mesh, {"0": ColwiseParallel()})
        return repr(OPTIMIZERS[kind](net, "cross_entropy"))

    return scenario


def scenarios() -> dict[str, Scenario]:
    found = {f"{kind}, {way}": _trained(kind, way) for kind, way in CELLS}
    for kind in KINDS:
        found[f"{kind}, by owners"] = _by_owners(kind)
        found[f"{kind}, empty"] = _empty(kind)
        found[f"{kind}, no backward"] = _refused(kind)
        found[f"{kind}, tensor parallel"] = _tensor_parallel(kind)
    found["diagonal"] = _diagonal
    return found


@pytest.fixture(scope="module", params=PROCESSES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return outcomes(__name__, request.param, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize(("kind", "way"), CELLS)
def test_steps_are_those_of_one_process(found: list[dict[str, Any]], kind: str, way: str) -> None:
    torch.testing.assert_close(same(found, f"{kind}, {way}"), trained(kind, way), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_work_that_is_divided_gives_the_same_steps(found: list[dict[str, Any]], kind: str) -> None:
    torch.testing.assert_close(same(found, f"{kind}, by owners"), trained(kind, "plain"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_samples_is_not_waited_for(found: list[dict[str, Any]], kind: str) -> None:
    assert same(found, f"{kind}, empty").isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_that_sharding_hides_are_refused(found: list[dict[str, Any]], kind: str) -> None:
    for own in found:
        assert "ClosureError" in own[f"{kind}, no backward"]
        assert "backward()" in own[f"{kind}, no backward"]


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallelism_is_refused_by_name(found: list[dict[str, Any]], kind: str) -> None:
    for own in found:
        assert "ModelError" in own[f"{kind}, tensor parallel"]
        assert "tensor parallelism" in own[f"{kind}, tensor parallel"]


def test_diagonals_of_sharded_parameters_are_refused_by_name(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert "ModelError: parameter 'scale' has no Kronecker factors" in own["diagonal"]
