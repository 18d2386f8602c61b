"""Several processes: what is wrong with them is refused, and what is right is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import diagnostics
import hessopt
from hessopt.spectral.transfer import NewtonSchulz
from tests.distributed.worker import Scenario, outcomes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def data(rank: int = 0, processes: int = 1) -> tuple[Tensor, Tensor]:
    """The rows of a process."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
    return x[rank::processes], y[rank::processes]


def closure_of(net: nn.Module, optimizer: Optimizer, batch: Any, *, backward: bool) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = mse_loss(net(batch[0]), batch[1])
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    return closure


def trained(net: nn.Module, optimizer: Optimizer, batch: Any, way: str = "plain") -> Tensor:
    """All parameters after three steps, as a vector."""
    for _ in range(3):
        closure = closure_of(net, optimizer, batch, backward=way != "no backward")
        if way == "plain":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)  # type: ignore[arg-type]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


LOCAL: dict[str, Callable[[nn.Module], Optimizer]] = {
    "NewtonCG": lambda net: hessopt.NewtonCG(net.parameters()),
    "NewtonCG(model)": hessopt.NewtonCG,
    "BandedNewton": hessopt.BandedNewton,
    "KroneckerNewton": lambda net: hessopt.KroneckerNewton(net, loss="mse"),
    "SaddleEscape": lambda net: hessopt.SaddleEscape(SGD(net.parameters(), lr=0.1)),
    "NullBoost": lambda net: hessopt.NullBoost(SGD(net.parameters(), lr=0.1)),
    "SpectralNewton(online)": lambda net: hessopt.SpectralNewton(net, coordinates=hessopt.PowerLaw("online")),
}
"""Optimizers whose steps are of the batch of one process."""

REFUSED = ("BandedNewton", "SpectralNewton(online)")

SPECTRAL: dict[str, dict[str, Any]] = {
    "alpha 0": {"coordinates": hessopt.PowerLaw(0.0)},
    "alpha 1": {"coordinates": hessopt.PowerLaw(1.0), "weight_decay": 0.1},
    "alpha 2": {"coordinates": hessopt.PowerLaw()},
    "alpha 1 by Newton-Schulz": {"coordinates": hessopt.PowerLaw(1.0, newton_schulz=NewtonSchulz())},
}
SHARDED = ("alpha 0", "alpha 1")
"""Those that PyTorch's distributed tensors know."""


def _inside_of_ddp(make: Callable[[nn.Module], Optimizer]) -> Scenario:
    """F1: a `ddp.module` cannot be told from an ordinary network."""

    def scenario(rank: int, processes: int) -> Any:
        net = DistributedDataParallel(network())
        return trained(net, make(net.module), data(rank, processes), "closure")

    return scenario


def _separate(make: Callable[[nn.Module], Optimizer]) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net = network()
        with hessopt.separate_networks():
            return trained(net, make(net), data(rank, processes), "closure")

    return scenario


def _spectral_ddp(arguments: dict[str, Any], way: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net = DistributedDataParallel(network())
        return trained(net, hessopt.SpectralNewton(net, **arguments), data(rank, processes), way)

    return scenario


def _sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def _spectral_fsdp(arguments: dict[str, Any]) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net = _sharded()
        return trained(net, hessopt.SpectralNewton(net, **arguments), data(rank, processes))

    return scenario


def _tensor_parallel() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _different_copies(rank: int, processes: int) -> Any:
    net = network()
    with torch.no_grad():
        net[0].weight += rank  # type: ignore[operator]
    if rank:
        dist.barrier()  # who comes first cannot know
    optimizer = hessopt.SpectralNewton(net, coordinates=hessopt.PowerLaw())
    before = [p.detach().clone() for p in net.parameters()]
    found = []
    for _ in range(2):
        try:
            trained(net, optimizer, data(rank, processes))
        except RuntimeError as error:
            found.append(str(error))
    if not rank:
        dist.barrier()
    same = all(map(torch.equal, before, net.parameters()))
    return found, same


def _different_networks(rank: int, processes: int) -> Any:
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(4, 3 + rank), nn.Tanh(), nn.Linear(3 + rank, 2))
    trained(net, hessopt.SpectralNewton(net, coordinates=hessopt.PowerLaw()), data())
    return True


