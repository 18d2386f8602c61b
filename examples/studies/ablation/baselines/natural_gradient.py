"""K-FAC's direction with SpectralNewton's lengths: a control, for what the polar factor is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessopt import KroneckerCoordinates
from hessopt.spectral.engine import SpectralEngine
from hessopt.spectral.kronecker import KroneckerSpectralNewton


@dataclass(frozen=True)
class NaturalCoordinates(KroneckerCoordinates):
    """Coordinates in which the direction is just the gradient, so that it is ``B^{-2p} M A^{-2p}``.

    With the default, p = 1/2, that is the natural gradient ``B⁻¹ M A⁻¹``. Pass them to
    :class:`hessopt.SpectralNewton`: all but the direction, its norm included, is as in its own coordinates.
    """

    exponent: float = 0.5


class NaturalEngine(SpectralEngine):
    """The polar factor left out."""

    @staticmethod
    def roots(grams: Sequence[Tensor]) -> list[Tensor]:
        """The identity in place of ``(Z Zᵀ)^{-1/2}``."""
        return [torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram) for gram in grams]


class NaturalNewton(KroneckerSpectralNewton, coordinates=NaturalCoordinates):
    """The kind of :class:`hessopt.SpectralNewton` that :class:`NaturalCoordinates` make."""

    _ENGINE = NaturalEngine
