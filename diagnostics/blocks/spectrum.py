"""Eigenvalues and eigenvectors of assembled blocks: effective rank, negative curvature, directions of escape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from diagnostics.blocks.containers import BlockMatrix, HessianBlocks
from diagnostics.blocks.pair_metrics import tabled_nodes
from diagnostics.estimators.linear_operator import symmetrise
from diagnostics.estimators.symmetric_eigen import eigh, eigvalsh

Which: TypeAlias = Literal["smallest", "largest", "magnitude"]
"""Ends of a spectrum: ascending from the most negative, descending, or by descending absolute value."""

LANCZOS_FROM = 3000
"""Size from which few eigenpairs on a CPU are found by Lanczos iterations instead of a full decomposition."""


def effective_rank(block: Tensor) -> Tensor:
    """d_eff = ‖H‖_* / ‖H‖₂ of blocks ``(…, d_v, d_w)``: the sum of the singular values over the largest.

    Between 1 and min(d_v, d_w), unchanged when H is scaled; 0/0 is NaN. The stable rank D weighs by squares instead,
    so that ``D ≤ d_eff ≤ rank``. Source: d_eff of arXiv 2604.11639.
    """
    values: Tensor = torch.linalg.svdvals(block)
    rank: Tensor = values.sum(-1) / values[..., 0]
    return rank


def negative_curvature(matrix: Tensor) -> Tensor:
    """``m⁻ = Σ_{λ<0} |λ|`` of symmetric matrices ``(…, N, N)``: the mass of negative curvature, in units of the matrix.

    Of a positive semidefinite matrix it is 0 to rounding. Symmetric to rounding is enough (:func:`symmetrise`).
    """
    values: Tensor = eigvalsh(symmetrise(matrix))
    return values.clamp(max=0).abs().sum(-1)


def assemble(matrix: BlockMatrix, names: Sequence[str]) -> Tensor:
    """The symmetrised matrix of the blocks between ``names``, ``(…, N, N)``."""
    rows = [torch.cat([matrix[v, w] for w in names], dim=-1) for v in names]
    return symmetrise(torch.cat(rows, dim=-2))


def negligible(matrix: Tensor) -> Tensor:
    """Size below which eigenvalues of matrices ``(…, N, N)`` are zero to rounding: √N · eps · ‖M‖_F."""
    size: Tensor = matrix.shape[-1] ** 0.5 * torch.finfo(matrix.dtype).eps * torch.linalg.matrix_norm(matrix)
    return size


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues and unit eigenvectors of assembled blocks; made by :func:`eigenpairs`.

    Attributes:
        nodes: Names of the nodes, in topological order.
        sizes: Entries d_v of each node.
        values: Eigenvalues, ``(…, k)``; the leading dimension is that of the samples, absent for batch means.
        vectors: Eigenvectors as columns, ``(…, N, k)`` with N = Σ d_v.
    """

    nodes: tuple[str, ...]
    sizes: tuple[int, ...]
    values: Tensor
    vectors: Tensor

    @property
    def by_node(self) -> dict[str, Tensor]:
        """The part of the eigenvectors at each node, ``(…, d_v, k)``."""
        return dict(zip(self.nodes, self.vectors.split(self.sizes, dim=-2), strict=True))

    @property
    def energy(self) -> Tensor:
        """Share of each node in each eigenvector, ‖part at v‖², ``(…, n, k)``; the shares of a vector add up to 1."""
        return torch.stack([part.square().sum(-2) for part in self.by_node.values()], dim=-2)


def eigenpairs(
    matrix: BlockMatrix, k: int | None = None, which: Which = "smallest", *, include_output: bool = False
) -> Eigenpairs:
    """Eigenpairs of assembled blocks: of ``blocks.mean().total``, or of single samples ``blocks.total``.

    Dense and exact (LAPACK, cuSOLVER). Where few (k ≤ N/20) eigenpairs of one big matrix (N ≥ 3000) on a CPU are
    asked for, Lanczos iterations (ARPACK) to machine precision; a second run with the found pairs shifted away checks
    that none was missed, which can happen to repeated eigenvalues, and the dense method answers if one was.

    Args:
        matrix: Blocks of one part of the Hessian.
        k: How many; None: all.
        which: ``"smallest"``: ascending, most negative first. ``"largest"``: descending. ``"magnitude"``: by
            descending absolute value.
        include_output: Include the model's output where it was not among the chosen nodes.

    Returns:
        :class:`Eigenpairs` over the chosen nodes, split by node.

    Raises:
        ValueError: ``k`` or ``which`` is out of range.
    """
    names = tabled_nodes(matrix.layout, include_output)
    dense = assemble(matrix, names)
    size = dense.shape[-1]
    if which not in _ARPACK:
        raise ValueError(f'which must be "smallest", "largest" or "magnitude", got {which!r}.')
    if k is not None and not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and {size}, the size of the matrix, got {k}.")
    values, vectors = _decompose(dense, size if k is None else k, which)
    return Eigenpairs(names, tuple(matrix.layout.sizes[name] for name in names), values, vectors)


