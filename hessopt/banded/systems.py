"""The damped curvature of one step, to be solved with several dampings and bandwidths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from hessopt.banded.linear_solve import banded_solve, check_solve_memory, solve_positive_definite
from hessopt.factors.sample_factors import Factor, symmetric_product
from hessopt.network.cliques import Cliques

Parts = list[list[Tensor]]


class BandedSystem(Protocol):
    """Solves with the maximum-determinant completion of ``ĴᵀĴ + D``; what does not depend on D is kept."""

    def solve(
        self,
        gradients: Sequence[Sequence[Tensor]],
        damping: Sequence[Sequence[float]],
        cliques: Cliques,
        residuals: Tensor | None = None,
    ) -> Parts:
        """The inverse of the completion times a gradient, ``Ĵᵀ r`` if residuals r are given.

        D is constant on each parameter.
        """

    def block_norms(self) -> Tensor:
        """``‖Ĵ_vᵀ Ĵ_w‖_F`` of all pairs of layers, ``(n, n)``."""

    def operations(self, cliques: Cliques) -> float:
        """Multiplications of one step with these cliques, to leading order."""


class SampleSystem:
    """Solves in the space of the N rows, :func:`hessopt.banded.linear_solve.banded_solve`.

    Gram matrices whose damping is one number, and their sum, are kept while they all fit into half of ``memory_limit``.

    Args:
        factors: One for each layer, all with the same N.
        shapes: For each layer those of its trained parameters.
        memory_limit: Bytes that the N×N matrices may take.

    Raises:
        MemoryBudgetError: not even one clique at a time fits.
    """

    def __init__(self, factors: Sequence[Factor], shapes: Sequence[Sequence[torch.Size]], memory_limit: int) -> None:
        self.factors = factors
        self._shapes = shapes
        self._sizes = [sum(shape.numel() for shape in own) for own in shapes]
        rows, dtype = factors[0].size, factors[0].trace().dtype
        check_solve_memory(rows, dtype, memory_limit)
        kept = (len(factors) + 1) * rows**2 * dtype.itemsize
        self._keeps = 2 * kept <= memory_limit
        self._left = memory_limit - kept if self._keeps else memory_limit
        self._grams: dict[int, Tensor] = {}
        self._sum: Tensor | None = None

    def solve(
        self,
        gradients: Sequence[Sequence[Tensor]],
        damping: Sequence[Sequence[float]],
        cliques: Cliques,
        residuals: Tensor | None = None,
    ) -> Parts:
        """The inverse of the completion times a gradient."""
        return banded_solve(
            self.factors,
            gradients,
            damping,
            cliques,
            memory_limit=self._left,
            gram=self._clique_gram,
            residuals=residuals,
        )

    def block_norms(self) -> Tensor:
        """``‖Ĵ_vᵀ Ĵ_w‖_F = √⟨Γ_v, Γ_w⟩``."""
        count = len(self.factors)
        rows = [self._gram(v, [1.0] * len(self._shapes[v])) for v in range(count)]
        norms = torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
        return norms.clamp(min=0).sqrt()

    def operations(self, cliques: Cliques) -> float:
        """Multiplications of one step with these cliques."""
        return banded_operations(
            self.factors[0].size, self._sizes, cliques, grams=[factor.gram_operations for factor in self.factors]
        )

    def _clique_gram(self, members: Sequence[int], damping: Sequence[Sequence[float]]) -> Tensor:
        """``Σ_v Ĵ_v D_v⁻¹ Ĵ_vᵀ``."""
        values = {d for v in members for d in damping[v]}
        if not self._keeps or len(values) > 1 or len(members) < len(self.factors):
            return _total(self._gram(v, damping[v]) for v in members)
        if self._sum is None:
            self._sum = _total(self._grams[v] if v in self._grams else self._unit(v) for v in members)
        return self._sum / values.pop()

    def _gram(self, v: int, damping: Sequence[float]) -> Tensor:
        if not self._keeps or len(set(damping)) > 1:
            return self.factors[v].gram(damping)
        if v not in self._grams:
            self._grams[v] = self._unit(v)
        return self._grams[v] / damping[0]

    def _unit(self, v: int) -> Tensor:
        return self.factors[v].gram([1.0] * len(self._shapes[v]))


def _total(parts: Iterable[Tensor]) -> Tensor:
    found = iter(parts)
    total = next(found)
    for i, part in enumerate(found):
        total = total + part if i == 0 else total.add_(part)  # the first may be kept for later
    return total


class ParameterSystem:
    """Solves in the space of parameters: ``M_C = Ĵ_CᵀĴ_C + D_C`` for every clique and separator.

    Args:
        factors: One for each layer, all with the same N.
        shapes: For each layer those of its trained parameters.
        memory_limit: Bytes that all matrices together may take.

    Raises:
        MemoryBudgetError: they take more.
    """

    def __init__(self, factors: Sequence[Factor], shapes: Sequence[Sequence[torch.Size]], memory_limit: int) -> None:
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._sizes = sizes = [sum(shape.numel() for shape in own) for own in shapes]
        needed = (factors[0].size * sum(sizes) + 3 * sum(sizes) ** 2) * factors[0].trace().element_size()
        if needed > memory_limit:
            raise MemoryBudgetError(
                f"matrices of {sum(sizes)} parameters and {factors[0].size} rows need {needed / 2**30:.3g} GiB, more "
                f'than the limit of {memory_limit / 2**30:.3g} GiB. Use space="sample", which curvature="ggn" has, or '
                "raise memory_limit."
            )
        self._rows = [factor.matrix() for factor in factors]

    def solve(
        self,
        gradients: Sequence[Sequence[Tensor]],
        damping: Sequence[Sequence[float]],
        cliques: Cliques,
        residuals: Tensor | None = None,
    ) -> Parts:
        """The inverse of the completion times a gradient."""
        flat = [torch.cat([g.reshape(-1) for g in own]) for own in gradients]
        diagonals = [
            torch.cat([g.new_full((g.numel(),), d) for g, d in zip(*pair, strict=True)])
            for pair in zip(gradients, damping, strict=True)
        ]
        steps = [torch.zeros_like(g) for g in flat]
        least = min(min(d) for d in damping)
        for members, sign in [*((c, 1) for c in cliques.cliques), *((s, -1) for s in cliques.separators)]:
            matrix = torch.cat([torch.cat([self._block(v, w) for w in members], dim=1) for v in members])
            matrix.diagonal().add_(torch.cat([diagonals[v] for v in members]))
            right = torch.cat([flat[v] for v in members])
            solution = solve_positive_definite(matrix[None], right[None], least)
            for v, part in zip(members, solution[0].split([len(flat[v]) for v in members]), strict=True):
                steps[v] += sign * part
        return [
            [part.reshape(g.shape) for part, g in zip(step.split([g.numel() for g in own]), own, strict=True)]
            for step, own in zip(steps, gradients, strict=True)
        ]

    def block_norms(self) -> Tensor:
        """``‖Ĵ_vᵀ Ĵ_w‖_F``."""
        count = range(len(self._rows))
        return torch.stack([torch.stack([self._block(v, w).norm() for w in count]) for v in count])

    def operations(self, cliques: Cliques) -> float:
        """Multiplications of one step with these cliques."""
        return banded_operations(len(self._rows[0]), self._sizes, cliques)

    def _block(self, v: int, w: int) -> Tensor:
        if (v, w) not in self._blocks:
            block = symmetric_product(self._rows[v].mT) if v == w else self._rows[v].mT @ self._rows[w]
            self._blocks[v, w] = block
            self._blocks[w, v] = block.mT
        return self._blocks[v, w]


def banded_operations(
    rows: int, sizes: Sequence[int], cliques: Cliques, *, grams: Sequence[float] | None = None
) -> float:
    """Multiplications of one step, to leading order: evaluation, matrices, and one solve.

    ``6 N P`` for the network's passes. In sample space each layer's Gram matrix, ``P_v/2`` for each of N² numbers or
    what its factor says, and ``N³/3`` for each clique and separator. In parameter space ``N P_v P_w`` for each pair
    ``v < w`` that some clique holds, half of it where ``v = w``, and ``P_C³/3``, P_C being the clique's parameters.

    Args:
        rows: N.
        sizes: P_v of each layer.
        cliques: Cliques and separators.
        grams: ``gram_operations`` of each layer's :class:`hessopt.factors.sample_factors.Factor`; None: in parameter
            space.
    """
    terms = [*cliques.cliques, *cliques.separators]
    passes = 6.0 * rows * sum(sizes)
    if grams is not None:
        return passes + rows**2 * sum(grams) + len(terms) * rows**3 / 3
    pairs = {(v, w) for members in cliques.cliques for v in members for w in members if v <= w}
    products = sum(rows * sizes[v] * sizes[w] / (2 if v == w else 1) for v, w in pairs)
    return passes + products + sum(sum(sizes[v] for v in members) ** 3 / 3 for members in terms)
