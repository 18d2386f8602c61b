"""Sums, means and copies over the processes that train one network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diagnostics.ranks.group import processes
from diagnostics.ranks.spread import is_distributed

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


@dataclass(frozen=True)
class Ranks:
    """The processes that train one network. With one process every method is free, and nothing is exchanged.

    Every process must call the same methods with tensors of the same shapes in the same order; after a call all hold
    the same bits. Never to be called from a hook: a forward pass that one process alone runs would wait for ever.

    Attributes:
        group: The process group; None for the default one.
        size: How many.
        rank: Which one this is, from 0.
    """

    group: Any = None
    size: int = 1
    rank: int = 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over processes: one exchange for each dtype and device."""
        if self.size == 1:
            return
        for own in _alike(tensors, lambda t: t):
            packed = torch.cat([t.detach().flatten() for t in own])
            dist.all_reduce(packed, group=self.group)
            _unpack(packed, own)

    def mean_(self, tensors: Sequence[Tensor], weight: float | Tensor | None = None) -> None:
        """Replace tensors by their means over processes, each with its weight: ``Σ w T / Σ w``.

        Args:
            tensors: Of floating point. One that is not finite makes the mean so, also with weight 0: set it to zero
                first where it is of no samples.
            weight: Of this process, such as its number of samples; not negative, and not zero everywhere. None, here
                and then in every process: they count the same, which saves an exchange.
        """
        if self.size == 1 or not tensors:
            return
        if weight is None:
            self.sum_(tensors)
            for t in tensors:
                t.detach().div_(self.size)
            return
        total = torch.as_tensor(weight, dtype=torch.float64 if tensors[0].dtype == torch.float64 else torch.float32)
        total = total.detach().to(tensors[0].device, copy=True)
        own = total.clone()
        self.sum_([total])
        share = own / total
        for t in tensors:
            t.detach().mul_(share.to(t.dtype))
        self.sum_(tensors)

    def copy_(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Replace each tensor by its owner's: one exchange for each dtype and device, if owners have about as much.

        That sends ``n max_r N_r`` numbers, N_r being those of owner r; where ``Σ N_r`` is less than half of that, each
        owner sends its own instead.

        Args:
            tensors: Of the same shapes everywhere.
            owners: The rank of each one's owner.
        """
        if self.size == 1:
            return
        for alike in _alike(list(zip(tensors, owners, strict=True)), lambda pair: pair[0]):
            parts: list[list[Tensor]] = [[] for _ in range(self.size)]
            for t, owner in alike:
                parts[owner].append(t)
            sizes = [sum(t.numel() for t in own) for own in parts]
            most = max(sizes)
            if self.size * most > 2 * sum(sizes):
                for owner, own in enumerate(parts):
                    if sizes[owner]:
                        packed = torch.cat([t.detach().flatten() for t in own])
                        dist.broadcast(packed, group=self.group, group_src=owner)
                        if owner != self.rank:
                            _unpack(packed, own)
                continue
            padded = alike[0][0].new_zeros(most)
            if sizes[self.rank]:
                torch.cat([t.detach().flatten() for t in parts[self.rank]], out=padded[: sizes[self.rank]])
            gathered = [torch.empty_like(padded) for _ in parts]
            dist.all_gather(gathered, padded, group=self.group)
            for owner, own in enumerate(parts):
                if owner != self.rank and sizes[owner]:
                    _unpack(gathered[owner][: sizes[owner]], own)

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes one after another, ``(Σ n, …)`` from ``(n, …)``; their numbers may differ."""
        if self.size == 1:
            return tensor
        counts = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        counts[self.rank] = len(tensor)
        dist.all_reduce(counts, group=self.group)
        sizes = counts.tolist()
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def owners(self, costs: Sequence[float]) -> list[int]:
        """A process for each piece of work, the most expensive first to whom has the least: the same list everywhere.

        Its largest load is at most 4/3 of the best division's (Graham 1969).
        """
        loads, found = [0.0] * self.size, [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            found[i] = min(range(self.size), key=loads.__getitem__)
            loads[found[i]] += costs[i]
        return found

    def objects(self, own: T) -> list[T]:
        """What each process has, of anything that can be pickled; waits for the device. For rare exchanges."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.group)
        return found

    def all(self, flag: Tensor) -> Tensor:
        """Whether a flag, a boolean without dimensions, is true in every process: on the device, without waiting."""
        if self.size == 1:
            return flag
        count = flag.to(torch.int32)
        dist.all_reduce(count, group=self.group)
        return count == self.size


def ranks_of(model: nn.Module | None = None, group: Any = None) -> Ranks:
    """The processes that train a network.

    Args:
        model: One in DistributedDataParallel has its process group, one that FSDP2 shards that of its mesh. For all
            others, also for what is inside of DistributedDataParallel, it is the default group.
        group: The process group, if it is another one.

    Returns:
        This process alone without a process group, and inside of :func:`separate_networks`.
    """
    if processes() == 1:
        return Ranks()
    if group is None and model is not None:
        group = _own_group(model)
    return Ranks(group, dist.get_world_size(group), dist.get_rank(group))


def _own_group(model: nn.Module) -> Any:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group
    return mesh_group(model.parameters())


def agreed(ranks: Ranks, work: Callable[[], T], caught: type[E], raised: Callable[[str], E]) -> T:
    """What the work of this process gives; if it raises an error in one process, all raise one.

    Waits for the device if there are several.

    Args:
        ranks: The processes, all of which have to come here.
        work: Which exchanges nothing.
        caught: Errors that the others are told of.
        raised: What they raise, of a message.
    """
    if ranks.size == 1:
        return work()
    found: list[T] = []
    error: E | None = None
    try:
        found.append(work())
    except caught as own:
        error = own
    messages: list[str | None] = ranks.objects(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise raised(f"in process {rank}: {message}")
    return found[0]


def mesh_group(tensors: Iterable[Tensor]) -> Any:
    """The process group of the mesh that tensors are distributed over, if it has one dimension; else None."""
    part = next((p for p in tensors if is_distributed(p)), None)
    if part is None:
        return None
    mesh = part.device_mesh  # type: ignore[attr-defined]
    return mesh.get_group() if mesh.ndim == 1 else None


def _alike(items: Sequence[T], tensor: Callable[[T], Tensor]) -> list[list[T]]:
    """Items whose tensors can be packed together."""
    found: dict[tuple[torch.dtype, torch.device], list[T]] = {}
    for item in items:
        t = tensor(item)
        found.setdefault((t.dtype, t.device), []).append(item)
    return list(found.values())


def _unpack(packed: Tensor, tensors: Sequence[Tensor]) -> None:
    for t, part in zip(tensors, packed.split([t.numel() for t in tensors]), strict=True):
        t.detach().copy_(part.view(t.shape))
