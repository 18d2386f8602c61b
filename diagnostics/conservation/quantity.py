"""A quadratic form of the weights that gradient flow conserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.conservation.channel_slices import ChannelSlices

QuantityKind: TypeAlias = Literal["balanced", "scale-invariant"]


@dataclass(frozen=True)
class ConservedQuantity:
    """A quadratic form ``C = θᵀ S θ``, S diagonal with entries ±1 and 0, and whether ``θᵀ S ∇L = 0``.

    ``"balanced"``: scaling channel i of ``sources`` (weights and biases) by c and what ``consumers`` read of it by 1/c
    leaves the output as it is. Differentiate by c at 1: ``C_i = ‖W_consumers[:, i]‖² − ‖W_sources[i, :]‖² − b_i²`` has
    ``θᵀ S ∇L = 0`` for every loss of the output and every batch. ``"scale-invariant"``: scaling channel i of the
    sources alone leaves it as it is (a normalisation follows), and so for ``C_i = ‖W_sources[i, :]‖² + b_i²``.

    Attributes:
        kind: ``"balanced"`` or ``"scale-invariant"``.
        sources: Names of the modules that make the channels.
        consumers: Names of the modules that read them; none for ``"scale-invariant"``.
        channels: How many such quantities there are, one a channel; 1 where only all channels can be scaled together.
        terms: The parameters with the signs of S.
        exact: Whether the output stayed as it was, to rounding, and all parameters are trained.
        defect: Largest change of the output, relative to its largest entry, by factors of ¼ to 4.
        reason: Why it is not exact; empty if it is.
    """

    kind: QuantityKind
    sources: tuple[str, ...]
    consumers: tuple[str, ...]
    channels: int
    terms: tuple[tuple[ChannelSlices, int], ...]
    exact: bool
    defect: float
    reason: str = ""

    @property
    def name(self) -> str:
        """``"0 → 2"``; ``"0"`` where the output does not depend on the scale of ``sources`` at all."""
        left = " + ".join(self.sources)
        return f"{left} → {', '.join(self.consumers)}" if self.consumers else left

    def form(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
        """``leftᵀ S right`` of each channel, ``(channels,)``, of tensors by the parameters' names.

        Sums over the entries of a parameter are in its dtype, and are added up in float64.
        """
        parts = [sign * slices.dot(left[slices.name], right[slices.name]).double() for slices, sign in self.terms]
        return torch.stack(parts).sum(0)

    def scaled(self, parameters: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
        """The parameters of the quantity after scaling channel i by ``factors[i]``."""
        result: dict[str, Tensor] = {}
        for slices, sign in self.terms:
            parameter = result.get(slices.name, parameters[slices.name])
            up = self.kind == "scale-invariant" or sign < 0
            own = (factors if up else 1 / factors).to(parameter.device, parameter.dtype)
            result[slices.name] = slices.scaled(parameter, own)
        return result