def _one_process_alone(rank: int, processes: int) -> Any:
    if rank == 0:
        net = network()
        return trained(net, hessopt.SpectralNewton(net, coordinates=hessopt.PowerLaw()), data())
    return None


def _memories(differ: bool) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net = DistributedDataParallel(network())
        size = sum(p.numel() for p in net.parameters())
        basis = torch.randn(size, 2, generator=torch.Generator().manual_seed(rank if differ else 0))
        optimizer = hessopt.NullProject(SGD(net.module.parameters(), lr=0.1), basis)
        closure_of(net, optimizer, data(rank, processes), backward=True)()
        if rank and differ:
            dist.barrier()  # who comes first cannot know
        try:
            optimizer.step()
        finally:
            if not rank and differ:
                dist.barrier()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    return scenario


DIAGNOSTICS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "HessianOperator": lambda net, batch: diagnostics.HessianOperator(net, batch, mse_loss) @ torch.ones(77),
    "capture": lambda net, batch: diagnostics.capture(net, batch[0], lambda z: mse_loss(z, batch[1])).loss,
    "Monitor": lambda net, batch: diagnostics.Monitor(net, mse_loss, metrics=("gn_gap",)).measure(batch).values,
    "diagnose": lambda net, batch: diagnostics.diagnose(net, batch, mse_loss, sections=["network"]).data["model"],
}


