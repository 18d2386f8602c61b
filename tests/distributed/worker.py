"""Runs scenarios in several processes, by gloo and a file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

TIMEOUT = timedelta(seconds=60)
"""Of a process that waits for another one."""

Scenario = Callable[[int, int], Any]
"""``(rank, number of processes) ->`` a value of tensors and plain types."""


def outcomes(module: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    """What each of the ``scenarios()`` of a module returned, or ``"Type: message"`` of its error, for each process."""
    mp.spawn(_run, (module, processes, folder), processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def same(found: list[dict[str, Any]], name: str) -> Tensor:
    """The tensor that a scenario gave in all processes, bit for bit."""
    first = found[0][name]
    for own in found:
        assert isinstance(own[name], Tensor), own[name]
        assert torch.equal(own[name], first)
    return first


def _run(rank: int, module: str, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=TIMEOUT)
    found = {}
    for name, scenario in import_module(module).scenarios().items():
        try:
            found[name] = scenario(rank, processes)
        except RuntimeError as error:  # of which our own are
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