def _decompose(dense: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor]:
    size = dense.shape[-1]
    few = size >= LANCZOS_FROM and k <= size // 20 and dense.ndim == 2 and dense.device.type == "cpu"
    found = _lanczos(dense, k, which) if few else None
    values, vectors = eigh(dense) if found is None else found
    keys = {"smallest": values, "largest": -values, "magnitude": -values.abs()}
    order = keys[which].argsort(-1)[..., :k]
    columns = order.unsqueeze(-2).expand(*order.shape[:-1], size, k)
    return values.gather(-1, order), vectors.gather(-1, columns)


_ARPACK: dict[Which, Literal["SA", "LA", "LM"]] = {"smallest": "SA", "largest": "LA", "magnitude": "LM"}


def _lanczos(dense: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor] | None:
    """``k`` eigenpairs of a matrix ``(N, N)``, or None where the iteration did not find those that were asked for."""
    matrix: Any = dense.numpy()  # the types of ARPACK's wrapper do not know that a NumPy array can come from elsewhere
    scale = float(np.abs(matrix).max())
    if scale == 0:
        return None
    random = np.random.default_rng(0)
    try:
        values, vectors = eigsh(matrix, k=k, which=_ARPACK[which], v0=random.standard_normal(len(matrix)))
        # moved past the other end of the spectrum, the found pairs cannot hide one that is missing
        radius = float(np.linalg.norm(matrix))
        shift = {"smallest": 3 * radius, "largest": -3 * radius}.get(which)
        moved = -values if shift is None else np.full(k, shift)
        remaining = matrix + (vectors * moved) @ vectors.T
        next_one = eigsh(remaining, k=1, which=_ARPACK[which], v0=random.standard_normal(len(matrix)))[0][0]
    except ArpackNoConvergence:
        return None
    rounding = len(matrix) * float(np.finfo(matrix.dtype).eps) * radius
    missed = {
        "smallest": next_one < values.max() - rounding,
        "largest": next_one > values.min() + rounding,
        "magnitude": abs(next_one) > np.abs(values).min() + rounding,
    }
    return None if missed[which] else (torch.from_numpy(values), torch.from_numpy(vectors))


@dataclass(frozen=True, eq=False)
class EscapeDirection:
    """The unit direction of most negative curvature; made by :func:`escape_direction`.

    Attributes:
        curvature: Its eigenvalue λ < 0: the loss changes by ``slope·t + ½ λ t²`` along it, to second order.
        direction: The unit eigenvector by node, each part ``(d_v,)``.
        energy: Share of each node, ‖part‖²; adds up to 1.
        slope: gᵀv ≤ 0 for the gradient that was given; None without one.
    """

    curvature: float
    direction: dict[str, Tensor]
    energy: dict[str, float]
    slope: float | None


def escape_direction(
    blocks: HessianBlocks, gradient: Mapping[str, Tensor] | None = None, *, include_output: bool = False
) -> EscapeDirection | None:
    """The unit eigenvector v of the most negative eigenvalue of the batch-mean Hessian, split by node.

    An eigenvector has no sign of its own. With the gradient g it is chosen by −sign(gᵀv), so that first and second
    order agree that the loss falls along v; without (or with gᵀv = 0) its largest entry is positive.

    Args:
        blocks: Blocks of :func:`diagnostics.hessian_blocks`, averaged over the batch here if they are not yet.
        gradient: g by node, ``(d_v,)`` (any shape of d_v entries), of the same batch mean: for every node that the
            direction has, others are not read.
        include_output: Include the model's output where it was not among the chosen nodes.

    Returns:
        The :class:`EscapeDirection`, or None where no eigenvalue is negative beyond rounding (√N · eps · ‖H‖_F).

    Raises:
        KeyError: ``gradient`` lacks a node.
        ValueError: A part of the gradient has a wrong number of entries.
    """
    total = blocks.mean().total
    names = tabled_nodes(total.layout, include_output)
    dense = assemble(total, names)
    values, vectors = _decompose(dense, 1, "smallest")
    if values[0] >= -negligible(dense):
        return None
    sizes = [total.layout.sizes[name] for name in names]
    vector = vectors[:, 0]
    slope = 0.0 if gradient is None else torch.dot(_flat(gradient, names, sizes).to(vector), vector).item()
    turn = -slope if slope != 0 else vector[vector.abs().argmax()].item()
    vector = vector if turn >= 0 else -vector
    parts = dict(zip(names, vector.split(sizes), strict=True))
    energy = {name: part.square().sum().item() for name, part in parts.items()}
    return EscapeDirection(values[0].item(), parts, energy, None if gradient is None else -abs(slope))


def _flat(gradient: Mapping[str, Tensor], names: Sequence[str], sizes: Sequence[int]) -> Tensor:
    parts = []
    for name, size in zip(names, sizes, strict=True):
        if name not in gradient:
            raise KeyError(f"the gradient has no part for node {name!r}; it has {', '.join(map(repr, gradient))}")
        if gradient[name].numel() != size:
            raise ValueError(
                f"the gradient at node {name!r} has shape {tuple(gradient[name].shape)}, but the node has {size} "
                "entries: the direction is shared by all samples, so sum the gradient over the batch."
            )
        parts.append(gradient[name].reshape(-1))
    return torch.cat(parts)
