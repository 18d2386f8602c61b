"""Extreme eigenpairs of a symmetric matrix that is known by its products, by Lanczos iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.krylov import Krylov, Reorthogonalise
from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.estimators.probes import Products, generator_for

End: TypeAlias = Literal["smallest", "largest", "both", "magnitude"]
"""Ends of a spectrum: the k most negative, the k most positive, k of each, or the k of largest absolute value."""

_NOISE = 0.1
"""Length of the random vector that is added to a given start of length 1."""


@dataclass(frozen=True, eq=False, repr=False)
class ExtremeEigenpairs:
    """Eigenvalues and unit eigenvectors with error bounds; made by :func:`extreme_eigenpairs`.

    Attributes:
        values: Ritz values, ``(k,)``; ``(2k,)`` for both ends.
        vectors: Ritz vectors as columns, ``(n, k)``.
        residuals: ``‖A x − θ x‖`` of each: an eigenvalue of A lies within it of θ, up to the rounding of products.
        products: Matrix-vector products used.
        converged: Whether all residuals are within the tolerance, and nothing farther out is likely to be missed. Where
            it is False, the outermost value at an end is still one that ``vᵀAv`` takes, so λ_min is no larger than the
            smallest and λ_max no smaller than the largest.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool

    def __str__(self) -> str:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        numbers = ", ".join(f"{value:.6g} ± {bound:.1g}" for value, bound in pairs)
        return f"{numbers} ({self.products} products{', converged' if self.converged else ', not converged'})"

    __repr__ = __str__