def _diagnosed(measure: Callable[[nn.Module, Any], Any], wrap: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net = network()
        assert sum(p.numel() for p in net.parameters()) == 77
        wrapped: nn.Module = DistributedDataParallel(net) if wrap.startswith("ddp") else net
        if wrap == "sharded":
            wrapped = _sharded()
        elif wrap == "tensor parallel":
            wrapped = _tensor_parallel()
        return measure(net if wrap == "ddp.module" else wrapped, data(rank, processes))

    return scenario


def _monitor_on_rank_0(rank: int, processes: int) -> Any:
    """Its forward passes must not wait for the other process in the broadcast of the buffers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
    ddp = DistributedDataParallel(net)
    optimizer = SGD(ddp.parameters(), lr=0.1)
    batch = data(rank, processes)
    trained(ddp, optimizer, batch)
    if rank == 0:
        assert diagnostics.Monitor(net, mse_loss, training_mode=True).step(batch) is not None
    return trained(ddp, optimizer, batch)


def scenarios() -> dict[str, Scenario]:
    found: dict[str, Scenario] = {
        "different copies": _different_copies,
        "different networks": _different_networks,
        "one process alone": _one_process_alone,
        "memories alike": _memories(False),
        "memories differ": _memories(True),
        "monitor of rank 0": _monitor_on_rank_0,
        "spectral, tensor parallel": lambda rank, processes: repr(
            hessopt.SpectralNewton(_tensor_parallel(), coordinates=hessopt.PowerLaw(1.0))
        ),
        "spectral, tensor parallel parameters": lambda rank, processes: repr(
            hessopt.SpectralNewton(_tensor_parallel().parameters(), coordinates=hessopt.PowerLaw(1.0))
        ),
        "sharded NewtonCG": lambda rank, processes: repr(hessopt.NewtonCG(_sharded().parameters())),
        "sharded SaddleEscape": lambda rank, processes: repr(hessopt.SaddleEscape(SGD(_sharded().parameters()))),
    }
    for name, make in LOCAL.items():
        if name in REFUSED:
            found[f"{name} inside"] = _inside_of_ddp(make)
        found[f"{name} separate"] = _separate(make)
    for name, arguments in SPECTRAL.items():
        for way in ("plain", "closure", "no backward"):
            found[f"{name} ddp {way}"] = _spectral_ddp(arguments, way)
        found[f"{name} fsdp"] = _spectral_fsdp(arguments)
    for name, measure in DIAGNOSTICS.items():
        for wrap in (
            *(("ddp",) if name in ("capture", "diagnose") else ()),
            "ddp.module",
            "sharded",
            "tensor parallel",
        ):
            found[f"{name} {wrap}"] = _diagnosed(measure, wrap)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return outcomes(__name__, 2, tmp_path_factory.mktemp("ranks"))


def _refused(found: list[dict[str, Any]], name: str, *words: str) -> None:
    for own in found:
        assert isinstance(own[name], str), own[name]
        for word in words:
            assert word in own[name], own[name]


@pytest.mark.parametrize("name", REFUSED)
def test_copies_that_would_drift_apart_are_refused(found: list[dict[str, Any]], name: str) -> None:
    _refused(found, f"{name} inside", "ModelError", "2 processes", "separate_networks", "SpectralNewton")


@pytest.mark.parametrize("name", LOCAL)
def test_separate_networks_train_as_in_one_process(found: list[dict[str, Any]], name: str) -> None:
    for rank, own in enumerate(found):
        net = network()
        expected = trained(net, LOCAL[name](net), data(rank, 2), "closure")
        torch.testing.assert_close(own[f"{name} separate"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("way", ["plain", "closure"])
def test_spectral_steps_under_ddp_are_those_of_one_process(found: list[dict[str, Any]], name: str, way: str) -> None:
    net = network()
    expected = trained(net, hessopt.SpectralNewton(net, **SPECTRAL[name]), data())
    for own in found:
        torch.testing.assert_close(own[f"{name} ddp {way}"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPECTRAL)
def test_gradients_that_ddp_does_not_average_are_refused(found: list[dict[str, Any]], name: str) -> None:
    _refused(found, f"{name} ddp no backward", "ClosureError", "backward()", "separate_networks")


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_steps_under_fsdp_are_right_or_refused(found: list[dict[str, Any]], name: str) -> None:
    if name not in SHARDED:
        _refused(found, f"{name} fsdp", "ModelError", "DTensor", "alpha=1.0")
        return
    net = network()
    expected = trained(net, hessopt.SpectralNewton(net, **SPECTRAL[name]), data())
    for own in found:
        torch.testing.assert_close(own[f"{name} fsdp"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["spectral, tensor parallel", "spectral, tensor parallel parameters"])
def test_tensor_parallelism_is_refused_by_name(found: list[dict[str, Any]], name: str) -> None:
    _refused(found, name, "ModelError", "tensor parallelism")


@pytest.mark.parametrize("name", ["sharded NewtonCG", "sharded SaddleEscape"])
def test_sharded_parameters_are_refused_by_name(found: list[dict[str, Any]], name: str) -> None:
    _refused(found, name, "ModelError", "DTensor")


def test_copies_that_differ_are_found_at_the_first_step(found: list[dict[str, Any]]) -> None:
    (first, _), (second, unchanged) = (own["different copies"] for own in found)
    assert first == []
    assert len(second) == 2
    assert all("first step" in message and "separate_networks" in message for message in second)
    assert unchanged


def test_other_networks_and_lone_processes_are_not_waited_for(found: list[dict[str, Any]]) -> None:
    assert [own["different networks"] for own in found] == [True, True]
    assert isinstance(found[0]["one process alone"], Tensor)


def test_memories_are_compared(found: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(found[0]["memories alike"], found[1]["memories alike"], rtol=0, atol=0)
    assert isinstance(found[0]["memories differ"], Tensor)
    assert "the memory of this process" in found[1]["memories differ"]


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_diagnostics_of_wrapped_networks_are_refused_by_name(found: list[dict[str, Any]], name: str) -> None:
    if name in ("capture", "diagnose"):
        _refused(found, f"{name} ddp", "CaptureError", "DistributedDataParallel", ".module", "own batches", "Monitor")
    _refused(found, f"{name} sharded", "CaptureError", "fully_shard", "get_model_state_dict")
    _refused(found, f"{name} tensor parallel", "CaptureError", "tensor parallelism", "'0.weight'")


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_diagnostics_inside_of_ddp_are_of_the_local_batch(found: list[dict[str, Any]], name: str) -> None:
    for rank, own in enumerate(found):
        expected = DIAGNOSTICS[name](network(), data(rank, 2))
        if name == "diagnose":
            assert own[f"{name} ddp.module"] == expected
        else:
            torch.testing.assert_close(own[f"{name} ddp.module"], expected, rtol=0, atol=1e-12)


def test_a_monitor_of_one_process_does_not_wait_for_the_others(found: list[dict[str, Any]]) -> None:
    first, second = (own["monitor of rank 0"] for own in found)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
