"""The most bytes that tensors hold at one time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Within it, storages that operations allocate are counted until they are freed.

    Attributes:
        bytes: The most that were alive after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._total = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                storage = t.untyped_storage()
                if storage._cdata not in known:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._total += storage.nbytes()  # no less than what is alive
        if self._total > self.bytes:
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._total = sum(size for _, size in self._alive.values())
            self.bytes = max(self.bytes, self._total)
        return found
