"""Whether this process is one of several that train together, and whether they agree."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from diagnostics.ranks.spread import is_distributed

_lock = threading.Lock()
_separate = 0
_compared: Counter[str] = Counter()


def processes() -> int:
    """How many processes train together, as far as can be known: the size of the initialised process group.

    1 without a process group, and inside of :func:`separate_networks`. Costs about a microsecond.
    """
    if _separate or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


@contextmanager
def separate_networks() -> Iterator[None]:
    """Inside of this context every process of an initialised process group trains a network of its own.

    Optimizers that compute curvature from the batches of one process refuse to step where a process group of several
    processes is initialised: a data-parallel network, ``ddp.module``, cannot be told from one that nobody else trains,
    and its copies would drift apart without a word. A search for hyperparameters, or an ensemble, says so:

    .. code-block:: python

        with hessopt.separate_networks():
            train(network_of_this_process)

    It holds for all threads of the process.
    """
    global _separate
    with _lock:
        _separate += 1
    try:
        yield
    finally:
        with _lock:
            _separate -= 1


def same_everywhere(label: str, tensors: Iterable[Tensor]) -> bool:
    """Whether tensors have the values, bit for bit, that the first process to ask had in the same call.

    Calls are the same if label, shapes and dtypes are, and their number so far: processes that ask for other tensors,
    or do not ask at all, are not waited for. The first process learns nothing. Costs a copy to the host, a hash (about
    a second a gigabyte), and one exchange with the store of the process group.

    Args:
        label: What the tensors are.
        tensors: In an order that is the same everywhere. Parts of distributed tensors differ and are left out.
    """
    own = [t.detach() for t in tensors if not is_distributed(t)]
    signature = _digest([label.encode(), repr([(tuple(t.shape), str(t.dtype)) for t in own]).encode()])
    digest = fingerprint(own)
    store = dist.distributed_c10d._get_default_store()
    with _lock:
        first: bytes = store.compare_set(f"hessopt/{signature}/{_compared[signature]}", "", digest)
        _compared[signature] += first == digest.encode()  # who differs, differs when it asks again
    return first == digest.encode()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Of the values of tensors, bit for bit. Costs a copy to the host, and about a second a gigabyte."""
    return _digest([t.detach().flatten().cpu().view(torch.uint8).numpy().data for t in tensors if t.numel()])


def _digest(parts: Sequence[bytes | memoryview]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()
