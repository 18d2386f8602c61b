"""Flat vectors at nodes as tangents of all samples, and responses of all samples as flat vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph


class Injections:
    """What the columns of a block are: one injection for all samples (batch means), or one for each of them.

    For batch means, an injection at a node is shared by all samples and the response is summed over them, coupled or
    not; for a summed loss, divided by B. For single samples, each has its own, of its own loss ``ℓ_b``.

    Args:
        graph: A captured network.
        per_sample: Single samples instead of batch means.

    Attributes:
        samples: S, 1 for batch means.
        scale: Factor between responses to the loss as it was given and blocks.

    Raises:
        DiagnosticsError: ``per_sample=True`` with coupled samples.
    """

    def __init__(self, graph: Graph, per_sample: bool = False) -> None:
        if per_sample and graph.coupled:
            raise DiagnosticsError(
                "per-sample metrics need the blocks of single samples, but the samples of this batch are coupled. Use "
                "batch means (per_sample=False), or call model.eval() before the capture."
            )
        self.graph = graph
        self.samples = graph.batch_size if per_sample else 1
        mean = graph.reduction == "mean"
        self.scale = (graph.batch_size if mean else 1.0) if per_sample else (1.0 if mean else 1 / graph.batch_size)

    def size(self, name: str) -> int:
        """Entries d of a block's rows at the node."""
        node = self.graph[name]
        return node.value.numel() // (self.graph.batch_size if self.graph.is_batched(node) else 1)

    def signs(self, name: str, generator: torch.Generator) -> Tensor:
        """A Rademacher probe at the node, the same for all samples, ``(1, d, 1)``."""
        value = self.graph[name].value
        signs = torch.empty(1, self.size(name), 1, dtype=value.dtype)
        return signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(value.device)

    def spread(self, name: str, vectors: Tensor) -> Tensor:
        """Tangents ``(k, *shape)`` of the node for vectors ``(S, d, k)``."""
        shape = self.graph[name].shape
        columns = vectors.permute(2, 0, 1)
        if not self.graph.is_batched(self.graph[name]):
            return columns.reshape(-1, *shape)
        return columns.reshape(-1, self.samples, *shape[1:]).expand(-1, *shape)

    def gather(self, name: str, responses: Tensor) -> Tensor:
        """Vectors ``(S, d, k)`` for responses ``(k, *shape)`` at the node, scaled."""
        k = len(responses)
        if self.samples == 1 and self.graph.is_batched(self.graph[name]):
            responses = responses.sum(1)
        return responses.reshape(k, self.samples, -1).permute(1, 2, 0) * self.scale
