"""What a Kronecker engine does with each parameter, what it keeps, and what a step of it costs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessopt.kronecker_factors import KroneckerFactors
from hessopt.kronecker_layers import Block, Rows

if TYPE_CHECKING:
    from hessopt.kronecker_band import KroneckerBand

_log = logging.getLogger(__name__)

MANY = 0.1
"""Share of the parameters that may be without Kronecker factors in silence."""


def numbers_kept(factors: KroneckerFactors, diagonals: Sequence[Tensor]) -> int:
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


def treatment(band: KroneckerBand) -> dict[str, str]:
    """How each parameter is treated, by its name in the network."""
    names: dict[Tensor, str] = {p: name for name, p in band.model.named_parameters()}
    found = {names.get(p, "?"): f"diagonal: {why}" for p, why in band.others.items()}
    for number, block in enumerate(band.blocks):
        g, o, a = block.shape
        sides = [f"diagonal {n}" if d else f"{n}×{n}" for n, d in zip((a, o), block.diagonal[::-1], strict=True)]
        text = f"{block.kind}: {' ⊗ '.join(sides)}" + (f", {g} groups" if g > 1 else "")
        if band.factors is not None and band.bandwidth != 0 and number in band.called:
            if not block.coupled:
                text += "; not coupled to other layers"
            elif band.called.index(number) in band.excluded:
                text += "; not coupled to other layers: its rows are not those of the batch's samples"
        for p in block.parameters:
            found.setdefault(names[p], text)
    return found


def without_factors(band: KroneckerBand) -> dict[str, float]:
    """The share of the parameters that have a diagonal in place of Kronecker factors, by their module's class."""
    owners: dict[Tensor, str] = {
        p: type(m).__name__ for m in band.model.modules() for p in m._parameters.values() if p is not None
    }
    total = sum(p.numel() for p in band.parameters)
    counts: Counter[str] = Counter()
    for p in band.others:
        counts[owners.get(p, "no module")] += p.numel()
    return {name: count / total for name, count in counts.most_common()}


def warn_of_diagonals(band: KroneckerBand) -> None:
    """Log a warning if more than ``MANY`` of the parameters are without factors."""
    shares = without_factors(band)
    if sum(shares.values()) > MANY:
        named = [f"{name} ({_percent(share)})" for name, share in list(shares.items())[:5]]
        more = ["…"] if len(shares) > 5 else []
        _log.warning(
            'factors="kronecker": %s of the parameters have no Kronecker factors but a diagonal, which trains them '
            "about as a diagonal method does: those of %s. `optimizer.band.report()` names each and the reason. Build "
            "such layers of torch.nn.Linear, Conv1d to Conv3d, Embedding and normalisations, or take another "
            "optimizer for them.",
            _percent(sum(shares.values())),
            ", ".join(named + more),
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


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


def step_operations(
    factors: KroneckerFactors, rows: Sequence[int], factor_every: int, inverse_every: int, iterations: int
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


def _pairs(factors: KroneckerFactors) -> list[tuple[int, int]]:
    return [pair for pairs in factors.pairs for pair in pairs.blocks]
