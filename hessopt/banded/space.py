"""In which space to solve: of samples or of parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
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
        choice = self._choose(model, shapes, distances, bandwidth) if self.space == "auto" else self.space
        if choice == "parameter":
            try:
                return ParameterSystem(model.factors, shapes, self.memory_limit)
            except MemoryBudgetError:
                if self.space == "parameter":
                    raise
        return SampleSystem(model.factors, shapes, self.memory_limit)

    def operations(self, rows: int, sizes: Sequence[int], cliques: Cliques) -> float:
        """Of a step with N rows and P_v parameters in layer v, in the space that it would be in."""
        spaces = {"auto": (False, True), "sample": (False,), "parameter": (True,)}[self.space]
        return min(banded_operations(rows, sizes, cliques, dense=dense) for dense in spaces)

    def _choose(
        self,
        model: QuadraticModel,
        shapes: Sequence[Sequence[torch.Size]],
        distances: NDArray[np.float64],
        bandwidth: Bandwidth | AutoBandwidth,
    ) -> str:
        rows, sizes = model.factors[0].size, [sum(shape.numel() for shape in own) for own in shapes]
        cliques = bandwidth_cliques(distances, "full" if isinstance(bandwidth, AutoBandwidth) else bandwidth)
        sample, dense = (banded_operations(rows, sizes, cliques, dense=d) for d in (False, True))
        choice = "parameter" if dense < sample else "sample"
        if choice != self._last:
            _log.info(
                'space="%s": %.3g operations a step in sample space (%d rows), %.3g in that of %d parameters',
                *(choice, sample, rows, dense, sum(sizes)),
            )
            self._last = choice
        return choice
