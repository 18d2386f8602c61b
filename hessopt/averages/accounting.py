"""What Kronecker averages keep, what a step with them costs, and the curvature along it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.blocks import Block, Rows


def numbers_kept(factors: KroneckerAverages, diagonals: Sequence[Tensor]) -> int:
    """Entries of factors, inverses and diagonals.

    ``2 Σ_v g (a² + o²) + 2 Σ_(v,w) (a_v a_w + o_v o_w)``, a or o in place of a squared diagonal factor, and the
    diagonals.
    """
    numbers = sum(p.numel() for p in diagonals)
    for block in factors.blocks:
        g, o, a = block.shape
        numbers += 2 * g * (o if block.diagonal[0] else o * o) + 2 * g * (a if block.diagonal[1] else a * a)
    for v, w in _pairs(factors):
        (_, o_v, a_v), (_, o_w, a_w) = factors.blocks[v].shape, factors.blocks[w].shape
        numbers += 2 * (a_v * a_w + o_v * o_w)
    return numbers


def sample_curvature(
    blocks: Sequence[Block], rows: Sequence[Rows | None], parts: Sequence[Tensor], samples: int
) -> Tensor:
    """``Σ_bk (Σ_v ĵ_vbkᵀ S_v x_vb)²``, the curvature along a step S by the columns of one batch.

    No Kronecker product is assumed in it, nor a band. Rows of a block that are not those of the samples (a block of
    another batch dimension) are squared on their own.

    Args:
        blocks: The blocks.
        rows: Of each block, or None.
        parts: Of each block its part of the step, ``(g, o, a)``.
        samples: B.
    """
    total = torch.zeros((), dtype=parts[0].dtype, device=parts[0].device)
    along: Tensor | None = None
    for block, row, part in zip(blocks, rows, parts, strict=True):
        if row is None:
            continue
        j = row.cotangents
        if block.kind == "embedding":
            slopes = (j * part[0][row.inputs].unsqueeze(1)).sum((0, -1))
        else:
            slopes = torch.einsum("gknto,goa,gnta->knt", j, part, row.inputs)
        if slopes[0].numel() % samples:
            total = total + slopes.sum(2).square().sum()
            continue
        slopes = slopes.reshape(len(slopes), samples, -1).sum(2)
        along = slopes if along is None else along + slopes
    return total if along is None else total + along.square().sum()


def kronecker_operations(
    factors: KroneckerAverages, rows: Sequence[int], factor_every: int, inverse_every: int, iterations: int
) -> float:
    """Multiplications of one step, to leading order, refreshes spread over the steps between them.

    For a layer with r rows (samples × positions) and g groups: ``6 r g a o`` for the passes, ``r g (a² + o²)`` for its
    factors, ``g (a³ + o³)`` for its inverses, and ``g a o (a + o)`` for the solve, twice if there are pairs. For a pair
    ``r (a_v a_w + o_v o_w)`` for its factors, ``a_v a_w (a_v + a_w) + o_v o_w (o_v + o_w)`` for their coordinates, and
    ``o_v o_w (a_v + a_w) + a_v a_w (o_v + o_w)`` an iteration. Diagonal factors count with their numbers.

    Args:
        factors: Blocks and pairs.
        rows: r of each block.
        factor_every: Steps between updates of factors.
        inverse_every: Steps between inversions.
        iterations: Of conjugate gradients.
    """
    total = 0.0
    for block, r in zip(factors.blocks, rows, strict=True):
        g, o, a = block.shape
        for n, diagonal in zip((o, a), block.diagonal, strict=True):
            wide = 1 if diagonal else n
            total += g * (r * n * wide / factor_every + n * wide**2 / inverse_every)
            total += g * o * a * wide * (2 if factors.pairs else 1)
        total += 6 * r * g * o * a
    for v, w in _pairs(factors):
        (_, o_v, a_v), (_, o_w, a_w) = factors.blocks[v].shape, factors.blocks[w].shape
        total += min(rows[v], rows[w]) * (a_v * a_w + o_v * o_w) / factor_every
        total += (a_v * a_w * (a_v + a_w) + o_v * o_w * (o_v + o_w)) / inverse_every
        total += iterations * (o_v * o_w * (a_v + a_w) + a_v * a_w * (o_v + o_w))
    return total


def _pairs(factors: KroneckerAverages) -> list[tuple[int, int]]:
    return [pair for pairs in factors.pairs for pair in pairs.blocks]
