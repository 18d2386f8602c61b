"""What optimizers refuse where several processes train together, and what is compared before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from diagnostics.ranks.group import processes, same_everywhere
from diagnostics.ranks.spread import is_distributed, spread
from hessopt.errors import ClosureError, ModelError

_WAY_OUT = (
    "Train in one process; or take SpectralNewton with coordinates=PowerLaw(…) and a fixed alpha, which needs no more "
    "than the gradients that DistributedDataParallel has averaged."
)


def refuse_spread(owner: str, model: nn.Module | None, parameters: Iterable[Tensor] = ()) -> None:
    """Raise a :class:`hessopt.errors.ModelError` if the network or a parameter is spread over processes or devices.

    Args:
        owner: The optimizer's name.
        model: The network, if it is known.
        parameters: The optimizer's.
    """
    found = None if model is None else spread(model)
    if found is not None:
        raise ModelError(
            f"{found.where} is spread by {found.kind}, over which {owner} does not reduce its curvature. In one "
            f"process, {found.way_out}. {_WAY_OUT}"
        )
    for p in parameters:
        if is_distributed(p):
            raise ModelError(
                f"a parameter of shape {tuple(p.shape)} is a DTensor, of which each process has a part, and {owner} "
                f"computes curvature in one process. {_WAY_OUT}"
            )


def refuse_processes(owner: str, what: str = "curvature") -> None:
    """Raise a :class:`hessopt.errors.ModelError` where several processes train together.

    Args:
        owner: The optimizer's name.
        what: It computes from the batch of one process.
    """
    count = processes()
    if count > 1:
        raise ModelError(
            f"a process group of {count} processes is initialised, and {owner} computes {what} from the batch of one "
            "process: copies of one network (a `ddp.module`, too) would drift apart. "
            f"{_WAY_OUT} If every process trains a network of its own, say so: `with hessopt.separate_networks(): …` "
            "around the training."
        )


def refuse_own_gradients(owner: str) -> None:
    """Raise a :class:`hessopt.errors.ClosureError` where several processes train, as gradients are of one batch."""
    count = processes()
    if count > 1:
        raise ClosureError(
            f"a process group of {count} processes is initialised, and the closure does not call backward(): the "
            f"gradient that {owner} would compute is that of this process's batch, which DistributedDataParallel does "
            "not average. Call `loss.backward()` in the closure; or, if every process trains a network of its own, "
            "say so: `with hessopt.separate_networks(): …` around the training."
        )


def check_alike(owner: str, what: str, tensors: Iterable[Tensor]) -> None:
    """Raise a :class:`hessopt.errors.ModelError` if the tensors of several processes differ, of which this is one.

    The first process that comes here cannot know (:func:`diagnostics.ranks.group.same_everywhere`).

    Args:
        owner: The optimizer's name.
        what: The tensors are, in the plural.
        tensors: In the same order everywhere.
    """
    if not same_everywhere(f"{owner}, {what}", tensors):
        raise ModelError(
            f"{what} of this process are not those of another one at the first step of {owner}, so the copies of the "
            "network are none. Wrap the network in DistributedDataParallel, which makes them alike, before the first "
            "step, and load the same checkpoint everywhere; or, if every process trains a network of its own, say so: "
            "`with hessopt.separate_networks(): …` around the training."
        )


def check_distributed(parameters: Sequence[Tensor], model: nn.Module | None) -> None:
    """Raise a :class:`hessopt.errors.ModelError` for distributed tensors other than those of FSDP2.

    Args:
        parameters: The optimizer's, of which all or none are distributed by FSDP2.
        model: The network, if it is known.
    """
    parts = [p for p in parameters if is_distributed(p)]
    if not parts:
        return
    found = None if model is None else spread(model)
    split = any(not (place.is_replicate() or place.is_shard(0)) for p in parts for place in p.placements)  # type: ignore[attr-defined]
    if split or len(parts) < len(parameters) or (found is not None and found.kind == "tensor parallelism"):
        raise ModelError(
            "some parameters are DTensors and others are not, or parts are not along the first dimension, as with "
            "tensor parallelism, which SpectralNewton does not know. Use fully_shard (FSDP2) or "
            "DistributedDataParallel."
        )
