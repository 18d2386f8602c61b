"""AdamW of many small parameters at once, as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hessopt.averages.sharded import fill


class Moments(NamedTuple):
    """Running moments of a gradient.

    Attributes:
        first: m.
        second: v.
        steps: t, on the device.
    """

    first: Tensor
    second: Tensor
    steps: Tensor


class AdamWVector:
    r"""Directions of AdamW, ``m̂ / (√v̂ + ε)``, of parameters laid behind one another.

    A gradient that is not finite is passed over, by a decision on the device; a parameter without one stays as it is.
    Bias corrections are those of the steps of all.

    Args:
        parameters: The parameters.
        dtype: Of the vectors.
        betas: β₁, β₂.
        eps: ε.

    Attributes:
        moments: What a step replaces.
    """

    def __init__(
        self, parameters: Sequence[Tensor], dtype: torch.dtype, betas: tuple[float, float], eps: float
    ) -> None:
        self.parameters, self.betas, self.eps, self.dtype = list(parameters), betas, eps, dtype
        self.sizes = [p.numel() for p in self.parameters]
        self.moments = self.blank()

    def blank(self) -> Moments:
        """Moments of no step."""
        device = self.parameters[0].device if self.parameters else None
        first = torch.zeros(sum(self.sizes), dtype=self.dtype, device=device)
        return Moments(first, torch.zeros_like(first), first.new_zeros(()))

    def views(self, vector: Tensor) -> list[Tensor]:
        """Parts of a vector in the shapes of the parameters."""
        return [part.view(p.shape) for part, p in zip(vector.split(self.sizes), self.parameters, strict=True)]

    def gradient(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The gradients as one vector; for one that is missing, what leaves its moments about as they are."""
        past = self.views(self.moments.first)
        parts = [m if g is None else g for g, m in zip(gradients, past, strict=True)]
        return torch.cat([part.reshape(-1).to(self.dtype) for part in parts]) if parts else self.moments.first

    def direction(self, gradient: Tensor, sound: Tensor) -> tuple[Tensor, Moments]:
        """The direction, and what the moments are to become."""
        beta1, beta2 = self.betas
        old = self.moments
        steps = old.steps + sound
        first = torch.where(sound, old.first.lerp(gradient, 1 - beta1), old.first)
        second = torch.where(sound, old.second.lerp(gradient.square(), 1 - beta2), old.second)
        count = steps.clamp_min(1)
        spread = (second / (1 - beta2**count)).sqrt() + self.eps
        return first / (1 - beta1**count) / spread, Moments(first, second, steps)

    def state_of(self, p: Tensor) -> dict[str, Tensor]:
        """Moments of one of the parameters, as views."""
        place = {id(q): i for i, q in enumerate(self.parameters)}[id(p)]
        first, second = self.moments.first, self.moments.second
        return {"exp_avg": self.views(first)[place], "exp_avg_sq": self.views(second)[place]}

    def load(self, steps: Tensor, own: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Take up steps, and by parameter what :meth:`state_of` gave; zero where there is nothing."""
        self.moments = moments = self.blank()
        moments.steps.copy_(steps)
        for vector, name in ((moments.first, "exp_avg"), (moments.second, "exp_avg_sq")):
            for p, view in zip(self.parameters, self.views(vector), strict=True):
                if name in own.get(p, {}):
                    fill(view, own[p][name])
