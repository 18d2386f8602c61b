"""In which space to solve: of samples or of parameters."""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import MemoryBudgetError
from hessopt.banded.bandwidth import AutoBandwidth, bandwidth_cliques
from hessopt.banded.quadratic_model import QuadraticModel
from hessopt.banded.systems import BandedSystem, ParameterSystem, SampleSystem, banded_operations
from hessopt.checks import check_choice
from hessopt.network.cliques import Bandwidth, Cliques

_log = logging.getLogger(__name__)

Space: TypeAlias = Literal["auto", "sample", "parameter"]


class SpaceChoice:
    """Gives the system of a step, in sample space or in parameter space.

    ``"auto"`` takes the space with fewer operations by :func:`hessopt.banded.systems.banded_operations`, for the band
    (where the bandwidth is chosen, the full matrix); sample space if the other does not fit into memory.

    Args:
        space: ``"auto"``, ``"sample"`` or ``"parameter"``.
        memory_limit: Bytes for the matrices.
    """

    def __init__(self, space: Space, memory_limit: int) -> None:
        check_choice("space", space, ("auto", "sample", "parameter"))
        self.space = space
        self.memory_limit = memory_limit
        self._last: str | None = None

    def system(
        self, model: QuadraticModel, distances: NDArray[np.float64], bandwidth: Bandwidth | AutoBandwidth
    ) -> BandedSystem:
        """The system of this step."""
        shapes = [[p.shape for p in own] for own in model.parameters]
        choice = self._choose(model, distances, bandwidth) if self.space == "auto" else self.space
        if choice == "parameter":
            try:
                return ParameterSystem(model.factors, shapes, self.memory_limit)
            except MemoryBudgetError:
                if self.space == "parameter":
                    raise
        return SampleSystem(model.factors, shapes, self.memory_limit)

    def operations(self, rows: int, model: QuadraticModel, cliques: Cliques) -> float:
        """Of a step with N rows of the same kind as the model's, in the space that it would be in."""
        sizes, grams = _costs(model)
        spaces = {"auto": (grams, None), "sample": (grams,), "parameter": (None,)}[self.space]
        return min(banded_operations(rows, sizes, cliques, grams=own) for own in spaces)

    def _choose(
        self,
        model: QuadraticModel,
        distances: NDArray[np.float64],
        bandwidth: Bandwidth | AutoBandwidth,
    ) -> str:
        rows, (sizes, grams) = model.factors[0].size, _costs(model)
        cliques = bandwidth_cliques(distances, "full" if isinstance(bandwidth, AutoBandwidth) else bandwidth)
        sample, dense = (banded_operations(rows, sizes, cliques, grams=own) for own in (grams, None))
        choice = "parameter" if dense < sample else "sample"
        if choice != self._last:
            _log.info(
                'space="%s": %.3g operations a step in sample space (%d rows), %.3g in that of %d parameters',
                *(choice, sample, rows, dense, sum(sizes)),
            )
            self._last = choice
        return choice


def _costs(model: QuadraticModel) -> tuple[list[int], list[float]]:
    """P_v of the layers, and what their Gram matrices take."""
    sizes = [sum(p.numel() for p in own) for own in model.parameters]
    return sizes, [factor.gram_operations for factor in model.factors]
