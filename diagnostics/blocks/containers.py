"""Containers of Hessian blocks, addressed by pairs of nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from einops import reduce
from torch import Tensor

from diagnostics.blocks.layout import Layout


class BlockMatrix(Mapping[tuple[str, str], Tensor], ABC):
    """A symmetric matrix of blocks, addressed by pairs of node names: ``matrix[v, w]`` is ``(S, d_v, d_w)``.

    Every ordered pair has a block, zeros where nothing connects the two; ``matrix[w, v]`` is the transpose of
    ``matrix[v, w]``. Batch means (``blocks.mean()``) have blocks ``(d_v, d_w)``. Blocks of single samples are kept as
    factors and multiplied when asked for, anew each time.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes, in topological order."""
        return self.layout.names

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        """The block of a pair of nodes, in either order."""
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise KeyError(f'blocks are addressed by two node names, as in blocks.total["a", "b"]; got {pair!r}')
        for name in pair:
            if name not in self.layout.offsets:
                known = ", ".join(map(repr, self.nodes))
                raise KeyError(f"no blocks for node {name!r}; there are blocks for {known}")
        v, w = pair
        if self.layout.position[v] >= self.layout.position[w]:
            return self._block(v, w)
        return self._block(w, v).mT

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((v, w) for v in self.nodes for w in self.nodes)

    def __len__(self) -> int:
        return len(self.nodes) ** 2

    def assemble(self) -> Tensor:
        """The whole matrix, ``(S, N, N)`` with N = Σ d (batch means: ``(N, N)``), nodes in topological order."""
        return torch.cat([torch.cat([self[v, w] for w in self.nodes], dim=-1) for v in self.nodes], dim=-2)

    def mean(self) -> MeanBlocks:
        """Batch means, ``(d_v, d_w)``: the Hessian of ``(1/B) Σ_b ℓ_b`` for an injection that all samples share."""
        layout = self.layout
        rows = self._joint_sums() if layout.coupled else self.sample_sums()
        if layout.reduction == "sum":
            rows = {v: row / layout.batch_size for v, row in rows.items()}
        return MeanBlocks(layout.mean(), rows)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {self.layout.sizes[name]}" for name in self.nodes)
        return f"{type(self).__name__} of {len(self.nodes)} nodes ({sizes}), {self.layout.samples} samples"

    @abstractmethod
    def _block(self, v: str, w: str) -> Tensor:
        """The block of ``v`` and ``w``, which is not after ``v``."""

    @abstractmethod
    def sample_sums(self) -> dict[str, Tensor]:
        """For each node v the blocks with the nodes not after it, side by side, summed over independent samples."""

    def _joint_sums(self) -> dict[str, Tensor]:
        """The same for coupled samples: summed over both samples of each pair."""
        batch = self.layout.batch
        return {
            v: torch.cat(
                [
                    reduce(self._block(v, w), "1 (b v) (c w) -> v w", "sum", b=batch[v], c=batch[w])
                    for w in self.layout.up_to(v)
                ],
                dim=1,
            )
            for v in self.nodes
        }


class SumBlocks(BlockMatrix):
    """The sum of two matrices of blocks."""

    def __init__(self, first: BlockMatrix, second: BlockMatrix) -> None:
        super().__init__(first.layout)
        self._parts = first, second

    def _block(self, v: str, w: str) -> Tensor:
        first, second = self._parts
        return first[v, w] + second[v, w]

    def mean(self) -> MeanBlocks:
        """The sum of the parts' batch means."""
        first, second = (part.mean() for part in self._parts)
        return MeanBlocks(first.layout, {v: row + second.rows[v] for v, row in first.rows.items()})

    def sample_sums(self) -> dict[str, Tensor]:
        """Sums over independent samples."""
        first, second = (part.sample_sums() for part in self._parts)
        return {v: row + second[v] for v, row in first.items()}


class MeanBlocks(BlockMatrix):
    """Batch means of blocks, ``(d_v, d_w)``.

    Args:
        layout: Where the blocks lie.
        rows: For each node v its blocks with the nodes not after it, side by side.
    """

    def __init__(self, layout: Layout, rows: Mapping[str, Tensor]) -> None:
        super().__init__(layout)
        self.rows = rows

    def _block(self, v: str, w: str) -> Tensor:
        return self.rows[v][:, self.layout.columns(w)]

    def mean(self) -> MeanBlocks:
        """Itself."""
        return self

    def sample_sums(self) -> dict[str, Tensor]:
        """Sums over independent samples."""
        return dict(self.rows)


class HessianBlocks:
    """Inter-layer Hessian blocks H = H^GN + H^T of a captured network; made by :func:`diagnostics.hessian_blocks`.

    A block is of exactly the loss that was given: per-sample blocks of a mean loss carry its 1/B.

    Attributes:
        total: The Hessian H.
        gn: Gauss-Newton part: the curvature of the loss, carried back by Jacobians. Positive semidefinite for a loss
            that is convex in the model's output.
        tensor: Tensor part: the curvature of the network's own nonlinearities, weighted by back-propagated signals.
        tensor_by_source: The tensor part by the node that causes it, ``tensor_by_source[node][v, w]``; the shares add
            up to ``tensor``. Only with ``hessian_blocks(..., by_source=True)``.
    """

    def __init__(
        self,
        gn: BlockMatrix,
        tensor: BlockMatrix,
        sources: Mapping[str, BlockMatrix] | None = None,
    ) -> None:
        self.total: BlockMatrix = SumBlocks(gn, tensor)
        self.gn = gn
        self.tensor = tensor
        self._sources = sources

    @property
    def layout(self) -> Layout:
        """Where the blocks lie."""
        return self.total.layout

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that have blocks, in topological order."""
        return self.layout.names

    @property
    def tensor_by_source(self) -> Mapping[str, BlockMatrix]:
        """The tensor part by the node that causes it."""
        if self._sources is None:
            raise AttributeError("the tensor part was not split: call hessian_blocks(graph, by_source=True)")
        return self._sources

    def mean(self) -> HessianBlocks:
        """The same container with batch means, ``(d_v, d_w)``: the paper's H_avg = (1/B) Σ_b ∂²ℓ_b.

        For a mean loss the sum of the per-sample blocks, for a sum loss that sum divided by B; for coupled samples
        also summed over the pairs of samples.
        """
        sources = None if self._sources is None else {name: share.mean() for name, share in self._sources.items()}
        return HessianBlocks(self.gn.mean(), self.tensor.mean(), sources)

    def __repr__(self) -> str:
        return f"HessianBlocks(total = gn + tensor, each a {self.total!r})"