def extreme_eigenpairs(
    op: LinearOperator,
    k: int = 1,
    which: End = "smallest",
    *,
    rtol: float | None = None,
    floor: float = 0.0,
    max_products: int = 300,
    start: Tensor | None = None,
    reorthogonalise: Reorthogonalise = "full",
    verify: bool = False,
    memory_limit: int = 8 * 2**30,
    generator: torch.Generator | None = None,
) -> ExtremeEigenpairs:
    """The k eigenpairs at an end of the spectrum of a symmetric matrix.

    After j products, ``A V_j = V_j T_j + β_j v_{j+1} e_jᵀ``. An eigenpair (θ, s) of T_j gives the Ritz pair
    ``(θ, V_j s)``, whose residual is ``β_j |e_jᵀ s|``. It is reported with the rounding of the iteration added,
    eps · ‖A‖ · j. Eigenvalue errors are at most the residual, and about residual²/gap where the gap is large.

    A small residual says that an eigenvalue is near, not that it is the outermost: of a random vector, an eigenvector
    is a share of 1/√n, so that of a large network with H = diag(172, −27, 0, …) the second step has a vector of the
    null space with a residual of 10⁻⁴ · 172. So the iteration goes on until residuals are small beside the eigenvalues
    themselves, and until with 99 % probability no eigenvalue lies farther out than the outermost by more than a tenth
    (or rtol) of it, by a bound from the start's share of the Ritz vector
    (:meth:`diagnostics.estimators.krylov.Krylov.frontier`). Eigenvalues smaller than rounding, eps · ‖A‖ · j, count as
    0. The smallest eigenvalue of a positive semidefinite matrix with a continuum down to 0 is thus hard to get, and
    easily reported as not converged; see ``floor``.

    Full reorthogonalisation makes the new vector orthogonal to all before, twice, in 4nj operations each. Selective
    reorthogonalisation makes it so to the Ritz vectors that have converged to √eps only, along which alone
    orthogonality gets lost (Parlett and Scott 1979): fewer operations where few have converged, and the same memory.
    Its residuals get no smaller than about √eps · ‖A‖ and are measured at the end, by a product with the k vectors.

    Of a repeated eigenvalue a single start shows one copy. Once the space is exhausted (an invariant subspace: β_j of
    rounding size), a new one begins at a random vector orthogonal to it, until one shows no eigenvalue farther out: so
    all copies are found. Convergence usually comes before that, and then ``verify`` does the same from there: the found
    pairs stay, a new start looks for another one among them or farther out. Without it one may be missed.

    Memory: the basis, n · (number of products), and at most as much again while it grows, if that is within
    ``memory_limit``. Once the basis alone would take more than ``memory_limit`` bytes, it is replaced by the best Ritz
    vectors and grows again (thick restart, Wu and Simon 2000), which takes more products.

    Args:
        op: The matrix A = Aᵀ, ``(n, n)``.
        k: Number of pairs at each end that is asked for.
        which: ``"smallest"``: ascending. ``"largest"``: descending. ``"both"``: the k smallest and the k largest,
            ascending. ``"magnitude"``: by descending absolute value.
        rtol: Converged where each residual is at most rtol times the absolute value of its own eigenvalue. None: √eps
            of the dtype, and eigenvalues are then accurate to about eps where they are well separated. With selective
            reorthogonalisation the measured residuals count, against rtol · ‖A‖.
        floor: Share of ‖A‖ that does not matter: a residual or a missed eigenvalue of at most floor · ‖A‖ is accepted
            as well. 0: only rounding is.
        max_products: The largest number of matrix-vector products. n of them are exact, and no more are made without
            a restart.
        start: The first vector, ``(n,)``, e.g. an eigenvector of nearby parameters; a random vector of a tenth of its
            length is added, in case that another eigenvalue has overtaken. None: random.
        reorthogonalise: ``"full"`` or ``"selective"``, see above.
        verify: Look for a missed eigenvalue from a new start, at about the same cost again.
        memory_limit: Bytes for the basis.
        generator: Source of randomness. None: a new one with seed 0, so that two calls give the same.

    Raises:
        ValueError: ``k``, ``which``, ``rtol``, ``floor`` or ``max_products`` is out of range.
        DiagnosticsError: The operator is not symmetric; a product is not finite; ``start`` is zero, not finite or of a
            wrong shape, dtype or device.
        MemoryBudgetError: Not even the least basis fits, or one for selective reorthogonalisation.

    Source: Lanczos 1950; Parlett 1998, ch. 13.
    """
    products = Products(op, symmetric=True)
    n = op.shape[0]
    ends = {"smallest": 1, "largest": 1, "both": 2, "magnitude": 1}
    if which not in ends:
        raise ValueError(f'which is "smallest", "largest", "both" or "magnitude", got {which!r}.')
    if not 1 <= k * ends[which] <= n:
        raise ValueError(f"k must be between 1 and {n // ends[which]} for a matrix of size {n}, got {k}.")
    tolerance = torch.finfo(op.dtype).eps ** 0.5 if rtol is None else rtol
    if not tolerance >= 0:
        raise ValueError(f"rtol is a relative tolerance of at least 0, got {rtol}.")
    if not floor >= 0:
        raise ValueError(f"floor is a share of the largest eigenvalue, at least 0, got {floor}.")
    wanted = k * ends[which]
    if reorthogonalise not in ("full", "selective"):
        raise ValueError(f'reorthogonalise is "full" or "selective", got {reorthogonalise!r}.')
    steps = max_products - (wanted if reorthogonalise == "selective" else 0)
    if steps < wanted:
        raise ValueError(f"max_products must be at least {wanted + max_products - steps}, got {max_products}.")
    random = generator_for(op, generator)
    space = Krylov(
        products,
        wanted=wanted,
        steps=steps,
        reorthogonalise=reorthogonalise,
        memory_limit=memory_limit,
        generator=random,
        start=None if start is None else _blended(checked_start(start, op), products, random),
        noise=1.0 if start is None else _NOISE / (1 + _NOISE**2) ** 0.5,
    )
    check_at = wanted
    while True:
        space.step()
        done = space.size == n or products.count >= steps
        if not done and products.count < check_at and not space.full:
            continue
        check_at = products.count + max(1, products.count // 10)
        ritz = space.ritz()
        chosen = _select(ritz.values, k, which)
        radius = ritz.values.abs().amax().item()
        converged = space.size == n
        rounding = torch.finfo(op.dtype).eps * radius * space.size + space.neglected
        least = max(rounding, floor * radius)
        tolerances = (tolerance * ritz.values[chosen].abs()).clamp(min=least)
        if not converged and space.size >= wanted and (ritz.residuals[chosen] <= tolerances).all():
            limits = _limits(ritz.values, 1, which), _limits(ritz.values, k, which)
            state = space.check(*limits, tolerance, least, verify)
            converged = state == "complete"
            if state == "fresh" and not done:
                space.begin_again(ritz, chosen)
                continue
        if done or converged:
            vectors = space.vectors(ritz, chosen)
            values, residuals = (x[chosen].to(op.device, op.dtype) for x in (ritz.values, ritz.residuals))
            if reorthogonalise == "selective":
                residuals = torch.linalg.vector_norm(products.forward(vectors) - vectors * values, dim=0)
                converged = converged and bool((residuals <= max(tolerance, floor) * radius).all())
            return ExtremeEigenpairs(values, vectors, residuals + rounding, products.count, converged)
        if space.full:
            space.restart(ritz, _keep(ritz.values, chosen, space.capacity, which))


def _select(values: Tensor, k: int, which: End) -> Tensor:
    """Indices of the wanted ones among ascending Ritz values; fewer where there are fewer."""
    size = len(values)
    if which == "smallest":
        return torch.arange(min(k, size))
    if which == "largest":
        return torch.arange(size - 1, max(size - 1 - k, -1), -1)
    if which == "magnitude":
        return values.abs().argsort(descending=True)[:k]
    if size < 2 * k:
        return torch.arange(size)
    return torch.cat([torch.arange(k), torch.arange(size - k, size)])


def _limits(values: Tensor, k: int, which: End) -> tuple[float, float]:
    """The values between which nothing is wanted; infinite at an end that is not asked for."""
    infinity = float("inf")
    if which == "magnitude":
        farthest = values.abs().sort(descending=True).values[k - 1].item()
        return -farthest, farthest
    low = values[k - 1].item() if which in ("smallest", "both") else -infinity
    high = values[-k].item() if which in ("largest", "both") else infinity
    return low, high


def _keep(values: Tensor, chosen: Tensor, capacity: int, which: End) -> Tensor:
    """Indices of the Ritz vectors that survive a restart: the wanted ones and their neighbours, half of the rest."""
    number = min(len(chosen) + (capacity - len(chosen)) // 2, capacity - 2)
    if which == "both":
        return torch.cat([torch.arange((number + 1) // 2), torch.arange(len(values) - number // 2, len(values))])
    return _select(values, number, which)


def _blended(start: Tensor, products: Products, generator: torch.Generator) -> Tensor:
    """The start with random noise added, so that it contains every eigenvector."""
    noise = products.draw(1, "gaussian", generator).squeeze(1)
    vector = start + noise * (_NOISE / torch.linalg.vector_norm(noise))
    unit: Tensor = vector / torch.linalg.vector_norm(vector)
    return unit


def checked_start(start: Tensor, op: LinearOperator) -> Tensor:
    """A first vector, ``(n,)``, scaled to length 1; refused where it cannot be."""
    if start.shape != op.shape[1:] or start.dtype != op.dtype or start.device != op.device:
        raise DiagnosticsError(
            f"start must be a vector ({op.shape[1]},) of {op.dtype} on {op.device}, got {tuple(start.shape)} of "
            f"{start.dtype} on {start.device}."
        )
    norm = torch.linalg.vector_norm(start).item()
    if not 0 < norm < float("inf"):
        raise DiagnosticsError(f"start must be a finite vector that is not zero, got one of norm {norm}.")
    unit: Tensor = start.detach() / norm
    return unit
