"""Solving with the banded preconditioner, in the space of samples or in that of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from hessopt.errors import SolveError
from hessopt.factors.sample_factors import Factor
from hessopt.network.cliques import Cliques


def banded_solve(
    factors: Sequence[Factor],
    gradients: Sequence[Sequence[Tensor]],
    damping: Sequence[Sequence[float]],
    cliques: Cliques,
    *,
    memory_limit: int = 4 * 2**30,
    gram: Callable[[Sequence[int], Sequence[Sequence[float]]], Tensor] | None = None,
    residuals: Tensor | None = None,
) -> list[list[Tensor]]:
    """Apply the inverse of the maximum-determinant completion of the banded, damped curvature to a gradient.

    With ``M = ĴᵀĴ + D`` over all layers, D diagonal and positive, the completion's inverse is the sum over cliques
    minus the sum over separators of the inverses of M's principal blocks (zero-padded). Each is a solve in sample space
    (Woodbury)::

        Γ_v    = Ĵ_v D_v⁻¹ Ĵ_vᵀ                                  (N, N)
        y_C    = (I + Σ_{v∈C} Γ_v)⁻¹ Σ_{v∈C} Ĵ_v D_v⁻¹ g_v        for every clique, and likewise y_S
        step_v = D_v⁻¹ ( g_v − Ĵ_vᵀ ( Σ_{C∋v} y_C − Σ_{S∋v} y_S ) )

    The result is a positive definite matrix times g at every bandwidth. The last line is a difference of
    nearly equal numbers where D is small against ĴᵀĴ: the step's relative error is about ``ε ‖M‖ / min D`` (measured,
    see :func:`least_damping`). Where ``g_v = Ĵ_vᵀ r`` with known r, there is nothing to subtract::

        y_C    = (I + Σ_{v∈C} Γ_v)⁻¹ r,   step_v = D_v⁻¹ Ĵ_vᵀ ( Σ_{C∋v} y_C − Σ_{S∋v} y_S )

    Args:
        factors: One for each layer, all with the same N.
        gradients: g, for each layer a list of tensors.
        damping: D, for each layer a list of positive numbers.
        cliques: Cliques and separators of the layers that interact, from :func:`hessopt.network.cliques.band_cliques`.
        memory_limit: Bytes that the N×N matrices may take. Cliques are treated together as far as it permits.
        gram: ``gram(C, damping)``, ``Σ_{v∈C} Γ_v`` from where it is kept already. Default: of the factors' own.
        residuals: r, ``(N,)``, if ``g_v = Ĵ_vᵀ r`` for all layers; the gradients are then not looked at.

    Returns:
        The step, in the shape of ``gradients``; to be subtracted from the parameters.

    Raises:
        MemoryBudgetError: not even one clique at a time fits into ``memory_limit``.
        SolveError: a matrix ``I + Σ Γ_v`` is numerically not positive definite, or not finite: the
            damping is too small for the precision.

    Source:
        docs/banded.md; Dempster, "Covariance selection" (1972); Grone, Johnson, Sá and Wolkowicz, "Positive definite
        completions of partial Hermitian matrices" (1984).
    """
    scaled: list[list[Tensor]] = []
    if residuals is None:
        scaled = [[g / d for g, d in zip(*pair, strict=True)] for pair in zip(gradients, damping, strict=True)]
        q = torch.stack([factor.jvp(s) for factor, s in zip(factors, scaled, strict=True)])
    else:
        q = residuals.expand(len(factors), -1)
    terms = [(clique, 1) for clique in cliques.cliques] + [(separator, -1) for separator in cliques.separators]
    y = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    at_once = check_solve_memory(q.shape[1], q.dtype, memory_limit)
    if gram is not None and q.device.type == "cpu":
        at_once = 1  # LAPACK factorizes one matrix after the other anyway, and nothing is computed twice
    for start in range(0, len(terms), at_once):
        part = terms[start : start + at_once]
        if gram is None:
            matrices = q.new_zeros(len(part), q.shape[1], q.shape[1])
            for v, factor in enumerate(factors):
                holders = [i for i, (members, _) in enumerate(part) if v in members]
                if holders:
                    product = factor.gram(damping[v])
                    for i in holders:
                        matrices[i] += product
        else:
            matrices = q.new_empty(len(part), q.shape[1], q.shape[1])
            for matrix, (members, _) in zip(matrices, part, strict=True):
                matrix.copy_(gram(members, damping))
        matrices.diagonal(dim1=1, dim2=2).add_(1)
        right_sides = torch.stack(
            [torch.stack([q[v] for v in members]).sum(dim=0) if residuals is None else residuals for members, _ in part]
        )
        # LAPACK factorizes one matrix after the other anyway; in one batch it would only take more memory.
        together = 1 if q.device.type == "cpu" else len(part)
        solutions = [
            solve_positive_definite(*pair, min(min(d) for d in damping))
            for pair in zip(matrices.split(together), right_sides.split(together), strict=True)
        ]
        for (members, sign), solution in zip(part, torch.cat(solutions), strict=True):
            for v in members:
                y[v] += sign * solution
    if residuals is not None:
        return [
            [product / d for product, d in zip(factor.vjp(y_v), d_v, strict=True)]
            for factor, y_v, d_v in zip(factors, y, damping, strict=True)
        ]
    return [
        [s - product / d for s, product, d in zip(s_v, factor.vjp(y_v), d_v, strict=True)]
        for s_v, factor, y_v, d_v in zip(scaled, factors, y, damping, strict=True)
    ]


def solve_positive_definite(matrices: Tensor, right_sides: Tensor, damping: float) -> Tensor:
    """Solutions ``(m, N)`` of m positive definite systems ``(m, N, N)``.

    Args:
        matrices: They.
        right_sides: ``(m, N)``.
        damping: The least one in them, for the message.

    Raises:
        SolveError: a matrix is numerically not positive definite.
    """
    root, info = torch.linalg.cholesky_ex(matrices)
    if info.any():
        raise SolveError(
            f"the damped curvature is not positive definite in {matrices.dtype}: the damping, at least "
            f"{damping:.3g}, is too small for this precision. Use more damping or float64."
        )
    # Not cholesky_solve, which copies the factors.
    forward = torch.linalg.solve_triangular(root, right_sides.unsqueeze(2), upper=False)
    solution: Tensor = torch.linalg.solve_triangular(root.mT, forward, upper=True)
    return solution.squeeze(2)


def least_damping(factors: Sequence[Factor], *, residuals: bool = False) -> float:
    """Damping below which rounding spoils the result of :func:`banded_solve`: ``10 ε tr(ĴᵀĴ)``.

    Given residuals, what is lost is the damping itself, beside the rounding of the Gram matrix: ``ε tr(ĴᵀĴ) / 10``.

    The trace bounds the largest eigenvalue and costs next to nothing. Measured in float32, on networks of four layers
    with 1152 and 1280 rows: at this damping the step is off by 2e-4 to 6e-3 of its norm; at a hundredth of it by 0.02
    to 0.65, and that along directions which hardly change the loss, so that a test of the loss would accept it.
    """
    traces = torch.stack([factor.trace() for factor in factors])
    return (0.1 if residuals else 10) * torch.finfo(traces.dtype).eps * float(traces.sum())


def check_solve_memory(rows: int, dtype: torch.dtype, memory_limit: int) -> int:
    """How many cliques and separators :func:`banded_solve` can treat at once.

    Args:
        rows: N, the factors' size.
        dtype: The factors' dtype.
        memory_limit: Bytes that the N×N matrices may take.

    Raises:
        MemoryBudgetError: not even one.
    """
    # For each its matrix and its Cholesky factor; besides, one layer's Gram matrix and its workspace.
    matrix = max(rows, 1) ** 2 * dtype.itemsize
    at_once = (memory_limit // matrix - 2) // 2
    if at_once < 1:
        raise MemoryBudgetError(
            f"the banded solve needs {4 * matrix / 2**30:.3g} GiB at least ({rows} rows = batch × outputs, with a "
            f"square matrix of this size for each clique), more than the limit of {memory_limit / 2**30:.3g} GiB. "
            "Use a smaller batch or raise memory_limit."
        )
    return at_once
