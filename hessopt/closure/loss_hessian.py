"""The Hessian of the objective on the tape of one evaluation, as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from diagnostics.estimators.linear_operator import LinearOperator
from hessopt.closure.step_curvature import StepCurvature


class LossHessian(LinearOperator):
    """``± H`` over the parameters of a :class:`hessopt.closure.step_curvature.StepCurvature`, flat, ``(P, P)``.

    Args:
        curvature: Gradient and products on the tape.
        maximize: The objective is minus the loss.

    Attributes:
        gradient: That of the objective, ``(P,)``.
    """

    def __init__(self, curvature: StepCurvature, *, maximize: bool = False) -> None:
        self._curvature = curvature
        self._sign = -1.0 if maximize else 1.0
        self.gradient = self._sign * curvature.gradient()
        size = len(self.gradient)
        super().__init__((size, size), self.gradient.dtype, self.gradient.device, symmetric=True)

    def matmat(self, vectors: Tensor) -> Tensor:
        """``H V``."""
        if vectors.shape[1] == 1:
            return self._sign * self._curvature.hessian(vectors[:, 0]).unsqueeze(1)
        return self._sign * self._curvature.hessian(vectors.mT.contiguous()).mT


def random_basis(size: int, rank: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns ``(size, rank)`` of a random subspace, drawn on the CPU whatever the device of ``like``."""
    drawn = torch.randn(size, rank, dtype=like.dtype, generator=generator)
    basis: Tensor = torch.linalg.qr(drawn.to(like.device)).Q
    return basis
