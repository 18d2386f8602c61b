"""A state of any number of processes is taken up by any other number, and training goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tests.distributed.test_fully_sharded import sharded, whole
from tests.distributed.test_layerwise import OPTIMIZERS, batch, network, plain
from tests.distributed.worker import Scenario, outcomes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

KINDS, WRAPS = ("spectral", "kronecker"), ("ddp", "fsdp")
BEFORE, AFTER = 7, 8
LOADING = (1, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow))
FOLDER = "checkpoints"
"""Beside the folders of the processes that write and read."""


def made(kind: str, wrap: str, processes: int) -> tuple[nn.Module, Optimizer]:
    net = network("linear")
    if wrap == "ddp" and processes > 1:
        net = DistributedDataParallel(net)
    elif wrap == "fsdp":
        net = sharded(net)
    return net, OPTIMIZERS[kind](net, "cross_entropy")


def steps(net: nn.Module, optimizer: Optimizer, numbers: range, rank: int, processes: int) -> Tensor:
    for number in numbers:
        plain(net, optimizer, cross_entropy, *batch(number, rank, processes))
    return whole(net)


def _uninterrupted(kind: str) -> Tensor:
    return steps(*made(kind, "alone", 1), range(BEFORE + AFTER), 0, 1)


def _folder() -> Path:
    """The processes' working directory is their folder's."""
    return Path.cwd() / FOLDER


def _written(kind: str, wrap: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net, optimizer = made(kind, wrap, processes)
        steps(net, optimizer, range(BEFORE), rank, processes)
        state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.save(state, checkpoint_id=_folder() / f"{kind} {wrap}")
        whole_state = optimizer.state_dict()
        if rank == 0 and wrap == "ddp":
            torch.save([net.module.state_dict(), whole_state], _folder() / f"{kind} {wrap}.pt")
        return steps(net, optimizer, range(BEFORE, BEFORE + AFTER), rank, processes)

    return scenario


def _read(kind: str, source: str, wrap: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        net, optimizer = made(kind, wrap, processes)
        before = whole(net)
        state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        assert torch.equal(before, whole(net))  # though a step was asked for
        dcp.load(state, checkpoint_id=_folder() / f"{kind} {source}")
        set_model_state_dict(net, state["model"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        return steps(net, optimizer, range(BEFORE, BEFORE + AFTER), rank, processes)

    return scenario


def _saved_by_torch(kind: str, wrap: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        model, state = torch.load(_folder() / f"{kind} ddp.pt", weights_only=False)
        net = network("linear")
        net.load_state_dict(model)
        net = sharded(net) if wrap == "fsdp" else DistributedDataParallel(net) if processes > 1 else net
        optimizer = OPTIMIZERS[kind](net, "cross_entropy")
        optimizer.load_state_dict(state)
        return steps(net, optimizer, range(BEFORE, BEFORE + AFTER), rank, processes)

    return scenario


def scenarios() -> dict[str, Scenario]:
    if not dist.is_initialized() or dist.get_world_size() == 2:
        return {f"{kind} {wrap}": _written(kind, wrap) for kind in KINDS for wrap in WRAPS}
    found: dict[str, Scenario] = {}
    for kind in KINDS:
        for wrap in WRAPS:
            for source in WRAPS:
                found[f"{kind} {source} to {wrap}"] = _read(kind, source, wrap)
            found[f"{kind} torch.save to {wrap}"] = _saved_by_torch(kind, wrap)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / FOLDER).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "two").mkdir()
        return folder, outcomes(__name__, 2, folder / "two")


@pytest.fixture(scope="module", params=LOADING)
def read(
    request: pytest.FixtureRequest, written: tuple[Path, list[dict[str, Any]]]
) -> tuple[int, list[dict[str, Any]]]:
    folder, count = written[0], request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / str(count)).mkdir()
        return count, outcomes(__name__, count, folder / str(count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_state_that_is_written_changes_nothing(written: Any, kind: str, wrap: str) -> None:
    for own in written[1]:
        assert isinstance(own[f"{kind} {wrap}"], Tensor), own[f"{kind} {wrap}"]
        torch.testing.assert_close(own[f"{kind} {wrap}"], _uninterrupted(kind), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("source", [*WRAPS, "torch.save"])
def test_other_numbers_of_processes_go_on(
    read: tuple[int, list[dict[str, Any]]], kind: str, source: str, wrap: str
) -> None:
    for own in read[1]:
        found = own[f"{kind} {source} to {wrap}"]
        assert isinstance(found, Tensor), found
        torch.testing.assert_close(found, _uninterrupted(kind), rtol=0, atol=1e-12)
