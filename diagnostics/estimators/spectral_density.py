"""The distribution of the eigenvalues of a symmetric matrix that is known by its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.estimators.probes import Probe, Products, check_sampling, generator_for
from diagnostics.estimators.symmetric_eigen import eigh, eigvalsh
from diagnostics.results.estimate import Estimate, enough, exact, mean_of

_OF_A_STEP = 8
"""Vectors of a step: the start, the last two of the basis, the product before, while and after it is orthogonalised."""


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity:
    """Quadrature of the eigenvalue distribution, one rule a probe; made by :func:`spectral_density`.

    Every estimate is a mean over probes, with the standard error of that mean. What the quadrature of too few steps
    gets wrong is not in the standard error: compare with more steps.

    Attributes:
        nodes: Ritz values θ, ``(probes, steps)``, ascending.
        weights: w, ``(probes, steps)``: each row adds up to 1.
        size: The number n of eigenvalues.
        steps: Lanczos steps of each probe.
        products: Matrix-vector products used.
        converged: Whether the tolerance was met.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    steps: int
    products: int
    converged: bool

    @property
    def rounding(self) -> float:
        """The size eps · ‖A‖ · steps: nodes of smaller absolute value are zero to rounding."""
        return torch.finfo(self.nodes.dtype).eps * self.nodes.abs().max().item() * self.steps

    @property
    def is_exact(self) -> bool:
        """Whether the nodes are all the eigenvalues."""
        return len(self.nodes) == 1

    def spectral_sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The sum tr f(A) = Σ_i f(λ_i) ≈ n · mean over probes of Σ_j w_j f(θ_j), for f applied entry by entry."""
        return self._average((self.weights * function(self.nodes)).sum(-1) * self.size)

    def negative_mass(self, threshold: float | None = None) -> Estimate:
        """``m⁻ = Σ_{λ<0} |λ|``, the sum of the absolute values of negative eigenvalues.

        Args:
            threshold: Only nodes below −threshold count. None: :attr:`rounding`, so that of a positive semidefinite
                matrix m⁻ is 0.
        """
        limit = self.rounding if threshold is None else threshold
        return self.spectral_sum(lambda x: torch.where(x < -limit, -x, 0))

    def fraction_below(self, x: float | None = None) -> Estimate:
        """The fraction of eigenvalues below x. None: the negative ones, those below −:attr:`rounding`."""
        limit = -self.rounding if x is None else x
        return self._average((self.weights * (self.nodes < limit)).sum(-1))

    def density(self, grid: Tensor, sigma: float) -> Estimate:
        """The density ``(1/n) Σ_i N(x; λ_i, σ²)`` at the points of ``grid``, ``(g,)``; its integral is 1.

        Args:
            grid: Points x.
            sigma: Standard deviation of the smoothing. Where it is below the distance of nodes they show one by one.

        Raises:
            ValueError: ``sigma`` is not positive, or ``grid`` is not a vector.
        """
        if not sigma > 0:
            raise ValueError(f"sigma is a standard deviation above 0, got {sigma}.")
        if grid.ndim != 1:
            raise ValueError(f"grid is a vector of points, got shape {tuple(grid.shape)}.")
        points = grid.to(self.nodes)
        scale = sigma * (2 * torch.pi) ** 0.5
        rows = [
            (weights * (-0.5 * ((points[:, None] - nodes) / sigma).square()).exp()).sum(-1) / scale
            for nodes, weights in zip(self.nodes, self.weights, strict=True)  # (g, steps) at a time, not all probes'
        ]
        return self._average(torch.stack(rows))

    def _average(self, samples: Tensor) -> Estimate:
        return exact(samples[0], self.products) if self.is_exact else mean_of(samples, self.products, 0.0)

    def __str__(self) -> str:
        low, high = self.nodes.min().item(), self.nodes.max().item()
        mass, fraction = self.negative_mass(), self.fraction_below()
        return (
            f"{self.size} eigenvalues between {low:.4g} and {high:.4g}; {100 * fraction.item():.3g} % negative, "
            f"of mass {mass.item():.4g} ± {mass.standard_error.item():.2g} ({self.products} products)"
        )

    __repr__ = __str__


def spectral_density(
    op: LinearOperator,
    *,
    probes: int = 10,
    steps: int = 50,
    rtol: float = 0.0,
    target: Callable[[Tensor], Tensor] = torch.abs,
    batch: int = 10,
    probe: Probe = "rademacher",
    reorthogonalise: bool = True,
    memory_limit: int = 8 * 2**30,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The eigenvalue distribution of a symmetric matrix by stochastic Lanczos quadrature.

    Of each random unit vector v, ``steps`` Lanczos iterations give the Gauss quadrature of its spectral measure: nodes
    are the eigenvalues of the tridiagonal T, weights the squared first entries of its eigenvectors. It is exact for
    polynomials of degree 2·steps − 1, and ``n E vᵀ f(A) v = tr f(A)``. Probes advance together: one product with a
    column for each probe a step.

    Where ``steps ≥ n``, n unit vectors give the matrix, and with it the eigenvalues exactly.

    Args:
        op: The matrix A = Aᵀ, ``(n, n)``.
        probes: The largest number of random vectors, at least 2 for a standard error.
        steps: Lanczos iterations of each: resolution about (range of the spectrum)/steps, finer at the ends.
        rtol: Stop after a batch, of at least 10 probes in all, once the standard error of Σ target(λ) is at most
            ``rtol · |Σ target(λ)|``.
        target: What the tolerance is for, e.g. ``torch.square``; by default ``Σ |λ|``.
        batch: Probes that advance together; fewer where the basis would not fit.
        probe: Distribution of the probes, scaled to length 1.
        reorthogonalise: Keep the basis, n · steps · batch, and make new vectors orthogonal to it. False: eight
            vectors a probe; converged eigenvalues then show several times, with the same weight in sum.
        memory_limit: Bytes for the basis of a batch and the vectors of a step.
        generator: Source of randomness. None: a new one with seed 0, so that two calls give the same.

    Raises:
        ValueError: ``probes``, ``steps``, ``rtol``, ``batch`` or ``probe`` is out of range.
        DiagnosticsError: The operator is not symmetric, or a product is not finite.
        MemoryBudgetError: Not even the basis of one probe fits.

    Source: Golub and Welsch 1969; Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019.
    """
    products = Products(op, symmetric=True)
    if probes < 2:
        raise ValueError(f"a standard error needs at least 2 probes, got {probes}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    check_sampling(probes, 2, rtol, batch, probe)
    n = op.shape[0]
    if steps >= n:
        dense = torch.cat([products.forward(v) for _, _, v in products.unit_vectors(batch)], 1)
        nodes = eigvalsh((dense + dense.mT) / 2).unsqueeze(0)
        return SpectralDensity(nodes, torch.full_like(nodes, 1 / n), n, n, products.count, True)
    of_one = basis_bytes(op, steps if reorthogonalise else 0)
    fitting = memory_limit // of_one
    if fitting < 1:
        way_out = "fewer steps, reorthogonalise=False" if reorthogonalise else "a smaller matrix"
        raise MemoryBudgetError(
            f"the vectors of one probe, of {n} entries each, take {of_one / 2**20:.3g} MiB, more than the limit of "
            f"{memory_limit / 2**20:.3g} MiB: use {way_out} or a larger memory_limit."
        )
    random = generator_for(op, generator)
    nodes = torch.empty(0, steps, dtype=op.dtype, device=op.device)
    weights = nodes
    while len(nodes) < probes:
        start = products.draw(min(batch, fitting, probes - len(nodes)), probe, random)
        diagonal, off_diagonal = _tridiagonals(products, start, steps, reorthogonalise)
        new_nodes, new_weights = _quadrature(diagonal, off_diagonal)
        nodes = torch.cat([nodes, new_nodes.to(nodes)])
        weights = torch.cat([weights, new_weights.to(nodes)])
        if len(nodes) > 1:
            estimate = mean_of((weights * target(nodes)).sum(-1), products.count, rtol)
            if enough(estimate):
                break
    return SpectralDensity(nodes, weights, n, steps, products.count, estimate.converged)


def basis_bytes(op: LinearOperator, steps: int) -> int:
    """Bytes of a probe's vectors: those that are kept, and those of a step."""
    return (steps + _OF_A_STEP) * op.shape[0] * op.dtype.itemsize


def _tridiagonals(products: Products, start: Tensor, steps: int, reorthogonalise: bool) -> tuple[Tensor, Tensor]:
    """Diagonals ``(k, steps)`` and off-diagonals ``(k, steps − 1)`` of the Lanczos matrices of k probes ``(n, k)``.

    Where a probe's space is exhausted, what is left of the product is rounding. The probe ends there: off-diagonals are
    0, so that what follows has no weight, and diagonals are its mean, so that no node lies outside of the spectrum.
    """
    vector = (start / torch.linalg.vector_norm(start, dim=0)).mT.contiguous()  # (k, n): what is summed over is adjacent
    previous, beta, norm = torch.zeros_like(vector), vector.new_zeros(len(vector)), vector.new_zeros(len(vector))
    alive = torch.ones_like(norm, dtype=torch.bool)
    eps = torch.finfo(vector.dtype).eps
    basis = vector.new_empty(len(vector), steps, vector.shape[1]) if reorthogonalise else None
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    for step in range(steps):
        image = products.forward(vector.mT).mT
        alpha = (vector * image).sum(1)
        diagonal.append(torch.where(alive, alpha, diagonal[0]) if step else alpha)
        if step == steps - 1:
            break
        norm = torch.maximum(norm, torch.linalg.vector_norm(image, dim=1))
        image = image - alpha[:, None] * vector - beta[:, None] * previous
        if basis is not None:
            basis[:, step] = vector
            rows = basis[:, : step + 1]
            for _ in range(2):
                row = image.unsqueeze(1)  # rows times matrices: PyTorch's products of matrices times columns are slower
                image = image - (row @ rows.mT @ rows).squeeze(1)
        beta = torch.linalg.vector_norm(image, dim=1)
        alive &= beta > eps * norm
        beta = torch.where(alive, beta, 0)
        off_diagonal.append(beta)
        previous = vector
        vector = torch.where(alive[:, None], image / torch.where(alive, beta, 1)[:, None], 0)
    empty = vector.new_empty(len(vector), 0)
    return torch.stack(diagonal, 1), torch.stack(off_diagonal, 1) if off_diagonal else empty


def _quadrature(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``(k, steps)`` of tridiagonal matrices, in float64 on the CPU."""
    diagonal, off_diagonal = diagonal.double().cpu(), off_diagonal.double().cpu()
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(off_diagonal, 1) + torch.diag_embed(off_diagonal, -1)
    if not matrix.isfinite().all():
        raise DiagnosticsError("a product overflows when it is squared: scale the matrix down, or use float64.")
    values, vectors = eigh(matrix)
    return values, vectors[:, 0].square()
