"""Blocks as products of thin factors, with a bound on what was cut off (docs/low_rank.md)."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diagnostics.blocks.containers import BlockMatrix, MeanBlocks
from diagnostics.blocks.layout import Layout
from diagnostics.results.text_table import format_table


@dataclass(frozen=True, eq=False)
class LowRankBlock:
    """A block as a product ``U Vᵀ`` of thin factors (cf. Def. 91).

    Attributes:
        left: U, ``(S, d_v, r)``; of batch means ``(d_v, r)``.
        right: V, ``(S, d_w, r)``; of batch means ``(d_w, r)``.
        bound: An upper bound on ‖H[v,w] − U Vᵀ‖_F but for rounding, ``(S,)``; of batch means a scalar.
    """

    left: Tensor
    right: Tensor
    bound: Tensor

    @property
    def rank(self) -> int:
        """The number r of columns of the factors: an upper bound on the rank, of each sample."""
        return self.left.shape[-1]

    def dense(self) -> Tensor:
        """U Vᵀ, ``(S, d_v, d_w)``; of batch means ``(d_v, d_w)``."""
        return self.left @ self.right.mT

    def error(self, exact: Tensor) -> Tensor:
        """‖H[v,w] − U Vᵀ‖_F against the exact block, ``(S,)``; of batch means a scalar."""
        error: Tensor = torch.linalg.matrix_norm(exact - self.dense())
        return error

    @property
    def mT(self) -> LowRankBlock:
        """The block of the pair (w, v)."""
        return LowRankBlock(self.right, self.left, self.bound)


class LowRankBlocks(BlockMatrix):
    """A symmetric matrix of low-rank blocks; made by :func:`low_rank` and :func:`gauss_newton_factors`.

    ``matrix[v, w]`` multiplies the factors; ``matrix.factors(v, w)`` are they.
    """

    def factors(self, v: str, w: str) -> LowRankBlock:
        """The factors of a pair of nodes, in either order."""
        in_order = self.layout.position[v] >= self.layout.position[w]
        return self._factors(v, w) if in_order else self._factors(w, v).mT

    def compare(self, exact: BlockMatrix) -> LowRankTable:
        """Rank, actual error and bound of every pair; ``exact`` are the blocks that these approximate."""
        names = self.nodes
        ranks, errors, bounds, norms = ([[0.0] * len(names) for _ in names] for _ in range(4))
        for i, v in enumerate(names):
            for j, w in enumerate(names[: i + 1]):
                block, target = self.factors(v, w), exact[v, w]
                ranks[i][j] = ranks[j][i] = block.rank
                errors[i][j] = errors[j][i] = block.error(target).norm().item()
                bounds[i][j] = bounds[j][i] = block.bound.norm().item()
                norms[i][j] = norms[j][i] = target.norm().item()
        like = self.layout.like
        return LowRankTable(
            nodes=names,
            rank=torch.tensor(ranks, dtype=torch.long),
            error=like.new_tensor(errors),
            bound=like.new_tensor(bounds),
            norm=like.new_tensor(norms),
            distance=self.layout.distances,
        )

    def mean(self) -> MeanBlocks:
        """Batch means of the low-rank blocks, multiplied out."""
        layout = self.layout
        if self.factors(layout.names[0], layout.names[0]).left.ndim == 3:
            return super().mean()
        return MeanBlocks(layout, {v: torch.cat([self[v, w] for w in layout.up_to(v)], dim=1) for v in layout.names})

    @abstractmethod
    def _factors(self, v: str, w: str) -> LowRankBlock:
        """The factors of ``v`` and ``w``, which is not after ``v``."""

    def _block(self, v: str, w: str) -> Tensor:
        return self._factors(v, w).dense()

    def sample_sums(self) -> dict[str, Tensor]:
        """Sums over independent samples."""

        def sample_sum(block: LowRankBlock) -> Tensor:
            return rearrange(block.left, "s v r -> v (s r)") @ rearrange(block.right, "s w r -> (s r) w")

        layout = self.layout
        return {v: torch.cat([sample_sum(self._factors(v, w)) for w in layout.up_to(v)], dim=1) for v in layout.names}


class _Truncated(LowRankBlocks):
    def __init__(self, layout: Layout, pairs: Mapping[tuple[str, str], LowRankBlock]) -> None:
        super().__init__(layout)
        self._pairs = pairs

    def _factors(self, v: str, w: str) -> LowRankBlock:
        return self._pairs[v, w]


def low_rank(matrix: BlockMatrix, *, rank: int | None = None, tolerance: float | None = None) -> LowRankBlocks:
    """Every block cut to its largest singular values: the best approximation of its rank (cf. Def. 91).

    With the singular value decomposition ``H[v,w] = Σᵢ σᵢ pᵢ qᵢᵀ``, kept are the first r terms. By Eckart, Young and
    Mirsky no matrix of rank r is nearer in Frobenius norm, and the bound ``√(Σ_{i>r} σᵢ²)`` is the error itself. Blocks
    of one shape are decomposed in one batch.

    Args:
        matrix: Blocks of one part of the Hessian: ``blocks.mean().total``, or of single samples ``blocks.total``.
        rank: r for every block (less where a block has fewer rows or columns).
        tolerance: Choose for each block the least r with error ≤ tolerance · ‖H[v,w]‖_F (cf. Cor. 94), for samples
            the least that does for all of them. Give either this or ``rank``.

    Returns:
        :class:`LowRankBlocks` over the same nodes.

    Raises:
        ValueError: Neither or both of ``rank`` and ``tolerance`` are given, or one is negative.
    """
    if (rank is None) == (tolerance is None):
        raise ValueError("give either rank or tolerance: how many singular values to keep, or what may be lost.")
    by_shape: dict[torch.Size, list[tuple[str, str]]] = defaultdict(list)
    layout = matrix.layout
    for v in layout.names:
        for w in layout.up_to(v):
            by_shape[matrix[v, w].shape].append((v, w))
    pairs: dict[tuple[str, str], LowRankBlock] = {}
    for same in by_shape.values():
        decomposed = torch.linalg.svd(torch.stack([matrix[pair] for pair in same]), full_matrices=False)
        for pair, u, values, vh in zip(same, *decomposed, strict=True):
            r = kept_rank(values, rank=rank, tolerance=tolerance)
            left = u[..., :r] * values[..., None, :r]
            pairs[pair] = LowRankBlock(left, vh[..., :r, :].mT.contiguous(), discarded(values)[..., r])
    return _Truncated(layout, pairs)


def discarded(values: Tensor) -> Tensor:
    """√(Σ_{i>r} σᵢ²), ``(…, m+1)``: what is lost when r = 0, 1, …, m of the singular values ``(…, m)`` are kept."""
    scale = values.amax(-1, keepdim=True) if values.shape[-1] else values.new_ones(*values.shape[:-1], 1)
    scale = torch.where(scale > 0, scale, 1)  # so that squares of small values do not underflow
    tails = (values / scale).square().flip(-1).cumsum(-1).flip(-1).sqrt() * scale
    return torch.cat([tails, torch.zeros_like(scale)], dim=-1)


def kept_rank(values: Tensor, *, rank: int | None = None, tolerance: float | None = None) -> int:
    """How many singular values ``(…, m)``, in descending order, to keep: ``rank``, or what ``tolerance`` needs.

    The least r with √(Σ_{i>r} σᵢ²) ≤ tolerance · √(Σ σᵢ²) in every sample (cf. Cor. 94); neither: all.
    """
    for name, number in (("rank", rank), ("tolerance", tolerance)):
        if number is not None and not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}.")
    most = values.shape[-1]
    if tolerance is not None:
        tails = discarded(values)
        most = int((tails > tolerance * tails[..., :1]).sum(-1).max().item())
    return most if rank is None else min(rank, most)


@dataclass(frozen=True, eq=False, repr=False)
class LowRankTable:
    """Low-rank blocks beside the exact ones; made by :meth:`LowRankBlocks.compare`.

    All tensors are ``(n, n)``, symmetric. Norms of single samples are those of all samples' blocks together.

    Attributes:
        nodes: Names of the nodes, in topological order.
        rank: Columns of the factors.
        error: ‖H − U Vᵀ‖_F.
        bound: The upper bound on the error that was known without H.
        norm: ‖H‖_F.
        distance: Length of the shortest undirected path.
    """

    nodes: tuple[str, ...]
    rank: Tensor
    error: Tensor
    bound: Tensor
    norm: Tensor
    distance: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Names and nested lists, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v.tolist() if isinstance(v, Tensor) else list(v) for name, v in values.items()}

    def __str__(self) -> str:
        rows = []
        for i, j in torch.triu_indices(len(self.nodes), len(self.nodes)).T.tolist():
            numbers = (self.error[i, j], self.bound[i, j], self.norm[i, j])
            rank = str(self.rank[i, j].item())
            rows.append([self.nodes[i], self.nodes[j], rank, *(f"{number.item():.3g}" for number in numbers)])
        return format_table(["v", "w", "rank", "error", "bound", "|H|"], rows)

    __repr__ = __str__
