"""The objective ``±f + ½ Σ ω θ²`` of an optimizer's param groups, over flat vectors of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from hessopt.closure.finite import refuse_not_finite
from hessopt.errors import ClosureError


class Objective:
    """Parameters that are trained, with their groups' learning rates and weight decay.

    Args:
        groups: The optimizer's ``param_groups``.

    Attributes:
        parameters: Those that require grad, in the order of the groups.
        sign: -1 if maximizing.
        rates: Learning rate of each entry, or one number for all.
        decay: Weight decay of each entry, or one number for all.
        dtype: Of the vectors: that of the parameters, at least float32.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        pairs = [(p, group) for group in groups for p in group["params"] if p.requires_grad]
        if not pairs:
            raise ClosureError("none of the optimizer's parameters requires grad.")
        self.parameters: list[Tensor] = [p for p, _ in pairs]
        self.sign = -1.0 if groups[0]["maximize"] else 1.0
        self.dtype = reduce(torch.promote_types, (p.dtype for p in self.parameters), torch.float32)
        self._sizes = [p.numel() for p in self.parameters]
        self.rates = self._entries([float(group["lr"]) for _, group in pairs])
        self.decay = self._entries([float(group["weight_decay"]) for _, group in pairs])

    def flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Tensors like the parameters as one vector; None is zero."""
        return torch.cat(
            [
                torch.zeros_like(p, dtype=self.dtype).reshape(-1)
                if part is None
                else part.detach().reshape(-1).to(self.dtype)
                for part, p in zip(parts, self.parameters, strict=True)
            ]
        )

    def parts(self, vector: Tensor) -> list[Tensor]:
        """A vector as tensors like the parameters."""
        pieces = vector.split(self._sizes)
        return [piece.reshape(p.shape).to(p.dtype) for piece, p in zip(pieces, self.parameters, strict=True)]

    def gradient(self, slope: Tensor) -> Tensor:
        """Gradient of the objective from that of f.

        Raises:
            ClosureError: it is not finite.
        """
        g = self.sign * slope
        if self._decays:
            g = g + self.decay * self.flat(self.parameters)
        if not g.isfinite().all():
            refuse_not_finite(self.parts(g), self.parameters)
        return g

    def curvature(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``v ↦ (±C + ω) v`` from ``v ↦ C v``."""

        def bent(v: Tensor) -> Tensor:
            c = self.sign * product(v)
            return c + self.decay * v if self._decays else c

        return bent

    @contextmanager
    def moved(self, step: Tensor) -> Iterator[Callable[[float], float]]:
        """Put the parameters at ``θ + d``, and back again afterwards, bit for bit; a tape of them stays valid.

        Yields:
            ``f(θ + d) − f(θ) ↦`` the change of the objective.
        """
        saved = [p.detach().clone() for p in self.parameters]
        penalty = 0.0
        if self._decays:
            theta = self.flat(self.parameters)
            penalty = float((self.decay * step * (theta + step / 2)).sum())  # without the cancellation
        # The tape would take a changed parameter for an error, even one that was changed back.
        unseen = _unsafe_preserve_version_counter
        try:
            with unseen(tuple(self.parameters)):
                self.move(step)
            yield lambda change: self.sign * change + penalty
        finally:
            with torch.no_grad(), unseen(tuple(self.parameters)):
                for p, value in zip(self.parameters, saved, strict=True):
                    p.copy_(value)

    @torch.no_grad()
    def move(self, step: Tensor) -> None:
        """``θ ← θ + d``."""
        for p, d in zip(self.parameters, self.parts(step), strict=True):
            p.add_(d)

    @property
    def _decays(self) -> bool:
        return isinstance(self.decay, Tensor) or self.decay != 0

    def _entries(self, values: list[float]) -> Tensor | float:
        if all(value == values[0] for value in values):
            return values[0]
        device = self.parameters[0].device
        sizes = torch.tensor(self._sizes, device=device)
        return torch.tensor(values, dtype=self.dtype, device=device).repeat_interleave(sizes)
