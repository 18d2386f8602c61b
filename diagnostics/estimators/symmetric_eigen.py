"""Eigenvalues and eigenvectors of symmetric matrices, also where LAPACK's drivers for float32 do not find them.

Divide and conquer in float32 gives up or returns NaN on harmless finite matrices whose entries span the range of the
exponent: the Hessian of a softmax that is saturated, of a network with masked parameters. Scaled to entries of at most
1, in float64, the same matrices are easy. Every symmetric eigenproblem of this package and of hessopt is solved here.
"""

from __future__ import annotations

from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError

_NO_CONVERGENCE = torch.linalg.LinAlgError, scipy.linalg.LinAlgError  # type: ignore[attr-defined]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, ``(…, n)``, and orthonormal eigenvectors as columns of symmetric matrices ``(…, n, n)``.

    As ``torch.linalg.eigh``, which reads the lower triangle. Where that fails, or its result is not finite, the whole
    batch is decomposed in float64, each matrix scaled by its largest entry; where that fails too, by QR iterations on
    the CPU. Results have the dtype and the device of the matrix. The check costs one pass over the result.

    Raises:
        DiagnosticsError: the matrix is not finite, or no method converges.
    """
    values, vectors = _decompose(matrix, torch.linalg.eigh)
    return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues, ascending, ``(…, n)``, of symmetric matrices ``(…, n, n)``; as :func:`eigh`."""
    return _decompose(matrix, lambda m: (torch.linalg.eigvalsh(m),))[0]


def _decompose(matrix: Tensor, method: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Eigenvalues, and eigenvectors if the method gives them."""
    parts = _tried(method, matrix)
    if parts is not None:
        return parts
    if not matrix.isfinite().all():
        raise DiagnosticsError(
            f"a symmetric matrix of shape {tuple(matrix.shape)} has entries that are not finite, so it has no "
            "eigenvalues: look for NaN or infinity in the parameters, the data, or a derivative that overflows."
        )
    largest = matrix.abs().amax((-2, -1), keepdim=True).double()
    scale = torch.where(largest > 0, largest, 1)
    unit = matrix.double() / scale
    parts = _tried(method, unit) or _tried(_by_qr, unit)
    if parts is None:
        raise DiagnosticsError(
            f"no method finds the eigenvalues of a finite symmetric matrix of shape {tuple(matrix.shape)} in float64. "
            "Please save the matrix and report it."
        )
    return ((parts[0] * scale.squeeze(-1)).to(matrix.dtype), *(part.to(matrix.dtype) for part in parts[1:]))


def _tried(method: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor) -> tuple[Tensor, ...] | None:
    """What the method gives; None where it does not converge, or where that is not finite."""
    try:
        parts = tuple(method(matrix))
    except _NO_CONVERGENCE:
        return None
    finite = [part.isfinite().all() for part in parts]
    return parts if finite[0] & finite[-1] else None  # the device is waited for once


def _by_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """QR iterations instead of divide and conquer, one matrix after the other."""
    values, vectors = [], []
    for one in matrix.detach().cpu().reshape(-1, *matrix.shape[-2:]):
        found = scipy.linalg.eigh(one.numpy(), driver="ev")
        values.append(torch.from_numpy(found[0]))
        vectors.append(torch.from_numpy(found[1]))
    shape = matrix.shape
    return torch.stack(values).reshape(shape[:-1]).to(matrix), torch.stack(vectors).reshape(shape).to(matrix)
