"""The batches of several processes as one set of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from diagnostics.autograd.trees import map_tensors, tensors
from diagnostics.errors import DiagnosticsError
from diagnostics.ranks.collectives import Ranks, agreed, ranks_of

T = TypeVar("T")


class Shard(NamedTuple):
    """What this process has of data that are divided between several.

    Attributes:
        batches: Its batches; where it has no samples, a stand-in, which is another process's first batch.
        counts: Whether they are its own; a stand-in counts for nothing.
    """

    batches: Any
    counts: bool


def unwrapped(model: nn.Module) -> tuple[nn.Module, Ranks]:
    """The network inside of DistributedDataParallel, and its processes; any other network itself, and this process."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, ranks_of(model)
    return model, Ranks()


def shard(source: Any, ranks: Ranks) -> Shard:
    """The batches of this process, and whether they count.

    Raises:
        DiagnosticsError: no process has a sample.
    """
    if ranks.size == 1:
        return Shard(source, True)
    there = ranks.objects(not _is_empty(source))
    if all(there):
        return Shard(source, True)
    if not any(there):
        raise DiagnosticsError(f"none of {ranks.size} processes has a sample: there is nothing to average over.")
    owner = there.index(True)
    first = source if isinstance(source, tuple) else next(iter(source)) if ranks.rank == owner else None
    sent = map_tensors(lambda t: t.detach().cpu(), tuple(first)) if ranks.rank == owner and first is not None else None
    stand_in = ranks.objects(sent)[owner]
    return Shard(source, True) if there[ranks.rank] else Shard(stand_in, False)


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """What the work of this process gives; an error of this package in one process is an error in all."""
    return agreed(ranks, work, DiagnosticsError, DiagnosticsError)


def _is_empty(source: Any) -> bool:
    """Whether there is no sample in the first batch, or no batch."""
    if not isinstance(source, tuple):
        if not hasattr(source, "__iter__") or isinstance(source, Tensor | str) or iter(source) is source:
            return False  # refused where it is read
        source = next(iter(source), None)
        if source is None:
            return True
    found = tensors(source[0]) if len(source) else []
    return bool(found) and found[0].ndim > 0 and len(found[0]) == 0
