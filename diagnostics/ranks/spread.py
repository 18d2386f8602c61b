"""What spreads a network over processes or devices."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

SpreadKind: TypeAlias = Literal[
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "fully_shard (FSDP2)",
    "tensor parallelism",
    "pipeline parallelism",
]

_CLASSES: tuple[tuple[str, str, SpreadKind], ...] = (
    ("torch.nn.parallel", "DistributedDataParallel", "DistributedDataParallel"),
    ("torch.nn.parallel", "DataParallel", "DataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule", "fully_shard (FSDP2)"),
    ("torch.distributed.pipelining", "Pipe", "pipeline parallelism"),
)
"""By name, as importing these classes takes longer than what asks for them."""

_GATHERED = (
    "load `torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
    "StateDictOptions(full_state_dict=True))` into a network that is not spread"
)


class Spread(NamedTuple):
    """What spreads a network over processes or devices.

    Attributes:
        where: ``"the model"``, ``"module 'name'"`` or ``"parameter 'name'"``.
        kind: As PyTorch calls it.
        way_out: How to get a network that is whole in this process.
    """

    where: str
    kind: SpreadKind
    way_out: str


def spread(model: nn.Module) -> Spread | None:
    """What spreads a network over processes or devices; None for an ordinary network.

    Costs a look at the class of every module and parameter. The ``.module`` of a DistributedDataParallel is an ordinary
    network: :func:`processes` tells whether there are others.
    """
    part = None  # of an FSDPModule, which tells more, the parameters are distributed as well
    for name, module in model.named_modules():
        kind = _kind(type(module))  # type: ignore[arg-type]
        if kind is not None:
            return Spread(f"module {name!r}" if name else "the model", kind, _way_out(kind, module))
        if part is None:
            owned = (f"{name}.{own}".lstrip(".") for own, p in module._parameters.items() if is_distributed(p))
            part = next(owned, None)
    return None if part is None else Spread(f"parameter {part!r}", "tensor parallelism", _way_out("tensor parallelism"))


@lru_cache(maxsize=4096)
def _kind(cls: type) -> SpreadKind | None:
    for base in cls.__mro__:
        for module, name, kind in _CLASSES:
            if base.__name__ == name and base.__module__.startswith(module):
                return kind
    return None


def _way_out(kind: SpreadKind, module: nn.Module | None = None) -> str:
    if kind == "DistributedDataParallel":
        join = getattr(getattr(module, "_join_config", None), "enable", False)
        return "pass the network inside of it, its `.module`" + (", and leave `Join`" if join else "")
    if kind == "DataParallel":
        return "pass the network inside of it, its `.module`, which is on one device"
    if kind == "pipeline parallelism":
        return "pass the network that was split into stages"
    return _GATHERED


def is_distributed(tensor: Tensor | None) -> bool:
    """Whether a tensor is a :class:`torch.distributed.tensor.DTensor`, of which a process may hold a part."""
    return _is_dtensor(type(tensor))  # type: ignore[arg-type]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, in the same memory, without a tape; another tensor detached."""
    detached = tensor.detach()
    return detached.to_local() if is_distributed(detached) else detached  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _is_dtensor(cls: type) -> bool:
    return any(b.__name__ == "DTensor" and b.__module__.startswith("torch.distributed") for b in cls.__mro__)
