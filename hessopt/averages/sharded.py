"""Networks whose parameters FSDP2 shards: hooks may back-propagate once more, and what a process has of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.ranks.spread import is_distributed, local


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a part, as one: an exchange for such a one."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def zeros_of(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of the shape of a parameter, as a whole."""
    return torch.zeros(p.shape, dtype=dtype or p.dtype, device=p.device)


def part_of(tensor: Tensor, p: Tensor) -> Tensor:
    """What this process has of a tensor, which it knows whole, if it is divided as a parameter is; without exchange."""
    if not is_distributed(p):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes long

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


def fill(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into another one, each of which may be whole or in parts."""
    if is_distributed(source) and not is_distributed(target):
        source = whole(source)
    if is_distributed(target):
        local(target).copy_(local(source) if is_distributed(source) else part_of(source, target))
    else:
        target.copy_(source)


class ShardedModules:
    """The modules of a network that FSDP2 wraps.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[Any] = []
        if any(is_distributed(p) for p in model.parameters()):
            self.modules = [m for m in model.modules() if hasattr(m, "set_requires_gradient_sync")]

    @contextmanager
    def apart(self, *, inside: bool = True) -> Iterator[None]:
        """For a backward pass of vectors of one's own, in which gradients are not reduced.

        Args:
            inside: Of another one, which needs the parameters yet; else these are given up at the end.
        """
        groups = [group for m in self.modules for group in _groups(m)]
        before = [(g.reduce_grads, g.all_reduce_grads, g.reshard_after_backward) for g in groups]
        last = [m._get_fsdp_state()._state_ctx.is_last_backward for m in self.modules]
        try:
            for m in self.modules:
                m.set_requires_gradient_sync(False, recurse=False)
                m.set_reshard_after_backward(False, recurse=False)
                m.set_is_last_backward(False)
            yield
        finally:
            for group, (reduces, all_reduces, reshards) in zip(groups, before, strict=True):
                group.reduce_grads, group.all_reduce_grads, group.reshard_after_backward = (
                    reduces,
                    all_reduces,
                    reshards,
                )
            for m, value in zip(self.modules, last, strict=True):
                m.set_is_last_backward(value)
                if not inside:
                    m.reshard()


def _groups(module: Any) -> Iterable[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
