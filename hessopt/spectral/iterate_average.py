"""Averages of the iterates in place of a schedule of learning rates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.ranks.spread import is_distributed, local


class IterateAverage:
    r"""``W̄_t = W̄_{t−1} + min(1, k/t) (W_t − W̄_{t−1})``: weights of the iterates proportional to ``t^{k−1}``.

    No horizon has to be known: at any time the last k-th part of the run counts most. Parameters hold either the
    iterates, to train, or their average, to evaluate; :meth:`swap` exchanges the two in place, with one tensor more at
    a time.

    Args:
        parameters: W.
        power: k.

    Attributes:
        steps: t.
        shown: Whether the parameters hold the average.
        others: What they do not hold, in their order.
    """

    def __init__(self, parameters: Sequence[Tensor], power: float) -> None:
        self.parameters, self.power = list(parameters), power
        self.steps, self.shown = 0, False
        self.others = [p.detach().clone() for p in self.parameters]
        self._sharded = any(is_distributed(p) for p in self.parameters)

    @torch.no_grad()
    def update(self) -> None:
        """After a step, of parameters that hold the iterates."""
        self.steps += 1
        if self.parameters:
            torch._foreach_lerp_(self._own(self.others), self._own(self.parameters), min(1.0, self.power / self.steps))

    @torch.no_grad()
    def swap(self, show: bool) -> None:
        """Have the parameters hold the average (``show``) or the iterates; nothing happens if they do."""
        if show == self.shown:
            return
        for p, other in zip(self._own(self.parameters), self._own(self.others), strict=True):
            kept = p.clone()
            p.copy_(other)
            other.copy_(kept)
        self.shown = show

    def _own(self, tensors: list[Tensor]) -> list[Tensor]:
        """What this process has of them."""
        return [local(t) for t in tensors] if self._sharded else tensors
