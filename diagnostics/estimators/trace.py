"""The trace of a matrix that is known by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.estimators.probes import Probe, Products, check_sampling, generator_for
from diagnostics.estimators.sketch import PAIRED, LeaveOneOut, Sketch, orthonormal_complement
from diagnostics.results.estimate import Estimate, enough, exact, mean_of, within


def estimate_trace(
    op: LinearOperator,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    *,
    max_products: int = 100,
    rtol: float = 0.0,
    probe: Probe | None = None,
    batch: int = 10,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The trace of a square matrix, symmetric or not.

    ==============  ==================================================  ==========================  ==================
    method          idea                                                error after m products      memory
    ==============  ==================================================  ==========================  ==================
    ``hutchinson``  mean of ``rᵀAr``                                    ``√(2/m) ‖A‖_F``            n · batch
    ``hutch++``     a sketch of m/3 probes exactly, ``rᵀAr`` beyond it  ``√(6/m) ‖A − A_{m/3}‖_F``  n · m/3
    ``xtrace``      the same with m/2 probes in both parts at once:     as ``hutch++``, smaller     3n · m/2
                    each is the one beyond a sketch by the others
    ==============  ==================================================  ==========================  ==================

    (A_k: the best approximation of rank k; errors to a factor near 1.) All are unbiased. The last two are exact where
    the rank is below the size of the sketch. The m/2 samples of ``xtrace`` share their probes; its standard error is √2
    times that of independent ones, which its authors state and which covers too little.

    Where ``max_products ≥ n``, n unit vectors give the trace exactly.

    Args:
        op: The matrix A, ``(n, n)``.
        method: See the table.
        max_products: The largest number of matrix-vector products; fewer where ``rtol`` is met before.
        rtol: Stop after a batch, of at least 10 samples in all, once standard error ≤ ``rtol · |value|``. Such a stop
            prefers samples whose spread is small by chance; the error then tends to be underestimated a little.
        probe: Distribution of the probes. None: Rademacher, and for ``xtrace`` Gaussian, of which the part beyond the
            sketch is scaled to the length that it should have, which lowers the variance.
        batch: Probes that are multiplied together.
        generator: Source of randomness. None: a new one with seed 0, so that two calls give the same.

    Raises:
        ValueError: ``method``, ``max_products``, ``rtol``, ``batch`` or ``probe`` is out of range.
        DiagnosticsError: The operator is not square, or a product is not finite.

    Source: Hutchinson 1990; Meyer, Musco, Musco and Woodruff 2021; Epperly, Tropp and Webber 2024.
    """
    if method not in _METHODS:
        raise ValueError(f'method is "xtrace", "hutch++" or "hutchinson", got {method!r}.')
    estimator, least, default = _METHODS[method]
    chosen: Probe = default if probe is None else probe
    check_sampling(max_products, least, rtol, batch, chosen)
    products, random = Products(op, square=True), generator_for(op, generator)
    if max_products >= op.shape[1]:
        parts = [products.forward(v)[a:b].diagonal().sum() for a, b, v in products.unit_vectors(batch)]
        return exact(torch.stack(parts).sum(), products.count)
    return estimator(products, max_products, rtol, chosen, batch, random)


def _hutchinson(
    products: Products, budget: int, rtol: float, probe: Probe, batch: int, generator: torch.Generator
) -> Estimate:
    samples: list[Tensor] = []
    while products.count < budget:
        r = products.draw(min(batch, budget - products.count), probe, generator)
        samples.append((r * products.forward(r)).sum(0))
        if len(samples[0]) > 1 or len(samples) > 1:
            estimate = mean_of(torch.cat(samples), products.count, rtol)
            if enough(estimate):
                break
    return estimate


def _hutch_plus_plus(
    products: Products, budget: int, rtol: float, probe: Probe, batch: int, generator: torch.Generator
) -> Estimate:
    """Split: tr A = tr QᵀAQ + tr (I−QQᵀ)A(I−QQᵀ); the first is exact, the second by Hutchinson."""
    n = products.op.shape[1]
    size = budget // 3
    basis = torch.empty(n, 0, dtype=products.op.dtype, device=products.op.device)
    exactly = basis.new_zeros(())
    while basis.shape[1] < size:
        sampled = products.forward(products.draw(min(batch, size - basis.shape[1]), probe, generator))
        new = orthonormal_complement(basis, sampled)
        exactly = exactly + (new * products.forward(new)).sum()
        basis = torch.cat([basis, new], 1)
    samples: list[Tensor] = []
    count = 0
    while products.count < budget:
        r = products.draw(min(batch, budget - products.count), probe, generator)
        r = r - basis @ (basis.mT @ r)
        samples.append((r * products.forward(r)).sum(0))
        count += len(samples[-1])
        if count > 1:
            rest = mean_of(torch.cat(samples), products.count, rtol)
            value, error = exactly + rest.value, rest.standard_error
            estimate = Estimate(value, error, count, products.count, within(value, error, rtol))
            if enough(estimate):
                break
    return estimate


def _xtrace(
    products: Products, budget: int, rtol: float, probe: Probe, batch: int, generator: torch.Generator
) -> Estimate:
    sketch = Sketch(products)
    while sketch.size < budget // 2:
        sketch.extend(products.draw(min(batch, budget // 2 - sketch.size), probe, generator))
        if sketch.size > 1:
            samples = exchangeable_traces(sketch.leave_one_out(), rescale=probe == "gaussian")
            estimate = mean_of(samples, products.count, rtol, inflation=PAIRED)
            if enough(estimate):
                break
    return estimate


def exchangeable_traces(sketch: LeaveOneOut, *, rescale: bool) -> Tensor:
    """Of each probe ω_i, the estimate ``tr P_i A + c ω_iᵀ (I−P_i) A (I−P_i) ω_i`` by the others' sketch, ``(m,)``.

    With H = QᵀAQ and ``u_i = (I − s_i s_iᵀ) w_i``, so that ``P_i ω_i = Q u_i``,

        tr P_i A = tr H − s_iᵀ H s_i,
        ω_iᵀ (I−P_i) A (I−P_i) ω_i = (w_i − u_i)ᵀ r_i − (Zᵀω_i)ᵀ u_i + u_iᵀ H u_i.

    Args:
        sketch: With Z = A Q.
        rescale: c = rank(I−P_i) / ‖(I−P_i) ω_i‖² for rotation-invariant probes; else c = 1.
    """
    q, z, w, s = sketch.basis, sketch.image, sketch.inside, sketch.removed
    h = q.mT @ z
    along = (s * w).sum(0)
    u = w - s * along
    residual = ((w - u) * sketch.triangle).sum(0) - ((z.mT @ sketch.probes) * u).sum(0) + (u * (h @ u)).sum(0)
    if rescale:
        # differences of squares would lose the digits where the sketch spans nearly all
        outside = torch.linalg.vector_norm(sketch.probes - q @ u, dim=0).square()
        rank = len(q) - q.shape[1] + (s.abs().amax(0) > 0).to(q.dtype)
        residual = residual * rank / outside
    return h.trace() - (s * (h @ s)).sum(0) + residual


_Estimator: TypeAlias = Callable[[Products, int, float, Probe, int, torch.Generator], Estimate]

_METHODS: dict[str, tuple[_Estimator, int, Probe]] = {
    "xtrace": (_xtrace, 4, "gaussian"),
    "hutch++": (_hutch_plus_plus, 4, "rademacher"),
    "hutchinson": (_hutchinson, 2, "rademacher"),
}
