"""The Gauss-Newton part of all pairs of nodes from exact Jacobians of the model's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from diagnostics.matrix_free.injections import Injections
from diagnostics.matrix_free.node_products import NodeProducts


class OutputJacobians:
    """``G[v,w] = Σ_b J_b[z←v]ᵀ K_b J_b[z←w]`` as factors: one pass for each entry of a sample's output, once.

    With them products by G are matrix products, and the norms of all its blocks are exact. Only for independent
    samples.

    Args:
        products: Products on the network's tape.
        injections: Batch means or single samples.
        names: Nodes.
    """

    def __init__(self, products: NodeProducts, injections: Injections, names: Sequence[str]) -> None:
        graph = products.graph
        ends = [graph[name] for name in graph.loss_parents]
        sizes = [graph.size(end) for end in ends]
        one_hot = torch.eye(sum(sizes), dtype=graph.loss.dtype, device=graph.loss.device).split(sizes, 1)
        # one cotangent seeds the same entry of every sample: samples do not mix
        seeds = {
            end.name: repeat(part, "k d -> k b d", b=graph.batch_size).reshape(-1, *end.shape)
            for end, part in zip(ends, one_hot, strict=True)
        }
        rows = [row.reshape(len(row), graph.batch_size, -1) for row in products.loss_curvature(seeds).values()]
        self._curvature = rearrange(torch.cat(rows, 2), "k b c -> b c k") * injections.scale
        self._mean = injections.samples == 1
        self._jacobians = {
            name: rearrange(row.reshape(len(row), graph.batch_size, -1), "k b d -> b d k")
            for name, row in products.carried_back(seeds, names).items()
        }

    def multiply(self, w: str, vectors: Tensor) -> dict[str, Tensor]:
        """``G[v,w] X`` for all nodes v, ``(S, d_w, k) -> (S, d_v, k)``."""
        moved = self._curvature @ (self._jacobians[w].mT @ vectors)  # (B, C, k); shared vectors are broadcast
        if not self._mean:
            return {v: jacobian @ moved for v, jacobian in self._jacobians.items()}
        stacked = rearrange(moved, "b c k -> (b c) k")
        return {
            v: (rearrange(jacobian, "b d c -> d (b c)") @ stacked).unsqueeze(0)
            for v, jacobian in self._jacobians.items()
        }

    def square_norms(self) -> Tensor:
        """``‖G[v,w]‖_F²``, ``(n, n, S)``, exact."""
        if self._mean:
            curvature = torch.block_diag(*self._curvature).unsqueeze(0)
            stacked = [rearrange(jacobian, "b d c -> 1 d (b c)") for jacobian in self._jacobians.values()]
        else:
            curvature, stacked = self._curvature, list(self._jacobians.values())
        grams = [jacobian.mT @ jacobian for jacobian in stacked]
        turned = [curvature @ gram @ curvature for gram in grams]
        return torch.stack([torch.stack([(m * t).sum((1, 2)) for t in turned]) for m in grams]).clamp(min=0)
