"""Null vectors of an indefinite symmetric matrix, ``vᵀHv = 0``, as eigenvectors of a pair (J, H), J antisymmetric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.linear_operator import symmetrise
from diagnostics.estimators.symmetric_eigen import eigh

Pairing: TypeAlias = Literal["spectral", "standard"]
"""The antisymmetric J: made of eigenpairs of H, or the fixed ``[[0, I], [−I, 0]]``."""

_REAL = 1e-10
"""Imaginary part, relative to ``|μ|``, below which an eigenvalue is real: of a nearly defective pair it is √eps."""
_NONZERO = 1e-10
"""Share of the largest ``|μ|`` below which one is 0: the kernel of a J of odd size comes out as rounding."""


class Inertia(NamedTuple):
    """Numbers of positive, negative and zero eigenvalues (those that are zero to rounding)."""

    positive: int
    negative: int
    zero: int

    @property
    def isotropic(self) -> int:
        """min(n₊, n₋): no subspace on which the form is nondegenerate has a larger one on which it vanishes."""
        return min(self.positive, self.negative)


@dataclass(frozen=True, eq=False)
class NullVectors:
    """Solutions of ``J v = μ H v`` with real μ ≠ 0; made by :func:`null_vectors`.

    Attributes:
        vectors: Unit vectors v as columns, ``(d, m)``. Orthonormal for ``J="spectral"``.
        mu: μ of each, ``(m,)``.
        inertia: Signs of the eigenvalues of H.
        pairs: Number of real ± pairs of (J, H).
        parity: Whether ``pairs ≡ n₋ (mod 2)``, which holds for every nonsingular H of even size and every nonsingular
            J; None where H is singular or its size odd (then J is singular, and its kernel vector is not null).
    """

    vectors: Tensor
    mu: Tensor
    inertia: Inertia
    pairs: int
    parity: bool | None


def inertia(values: Tensor, rtol: float | None = None) -> Inertia:
    """Signs of eigenvalues ``(d,)``; those of at most rtol times the largest absolute value are zero.

    Args:
        values: Eigenvalues of a symmetric matrix.
        rtol: None: d · eps of the dtype.
    """
    if not len(values):
        return Inertia(0, 0, 0)
    share = len(values) * torch.finfo(values.dtype).eps if rtol is None else rtol
    limit = share * values.abs().amax()
    positive, negative = int((values > limit).sum()), int((values < -limit).sum())
    return Inertia(positive, negative, len(values) - positive - negative)


def null_vectors(
    matrix: Tensor,
    J: Pairing = "spectral",
    *,
    sign: Literal["positive", "both"] = "positive",
    rtol: float | None = None,
) -> NullVectors:
    r"""Null vectors of a dense symmetric matrix H, ``(d, d)``.

    If ``J v = μ H v`` with J antisymmetric and μ real and not 0, then ``vᵀHv = vᵀJv / μ = 0``. More: ``(μ_i + μ_j)
    v_iᵀ H v_j = 0``, so that H vanishes on the whole span of the eigenvectors with μ > 0 (a *totally isotropic*
    subspace). On the span of all real eigenvectors, of both signs, it does not. A definite H has none.

    ``J="spectral"`` pairs eigenvalues a > 0 and −b < 0, the largest with the largest, with eigenvectors u₊ and u₋:

    .. math::
        v_\pm = \frac{\sqrt b\, u_+ \pm \sqrt a\, u_-}{\sqrt{a+b}}, \qquad \mu = \pm\frac{1}{\sqrt{ab}},
        \qquad J = \sum (u_+ u_-^\top - u_- u_+^\top).

    All are real, and there are min(n₊, n₋) of each sign: the largest dimension that an isotropic subspace on which
    ``Hv ≠ 0`` can have. ``J="standard"`` is ``[[0, I], [−I, 0]]`` (with a row and column of zeros where d is odd), by
    :func:`scipy.linalg.eig`: the number of its real pairs depends on the order of the coordinates, and on nothing else
    that H knows.

    Args:
        matrix: H, symmetric to rounding. For the published ``H + λ I`` pass that matrix.
        J: See above.
        sign: ``"positive"``: μ > 0 only. ``"both"``: all of them, as the published code takes them.
        rtol: Eigenvalues of H below this share of the largest are zero. None: d · eps.

    Raises:
        DiagnosticsError: H is not symmetric, or not finite.
        ValueError: ``J`` or ``sign`` is unknown.

    Source: "Neural Null Cones", v6, with the corrections above.
    """
    if J not in ("spectral", "standard"):
        raise ValueError(f'J must be "spectral" or "standard", got {J!r}.')
    if sign not in ("positive", "both"):
        raise ValueError(f'sign must be "positive" or "both", got {sign!r}.')
    if not matrix.is_floating_point() or not matrix.isfinite().all():
        raise DiagnosticsError("null vectors are those of a real, finite matrix, and this one is not.")
    symmetric = symmetrise(matrix)
    values, vectors = eigh(symmetric)
    signs = inertia(values, rtol)
    if J == "spectral":
        coefficients, mu = pair_spectrally(values, signs)
        found, pairs = vectors @ coefficients, len(mu)
        if sign == "both":
            other = vectors @ _flipped(values, signs, coefficients)
            found, mu = torch.cat([found, other], 1), torch.cat([mu, -mu])
    else:
        found, mu = _standard(symmetric)
        pairs = int((mu > 0).sum())
        if sign == "positive":
            found, mu = found[:, mu > 0], mu[mu > 0]
    regular = len(values) % 2 == 0 and signs.zero == 0
    return NullVectors(found, mu, signs, pairs, (pairs - signs.negative) % 2 == 0 if regular else None)


def pair_spectrally(values: Tensor, signs: Inertia) -> tuple[Tensor, Tensor]:
    """Coefficients ``(d, m)`` of the v₊ in eigenvectors whose eigenvalues ascend, and their μ, ``(m,)``."""
    m = signs.isotropic
    low, high = torch.arange(m), torch.arange(len(values) - 1, len(values) - 1 - m, -1)
    a, b = values[high], -values[low]
    coefficients = values.new_zeros(len(values), m)
    coefficients[high, torch.arange(m)] = (b / (a + b)).sqrt()
    coefficients[low, torch.arange(m)] = (a / (a + b)).sqrt()
    return coefficients, 1 / (a.sqrt() * b.sqrt())


def _flipped(values: Tensor, signs: Inertia, coefficients: Tensor) -> Tensor:
    """Of the v₋."""
    return torch.cat([-coefficients[: signs.isotropic], coefficients[signs.isotropic :]])


def standard_pairing(size: int) -> Tensor:
    """``[[0, I], [−I, 0]]`` with halves of size ⌊d/2⌋, and a zero row and column where d is odd; float64."""
    half = size // 2
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[:half, half : 2 * half] = torch.eye(half)
    matrix[half : 2 * half, :half] = -torch.eye(half)
    return matrix


def _standard(matrix: Tensor) -> tuple[Tensor, Tensor]:
    size = len(matrix)
    with np.errstate(divide="ignore", invalid="ignore"):  # a singular H has infinite μ
        found = scipy.linalg.eig(standard_pairing(size).numpy(), matrix.double().cpu().numpy())
    mu, vectors = torch.from_numpy(np.asarray(found[0])), torch.from_numpy(np.asarray(found[1]))
    finite = mu.real.isfinite() & mu.imag.isfinite()
    largest = mu[finite].abs().max() if finite.any() else torch.ones(())
    real = finite & (mu.imag.abs() <= _REAL * mu.real.abs()) & (mu.real.abs() > _NONZERO * largest)
    columns = vectors[:, real].real if vectors.is_complex() else vectors[:, real]
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    return columns.to(matrix), mu[real].real.to(matrix)
