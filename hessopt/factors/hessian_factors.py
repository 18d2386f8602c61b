"""The whole Hessian made safe: rows of ``|H|^½``, for small networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from diagnostics.estimators.symmetric_eigen import eigh
from hessopt.closure.loss_hessian import LossHessian
from hessopt.closure.protocol import Evaluation
from hessopt.closure.step_curvature import StepCurvature
from hessopt.factors.sample_factors import DenseFactor
from hessopt.network.layer_graph import layer_distances, layer_edges
from hessopt.network.layers import Layer
from hessopt.network.parameter_uses import Use


def hessian_factors(
    loss: Tensor, layers: Sequence[Layer], dtype: torch.dtype, *, memory_limit: int, verify: bool = False
) -> list[DenseFactor]:
    """``Ĵ`` with ``ĴᵀĴ = |H| = (H²)^½``, the Hessian with the signs of its negative eigenvalues changed.

    With ``H = Q Λ Qᵀ`` the rows are ``|Λ|^½ Qᵀ``, ``N = P`` of them. Along negative curvature a step goes down, as far
    as along as much positive curvature: it leaves saddle points, which the Gauss-Newton matrix does not see.

    Args:
        loss: On its tape, twice differentiable.
        layers: Whose parameters are trained.
        dtype: Of the rows.
        memory_limit: Bytes for the P×P matrices.
        verify: Check that the gradient is on the tape.

    Raises:
        MemoryBudgetError: they do not fit.

    Source: Dauphin, Pascanu, Gulcehre, Cho, Ganguli and Bengio, "Identifying and attacking the saddle point problem in
    high-dimensional non-convex optimization" (2014), for ``|H|``; the band of it is docs/banded.md's.
    """
    parameters = [p for layer in layers for p in layer.parameters]
    size = sum(p.numel() for p in parameters)
    needed = 4 * size**2 * dtype.itemsize  # H and the tape's columns, eigenvectors and the workspace
    if needed > memory_limit:
        raise MemoryBudgetError(
            f"the Hessian of {size} parameters and its eigenvectors need {needed / 2**30:.3g} GiB, more than the limit "
            f'of {memory_limit / 2**30:.3g} GiB. Use curvature="ggn", hessopt.NewtonCG, or raise memory_limit.'
        )
    hessian = LossHessian(StepCurvature(loss, parameters, verify=verify)).to_dense(memory_limit=memory_limit).to(dtype)
    eigenvalues, eigenvectors = eigh((hessian + hessian.mT) / 2)
    rows = eigenvalues.abs().sqrt().unsqueeze(1) * eigenvectors.mT
    sizes = [sum(p.numel() for p in layer.parameters) for layer in layers]
    return [
        DenseFactor(part.contiguous(), tuple(p.shape for p in layer.parameters))
        for part, layer in zip(rows.split(sizes, dim=1), layers, strict=True)
    ]


def forward_distances(evaluation: Evaluation, layers: Sequence[Layer], uses: Sequence[Use]) -> NDArray[np.float64]:
    """Of the layers, as the forward pass shows them; nothing is asked of the loss."""
    returned = [t for t in evaluation.outputs if isinstance(t, Tensor) and t.grad_fn is not None]
    return layer_distances(len(layers), layer_edges(layers, uses, returned or [evaluation.loss]))
