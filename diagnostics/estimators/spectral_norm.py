"""The spectral norm of a matrix that is known by its products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diagnostics.estimators.lanczos import checked_start, extreme_eigenpairs
from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.estimators.probes import Products, generator_for


@dataclass(frozen=True, eq=False, repr=False)
class SpectralNorm:
    """‖A‖₂ with an error bound; made by :func:`spectral_norm`.

    Attributes:
        value: The largest singular value found, a scalar; a lower bound on ‖A‖₂ but for rounding.
        error: A singular value of A lies within it of ``value``; the largest one, unless the start misses it.
        vector: The unit right singular vector, ``(n,)``, to start from where A has changed a little.
        products: Matrix-vector products used, by A or Aᵀ.
        converged: Whether ``error ≤ rtol · value``, rounding aside.
    """

    value: Tensor
    error: Tensor
    vector: Tensor
    products: int
    converged: bool

    def item(self) -> float:
        """The value as a number."""
        return self.value.item()

    def __str__(self) -> str:
        end = "converged" if self.converged else "not converged"
        return f"{self.value.item():.6g} ± {self.error.item():.1g} ({self.products} products, {end})"

    __repr__ = __str__


def spectral_norm(
    op: LinearOperator,
    method: Literal["lanczos", "power"] = "lanczos",
    *,
    rtol: float | None = None,
    max_products: int | None = None,
    start: Tensor | None = None,
    memory_limit: int = 8 * 2**30,
    generator: torch.Generator | None = None,
) -> SpectralNorm:
    """‖A‖₂ of any matrix, ``(m, n)``.

    ``lanczos``: of a symmetric matrix, its eigenvalue of largest absolute value, at one product a step. Of any other,
    the root of the largest eigenvalue of AᵀA, at two products a step: the spaces are those of Golub and Kahan's
    bidiagonalisation, and for the *largest* singular value squaring costs no digits. Fully reorthogonalised; restarts
    where the basis would exceed ``memory_limit``.

    ``power``: ``v ← Aᵀ A v / ‖·‖``, two products an iteration, two vectors of memory. It needs many more products:
    after i iterations the error is about ``(σ₂/σ₁)^{4i}``, with no more than a root of that many for Lanczos.

    Both start from a random vector, and both bounds are residuals: of ``A x = θ x`` and of ``Aᵀ u = σ v`` with
    ``u = A v/σ``, which is that of AᵀA divided by σ.

    Args:
        op: The matrix A; ``adjoint_matmat`` is needed unless it is symmetric.
        method: See above.
        rtol: Converged where the bound is at most rtol · value. None: √eps of the dtype for ``lanczos``; 0 for
            ``power``, which then makes all its iterations.
        max_products: The largest number of products. None: 300 for ``lanczos``, and for ``power`` the 40 of the 20
            iterations that arXiv 2604.11639 makes.
        start: The first right vector, ``(n,)``; ``lanczos`` adds a random one of a tenth of its length. None: random.
        memory_limit: Bytes for the basis of ``lanczos``.
        generator: Source of randomness. None: a new one with seed 0, so that two calls give the same.

    Raises:
        ValueError: ``method``, ``rtol`` or ``max_products`` is out of range.
        DiagnosticsError: A product is not finite; ``start`` is zero, not finite or of a wrong shape, dtype or device.
        MemoryBudgetError: Not even the least basis fits.

    Source: Golub and Kahan 1965; Lanczos 1950.
    """
    if method not in ("lanczos", "power"):
        raise ValueError(f'method is "lanczos" or "power", got {method!r}.')
    products = Products(op)
    budget = max_products if max_products is not None else (40 if method == "power" else 300)
    if budget < 2:
        raise ValueError(f"max_products must be at least 2, got {budget}.")
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol is a relative tolerance of at least 0, got {rtol}.")
    generator = generator_for(op, generator)
    if method == "power":
        return _power(products, budget, 0.0 if rtol is None else rtol, start, generator)
    symmetric = op.symmetric
    pairs = extreme_eigenpairs(
        op if symmetric else _Gram(products),
        which="magnitude" if symmetric else "largest",
        rtol=rtol,
        max_products=budget if symmetric else budget // 2,
        start=start,
        memory_limit=memory_limit,
        generator=generator,
    )
    value, error = pairs.values[0].abs(), pairs.residuals[0]
    if not symmetric:
        value = value.sqrt()
        error = torch.where(value > 0, error / value, error.sqrt())
    used = pairs.products if symmetric else products.count
    return SpectralNorm(value, error, pairs.vectors[:, 0], used, pairs.converged)


class _Gram(LinearOperator):
    """AᵀA."""

    def __init__(self, products: Products) -> None:
        n = products.op.shape[1]
        super().__init__((n, n), products.op.dtype, products.op.device, positive_semidefinite=True)
        self._products = products

    def matmat(self, vectors: Tensor) -> Tensor:
        return self._products.adjoint(self._products.forward(vectors))

    def __repr__(self) -> str:
        return f"AᵀA of {self._products.op!r}"


def _power(
    products: Products, budget: int, rtol: float, start: Tensor | None, generator: torch.Generator
) -> SpectralNorm:
    if start is None:
        start = products.draw(1, "gaussian", generator).squeeze(1)
    vector = checked_start(start, products.op)
    while True:
        image = products.forward(vector)
        value = torch.linalg.vector_norm(image)
        nonzero = value > 0
        back = products.adjoint(image / torch.where(nonzero, value, 1))
        error = torch.linalg.vector_norm(back - value * vector)
        converged = bool(error <= rtol * value)
        if converged or products.count + 2 > budget or not nonzero:
            return SpectralNorm(value, error, vector, products.count, converged)
        vector = back / torch.linalg.vector_norm(back)
