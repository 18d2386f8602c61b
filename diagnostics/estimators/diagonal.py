"""The diagonal of a matrix that is known by its products."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.estimators.probes import Probe, Products, check_sampling, generator_for
from diagnostics.estimators.sketch import PAIRED, LeaveOneOut, Sketch
from diagnostics.results.estimate import Estimate, enough, exact, mean_of, within


def estimate_diagonal(
    op: LinearOperator,
    method: Literal["hutchinson", "xdiag"] = "hutchinson",
    *,
    max_products: int = 100,
    rtol: float = 0.0,
    probe: Probe = "rademacher",
    batch: int = 10,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The diagonal of a square matrix, ``(n,)``, with a standard error for each entry.

    ``hutchinson``: the mean of ``r ∘ A r``. With Rademacher probes entry i has variance ``Σ_{j≠i} A_ij²`` a probe
    (symmetric or not), with Gaussian ones ``2 A_ii²`` more. Memory n · (batch + 3).

    ``xdiag``: of m/2 probes each estimates, in the same way, what a sketch by the others misses; it is exact where the
    rank is below m/2, and better where the spectrum decays; its standard errors are √2 times those of independent
    samples, as the probes are shared. Rademacher probes only; needs the adjoint of a matrix
    that is not symmetric. Memory 5n · m/2.

    Where ``max_products ≥ n``, n unit vectors give the diagonal exactly.

    Args:
        op: The matrix A, ``(n, n)``.
        method: See above.
        max_products: The largest number of matrix-vector products; fewer where ``rtol`` is met before.
        rtol: Stop after a batch, of at least 10 samples in all, once ``‖standard error‖₂ ≤ rtol · ‖value‖₂`` over the
            entries.
        probe: Distribution of the probes.
        batch: Probes that are multiplied together.
        generator: Source of randomness. None: a new one with seed 0, so that two calls give the same.

    Raises:
        ValueError: ``method``, ``max_products``, ``rtol``, ``batch`` or ``probe`` is out of range.
        DiagnosticsError: The operator is not square, or a product is not finite.

    Source: Bekas, Kokiopoulou and Saad 2007; Epperly, Tropp and Webber 2024.
    """
    if method not in ("hutchinson", "xdiag"):
        raise ValueError(f'method is "hutchinson" or "xdiag", got {method!r}.')
    check_sampling(max_products, 4 if method == "xdiag" else 2, rtol, batch, probe)
    if method == "xdiag" and probe != "rademacher":
        raise ValueError("xdiag needs Rademacher probes: it divides by no r², so that r² must be 1.")
    products, random = Products(op, square=True), generator_for(op, generator)
    if max_products >= op.shape[1]:
        parts = [products.forward(v)[a:b].diagonal() for a, b, v in products.unit_vectors(batch)]
        return exact(torch.cat(parts), products.count)
    if method == "xdiag":
        return _xdiag(products, max_products, rtol, batch, random)
    return _hutchinson(products, max_products, rtol, probe, batch, random)


def _hutchinson(
    products: Products, budget: int, rtol: float, probe: Probe, batch: int, generator: torch.Generator
) -> Estimate:
    n = products.op.shape[1]
    mean = torch.zeros(n, dtype=products.op.dtype, device=products.op.device)
    squares = torch.zeros_like(mean)  # Σ (sample − mean)², merged batch by batch (Chan, Golub and LeVeque 1979)
    while products.count < budget:
        before = products.count
        r = products.draw(min(batch, budget - before), probe, generator)
        samples = r * products.forward(r)
        new = samples.mean(1)
        shift = new - mean
        squares += (samples - new.unsqueeze(1)).square().sum(1) + shift.square() * (
            before * samples.shape[1] / products.count
        )
        mean += shift * (samples.shape[1] / products.count)
        if products.count > 1:
            error = (squares / (products.count - 1) / products.count).sqrt()
            estimate = Estimate(mean, error, products.count, products.count, within(mean, error, rtol))
            if enough(estimate):
                break
    return estimate


def _xdiag(products: Products, budget: int, rtol: float, batch: int, generator: torch.Generator) -> Estimate:
    sketch = Sketch(products, transposed=True)
    while sketch.size < budget // 2:
        sketch.extend(products.draw(min(batch, budget // 2 - sketch.size), "rademacher", generator))
        if sketch.size > 1:
            samples = exchangeable_diagonals(sketch.leave_one_out()).mT
            estimate = mean_of(samples, products.count, rtol, inflation=PAIRED)
            if enough(estimate):
                break
    return estimate


def exchangeable_diagonals(sketch: LeaveOneOut) -> Tensor:
    """Of each probe ω_i, ``diag(P_i A) + ω_i ∘ (I−P_i) A ω_i`` by the others' sketch, the columns of ``(n, m)``.

    With Z = AᵀQ, ``diag(P_i A) = Σ_j Q_j ∘ Z_j − Q s_i ∘ Z s_i`` and, as A ω_i = Q r_i, ``(I−P_i) A ω_i = Q s_i s_iᵀ
    r_i``.
    """
    removed = sketch.basis @ sketch.removed
    residual = sketch.probes * removed * (sketch.removed * sketch.triangle).sum(0)
    return (sketch.basis * sketch.image).sum(1, keepdim=True) - removed * (sketch.image @ sketch.removed) + residual
