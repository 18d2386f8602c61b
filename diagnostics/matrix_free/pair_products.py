"""Products of all blocks of a node's column with the same vectors, and what they say about the blocks' norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diagnostics.graph.graph import Graph
from diagnostics.matrix_free.injections import Injections
from diagnostics.matrix_free.node_products import NodeProducts
from diagnostics.matrix_free.output_jacobians import OutputJacobians
from diagnostics.ranks.collectives import Ranks


@dataclass(frozen=True, eq=False)
class Responses:
    """Vectors at one node and the responses to them at all nodes.

    Attributes:
        vectors: ``(S, d_w, k)``.
        gn: ``G[v,w] X`` by node v, ``(S, d_v, k)``.
        tensor: ``T[v,w] X`` by node v.
    """

    vectors: Tensor
    gn: dict[str, Tensor]
    tensor: dict[str, Tensor]

    def total(self, v: str) -> Tensor:
        """``H[v,w] X``, ``(S, d_v, k)``."""
        return self.gn[v] + self.tensor[v]


class Pairs(Protocol):
    """A symmetric matrix ``H = G + T`` of blocks H[v,w], known by products with vectors at one w for all v at once.

    Attributes:
        names: What the blocks are between: nodes, or groups of parameters.
        samples: S, the number of such matrices.
        like: A tensor of the dtype and on the device of all vectors.
    """

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def samples(self) -> int: ...  # noqa: D102

    @property
    def like(self) -> Tensor: ...  # noqa: D102

    def size(self, name: str) -> int:
        """Entries d of a vector there."""

    def respond(self, w: str, vectors: Tensor) -> Responses:
        """G and T times vectors ``(S, d_w, k)`` at w; k may be 0."""

    def total(self, w: str, vectors: Tensor) -> dict[str, Tensor]:
        """``H[v,w] X`` for all v, ``(S, d_w, k) -> (S, d_v, k)``."""


@dataclass(frozen=True)
class Share:
    """What the graph of this process counts in means over several.

    Attributes:
        ranks: The processes, all of which ask for the same products.
        weight: The number of its samples; 0 for those that stand in where there are none.
    """

    ranks: Ranks
    weight: float


class PairProducts:
    """Products with vectors at a node, for all nodes at once.

    The tensor part and the output's tangent come from one product. Where the output Jacobians of all samples are
    known, the Gauss-Newton part is a matrix product; otherwise the tangents of the output, times the loss's curvature,
    are carried back in one more pass.

    Args:
        graph: A captured network.
        names: Nodes.
        injections: Batch means or single samples.
        factors: Output Jacobians, if they pay.
        memory_limit: Bytes that the tangents multiplied at one time may take, by plan.
        share: Where other processes have graphs of other samples: responses are then means over them.
    """

    def __init__(
        self,
        graph: Graph,
        names: Sequence[str],
        injections: Injections,
        factors: OutputJacobians | None,
        memory_limit: int,
        share: Share | None = None,
    ) -> None:
        self._share = share
        self.names = tuple(names)
        self.injections = injections
        self._products = NodeProducts.of(graph)
        self._factors = factors
        self._chunk = self._products.columns_in(memory_limit)
        self.samples = injections.samples
        self.like = injections.graph.loss.detach()

    def size(self, name: str) -> int:
        """Entries d of a block's rows at the node."""
        return self.injections.size(name)

    def respond(self, w: str, vectors: Tensor) -> Responses:
        """G and T times vectors ``(S, d_w, k)`` at node w; k may be 0."""
        if vectors.shape[2] == 0:
            nothing = {v: vectors.new_empty(len(vectors), self.injections.size(v), 0) for v in self.names}
            return Responses(vectors, nothing, nothing)
        tensor, gn = self._in_chunks(vectors, lambda part: self._both(w, part))
        return Responses(vectors, self._factors.multiply(w, vectors) if self._factors is not None else gn, tensor)

    def total(self, w: str, vectors: Tensor) -> dict[str, Tensor]:
        """``H[v,w] X`` for all nodes v, ``(S, d_w, k) -> (S, d_v, k)``."""
        if self._factors is not None:
            responses = self.respond(w, vectors)
            return {v: responses.total(v) for v in self.names}
        (total,) = self._in_chunks(
            vectors,
            lambda part: (self._gathered(self._products.total({w: self.injections.spread(w, part)}, self.names)),),
        )
        return total

    def _both(self, w: str, vectors: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tensor, moved = self._products.tensor({w: self.injections.spread(w, vectors)}, self.names)
        if self._factors is not None:
            return self._gathered(tensor), {}
        back = self._products.carried_back(self._products.loss_curvature(moved), self.names)
        return self._gathered(tensor), self._gathered(back)

    def _gathered(self, responses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {v: self.injections.gather(v, response) for v, response in responses.items()}

    def _in_chunks(
        self, vectors: Tensor, multiply: Callable[[Tensor], tuple[dict[str, Tensor], ...]]
    ) -> tuple[dict[str, Tensor], ...]:
        pieces = [multiply(part) for part in vectors.split(self._chunk, 2)]
        columns = zip(*pieces, strict=True)
        found = tuple({v: torch.cat([piece[v] for piece in column], 2) for v in column[0]} for column in columns)
        if self._share is not None:
            self._share.ranks.mean_([t for own in found for t in own.values()], self._share.weight)
        return found
