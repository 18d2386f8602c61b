"""What an exact step costs in gradients, and a warning where it is many."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hessopt.network.parameter_uses import LinearUse, Use

_log = logging.getLogger(__name__)

MANY_GRADIENTS = 100
"""Gradients that a step may cost in silence."""
FEW_GRADIENTS = 3
"""Gradients that a step may cost where its rows are a choice, to begin with."""
ROW_FLOOR = 5e7
"""Operations that such a step may take in any case: a few milliseconds, as much as its many small operations."""
FEW_OPERATIONS = 1e9
"""Operations of a step below which nothing is said: a few tenths of a second at most, much of it not the solve's."""


def gradient_operations(uses: Sequence[Use]) -> float:
    """Multiplications of one evaluation of the loss and its gradient, to leading order: three for each in the uses.

    A linear use takes one for each row and entry of its weight; any other as many for each entry of its result as the
    parameter has entries for one of its own first dimension (a convolution's patch).

    Args:
        uses: Of :class:`hessopt.network.parameter_uses.UseRecorder`; those in derivatives inside of the closure count
        too.
    """
    total = 0.0
    for use in uses:
        if isinstance(use, LinearUse):
            total += use.result.numel() // max(use.result.shape[-1], 1) * use.weight.numel()
        else:
            total += use.result.numel() * max(p[0].numel() if p.ndim > 1 and len(p) else 1 for p in use.parameters)
    return 3 * total


class CostWarning:
    """Logs a warning at the first step that takes more than ``MANY_GRADIENTS``, once.

    Args:
        hessian: The curvature is the whole Hessian's.
    """

    def __init__(self, hessian: bool) -> None:
        self._hessian = hessian
        self.given = False

    def check(self, operations: float, gradient: float, rows: int, parameters: int) -> None:
        """Look at one step.

        Args:
            operations: Of the step, :meth:`hessopt.banded.systems.BandedSystem.operations`.
            gradient: Of :func:`gradient_operations`.
            rows: N.
            parameters: P.
        """
        if self.given or operations < FEW_OPERATIONS or operations <= MANY_GRADIENTS * gradient:
            return
        self.given = True
        if self._hessian:
            _log.warning(
                'a step with curvature="hessian" takes %.2g operations here, about %.0f gradients (%d parameters, '
                "cubed): NewtonCG takes the Hessian's products alone",
                *(operations, operations / max(gradient, 1), parameters),
            )
            return
        _log.warning(
            "an exact step takes %.2g operations here, about %.0f gradients (%d rows = batch × outputs, %d "
            "parameters): take KroneckerNewton for mini-batches, a smaller batch (rows= draws one of least squares), "
            "or NewtonCG for a large one",
            *(operations, operations / max(gradient, 1), rows, parameters),
        )
