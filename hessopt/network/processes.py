"""What optimizers refuse where several processes train together, and what is compared before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diagnostics.ranks import collectives
from diagnostics.ranks.collectives import Ranks
from diagnostics.ranks.group import fingerprint, processes, same_everywhere
from diagnostics.ranks.spread import is_distributed, spread
from hessopt.errors import ClosureError, HessoptError, ModelError

T = TypeVar("T")

_WAY_OUT = (
    "Train in one process; or take SpectralNewton with coordinates=PowerLaw(…) and a fixed alpha, which needs no more "
    "than the gradients that DistributedDataParallel has averaged."
)


_SEPARATE = (
    "if every process trains a network of its own, say so: `with hessopt.separate_networks(): …` around the training."
)
DIFFERENT_GRADIENTS = (
    "gradients are not the same in all processes, so the copies of the network drift apart. Call the network that is "
    "wrapped in DistributedDataParallel, which averages them, in the last backward pass before each step (outside of "
    f"`no_sync()`), and change them by what is the same everywhere; or, {_SEPARATE}"
)


def unwrapped(model: nn.Module | None) -> tuple[nn.Module | None, Any]:
    """The network inside of a DistributedDataParallel, with its process group; another one as it is, with None."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, model.process_group
    return model, None


def check_start(
    owner: str, ranks: Ranks, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], steps: int
) -> None:
    """Raise a :class:`hessopt.errors.ModelError` in all processes if they do not begin alike; nothing for one process.

    Of parts of distributed tensors nothing is known.

    Args:
        owner: The optimizer's name.
        ranks: The processes, all of which have to come here.
        parameters: The optimizer's.
        gradients: Theirs.
        steps: That were taken before.
    """
    if ranks.size == 1:
        return
    known = [g for g in gradients if g is not None]
    shapes = [tuple(p.shape) for p in parameters]
    own = (steps, shapes, *(fingerprint(t for t in own if not is_distributed(t)) for own in (parameters, known)))
    try:
        found = ranks.objects(own)
    except RuntimeError as error:
        raise ModelError(
            f"not all of {ranks.size} processes came to the first step of {owner}, which they have to take together; "
            f"{_SEPARATE}"
        ) from error
    for rank, other in enumerate(found):
        if other[:3] != found[0][:3]:
            what = "the parameters" if other[0] == found[0][0] else f"{other[0]} and {found[0][0]} steps, and so states"
            raise ModelError(
                f"{what} of processes {rank} and 0 differ at the first step of {owner}, so the copies of the network "
                "are none. Wrap the network in DistributedDataParallel, which makes them alike, before the first "
                f"step, and load the same checkpoint everywhere; or, {_SEPARATE}"
            )
    if any(other[3] != found[0][3] for other in found):
        raise ModelError(f"at the first step of {owner} {DIFFERENT_GRADIENTS}")


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """:func:`diagnostics.ranks.collectives.agreed` about errors of this package."""
    return collectives.agreed(ranks, work, HessoptError, ClosureError)


def averaged(ranks: Ranks, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean over processes of gradients that nobody has averaged; None where it is None everywhere.

    Waits for the device if there are several processes.
    """
    if ranks.size == 1:
        return list(gradients)
    found = [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(parameters, gradients, strict=True)]
    known = torch.tensor([float(g is not None) for g in gradients], device=found[0].device)
    ranks.sum_([*found, known])
    for g in found:
        g /= ranks.size
    return [g if own else None for g, own in zip(found, known.tolist(), strict=True)]


def average_gradients(owner: str, ranks: Ranks, parameters: Sequence[Tensor]) -> None:
    """Replace every ``.grad`` by its mean over processes; None stays so where it is None in all of them.

    The mean of what DistributedDataParallel has averaged is the same again, so that gradients of a ``ddp.module`` and
    of the wrapper need not be told apart.

    Args:
        owner: The optimizer's name.
        ranks: The processes.
        parameters: In the same order everywhere.

    Raises:
        ModelError: a gradient is sparse.
    """
    if ranks.size == 1:
        return
    gradients = [p.grad for p in parameters]
    for p, g in zip(parameters, gradients, strict=True):
        if g is not None and g.layout != torch.strided:
            raise ModelError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, and {owner} averages dense ones "
                "over processes: use Embedding(…, sparse=False)."
            )
    for p, g in zip(parameters, averaged(ranks, gradients, parameters), strict=True):
        p.grad = g


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


def check_distributed(owner: str, parameters: Sequence[Tensor], model: nn.Module | None) -> None:
    """Raise a :class:`hessopt.errors.ModelError` for distributed tensors other than those of FSDP2.

    Args:
        owner: The optimizer's name.
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
            f"tensor parallelism, which {owner} does not know. Use fully_shard (FSDP2) or "
            "DistributedDataParallel."
        )
