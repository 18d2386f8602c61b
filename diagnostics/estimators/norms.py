"""The Frobenius norm of a matrix that is known by its products."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.estimators.probes import Probe, Products, check_sampling, generator_for
from diagnostics.estimators.sketch import orthonormal_complement
from diagnostics.results.estimate import Estimate, enough, exact, mean_of, within


def estimate_frobenius_norm(
    op: LinearOperator,
    method: Literal["hutchinson", "projected"] = "hutchinson",
    *,
    squared: bool = False,
    max_products: int = 100,
    rtol: float = 0.0,
    probe: Probe = "rademacher",
    batch: int = 10,
    generator: torch.Generator | None = None,
) -> Estimate:
    """‖A‖_F of any matrix, ``(m, n)``.

    ``hutchinson``: ``‖A‖_F² = E ‖A r‖²``; relative error of the square √(2 / (probes · stable rank of AᵀA)) at most.
    Needs no adjoint. Memory (m + n) · batch.

    ``projected``: ``‖A‖_F² = ‖QᵀA‖_F² + E ‖(I − QQᵀ) A r‖²`` with Q the range of a sketch by a third of the products;
    another third, by Aᵀ, gives the first term exactly. Better where the singular values decay, exact where the rank is
    at most that of the sketch. Memory m · products/3.

    The square is unbiased. Its root is lower by ``standard error² / (8 ‖A‖³)`` on average, of second order, and has the
    standard error ``SE(‖A‖²) / (2 ‖A‖)``. Where ``max_products ≥ n``, n unit vectors give the norm exactly.

    Args:
        op: The matrix A, ``(m, n)``.
        method: See above.
        squared: Return ``‖A‖_F²``.
        max_products: The largest number of matrix-vector products; fewer where ``rtol`` is met before.
        rtol: Stop after a batch, of at least 10 samples in all, once standard error ≤ rtol · value, for the norm or its
            square, whichever is returned.
        probe: Distribution of the probes.
        batch: Probes that are multiplied together.
        generator: Source of randomness. None: a new one with seed 0, so that two calls give the same.

    Raises:
        ValueError: ``method``, ``max_products``, ``rtol``, ``batch`` or ``probe`` is out of range.
        DiagnosticsError: A product is not finite.

    Source: Hutchinson 1990; the projection as in Meyer, Musco, Musco and Woodruff 2021.
    """
    if method not in ("hutchinson", "projected"):
        raise ValueError(f'method is "hutchinson" or "projected", got {method!r}.')
    check_sampling(max_products, 4 if method == "projected" else 2, rtol, batch, probe)
    products, random = Products(op), generator_for(op, generator)
    if max_products >= op.shape[1]:
        parts = [products.forward(v).square().sum() for _, _, v in products.unit_vectors(batch)]
        total = torch.stack(parts).sum()
        return exact(total if squared else total.sqrt(), products.count)
    basis = torch.empty(op.shape[0], 0, dtype=op.dtype, device=op.device)
    exactly = basis.new_zeros(())
    size = min(max_products // 3, op.shape[0]) if method == "projected" else 0
    while basis.shape[1] < size:
        sampled = products.forward(products.draw(min(batch, size - basis.shape[1]), probe, random))
        new = orthonormal_complement(basis, sampled)
        exactly = exactly + products.adjoint(new).square().sum()
        basis = torch.cat([basis, new], 1)
    samples: list[Tensor] = []
    count = 0
    while products.count < max_products:
        image = products.forward(products.draw(min(batch, max_products - products.count), probe, random))
        samples.append((image - basis @ (basis.mT @ image)).square().sum(0))
        count += len(samples[-1])
        if count > 1:
            rest = mean_of(torch.cat(samples), products.count, rtol)
            value, error = exactly + rest.value, rest.standard_error
            if not squared:
                value = value.sqrt()
                error = torch.where(error > 0, error / (2 * value), 0)
            estimate = Estimate(value, error, count, products.count, within(value, error, rtol))
            if enough(estimate):
                break
    return estimate
