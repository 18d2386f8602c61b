"""Where the block of each pair of nodes lies in a matrix of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from diagnostics.graph.graph import Graph


@dataclass(frozen=True)
class Layout:
    """Where the block of each pair of nodes lies.

    Attributes:
        names: Nodes that have blocks, in topological order.
        position: Position of every node of the graph in topological order.
        sizes: Entries d of every node of the graph in one sample.
        offsets: First column of each node that has blocks.
        samples: Number S of independent samples.
        batch: Samples that each node's d entries hold, itself first: 1 unless the samples are coupled.
        reduction: How the loss reduces over the batch.
        batch_size: Size of the batch.
        chosen: The nodes that tables range over.
        outputs: The nodes that hold the model's output.
        distances: Shortest undirected path lengths between the nodes ``names``, ``(n, n)``.
        like: A tensor with the dtype and device of the blocks.
    """

    names: tuple[str, ...]
    position: Mapping[str, int]
    sizes: Mapping[str, int]
    offsets: Mapping[str, int]
    samples: int
    batch: Mapping[str, int]
    reduction: str
    batch_size: int
    chosen: tuple[str, ...]
    outputs: tuple[str, ...]
    distances: Tensor
    like: Tensor

    @staticmethod
    def of(graph: Graph, pairs: Iterable[tuple[str, str]] | None = None) -> Layout:
        """Layout of the blocks between all nodes of ``graph``, or between the nodes that ``pairs`` name."""
        wanted = None if pairs is None else {graph[name].name for pair in pairs for name in pair}
        names = tuple(node.name for node in graph.nodes if wanted is None or node.name in wanted)
        sizes = {node.name: graph.size(node) for node in graph.nodes}
        offsets = _offsets(names, sizes)
        index = torch.tensor([i for i, node in enumerate(graph.nodes) if node.name in offsets], dtype=torch.long)
        return Layout(
            names=names,
            position={node.name: i for i, node in enumerate(graph.nodes)},
            sizes=sizes,
            offsets=offsets,
            samples=graph.samples,
            batch={n.name: graph.batch_size if graph.coupled and graph.is_batched(n) else 1 for n in graph.nodes},
            reduction=graph.reduction,
            batch_size=graph.batch_size,
            chosen=tuple(name for name in graph.chosen if name in offsets),
            outputs=tuple(name for name in graph.outputs if name in offsets),
            distances=graph.distances[index][:, index],
            like=graph.loss.detach().new_empty(0, dtype=graph.dtype),
        )

    def columns(self, name: str) -> slice:
        """Columns of node ``name`` in a row of blocks."""
        start = self.offsets[name]
        return slice(start, start + self.sizes[name])

    def rows(self, names: Iterable[str]) -> dict[str, slice]:
        """Rows of each of these nodes, which need not have blocks, where they are stacked in this order."""
        names = tuple(names)
        return {name: slice(start, start + self.sizes[name]) for name, start in _offsets(names, self.sizes).items()}

    def stacked(self, names: Iterable[str], curvature: Mapping[tuple[str, str], Tensor]) -> Tensor:
        """A local curvature, K[p, q] for p not before q, as one symmetric matrix over ``names``, ``(S, k, k)``."""
        rows = self.rows(names)
        size = sum(self.sizes[name] for name in rows)
        whole = self.like.new_zeros(self.samples, size, size)
        for (p, q), block in curvature.items():
            whole[:, rows[p], rows[q]] = block
            whole[:, rows[q], rows[p]] = block.mT
        return whole

    def width(self, name: str) -> int:
        """Number of columns of the nodes that are not after node ``name``."""
        return sum(self.sizes[w] for w in self.up_to(name))

    def before(self, name: str) -> int:
        """Number of columns of the nodes that are before node ``name``."""
        return self.width(name) - (self.sizes[name] if name in self.offsets else 0)

    def up_to(self, name: str) -> list[str]:
        """The nodes that have blocks and are not after node ``name``, which may have none."""
        return [w for w in self.names if self.position[w] <= self.position[name]]

    @property
    def coupled(self) -> bool:
        """Whether the batch is one joint sample."""
        return self.samples < self.batch_size

    def zeros(self, v: str, w: str) -> Tensor:
        """A zero block, ``(S, d_v, d_w)``."""
        return self.like.new_zeros(self.samples, self.sizes[v], self.sizes[w])

    def mean(self) -> Layout:
        """The layout of batch means: one sample, and the sizes of one sample."""
        sizes = {name: size // self.batch[name] for name, size in self.sizes.items()}
        offsets = _offsets(self.names, sizes)
        return replace(self, sizes=sizes, offsets=offsets, samples=1, batch=dict.fromkeys(sizes, 1))


def _offsets(names: Iterable[str], sizes: Mapping[str, int]) -> dict[str, int]:
    names = tuple(names)
    starts = accumulate((sizes[name] for name in names), initial=0)
    return dict(zip(names, starts, strict=False))
