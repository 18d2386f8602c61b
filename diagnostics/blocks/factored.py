"""Blocks of single samples as factors: multiplied when asked for, summed over samples without being formed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from diagnostics.blocks.containers import BlockMatrix
from diagnostics.blocks.layout import Layout
from diagnostics.graph.graph import Graph


class TotalJacobians:
    """J[u←w] for every node u and every node w with blocks that is before u, side by side: ``(S, d_u, < N)``.

    J[u←u] = I is left out and never multiplied.

    Args:
        graph: The network.
        layout: Which nodes have columns, and where.
        jacobians: Local Jacobians ``jacobians[u][p]``, ``(S, d_u, d_p)``.
    """

    def __init__(self, graph: Graph, layout: Layout, jacobians: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._layout = layout
        self._jacobians = jacobians
        self._nodes = [node.name for node in graph.nodes]
        self._last_use = {p: node.name for node in graph.nodes for p in node.parents}

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """All rows, kept."""
        rows: dict[str, Tensor] = {}
        for u in self._nodes:
            rows[u] = self._row(u, rows)
        return rows

    def block(self, u: str, w: str) -> Tensor | None:
        """J[u←w], ``(S, d_u, d_w)``; None where w is after u, so that it is zero."""
        layout = self._layout
        if u == w:
            return torch.eye(layout.sizes[u], dtype=layout.like.dtype, device=layout.like.device).expand(
                layout.samples, -1, -1
            )
        if layout.position[w] > layout.position[u]:
            return None
        return self.rows[u][:, :, layout.columns(w)]

    def sweep(self, keep_until: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Go through the nodes in topological order with the rows that are still needed.

        A row is needed by the children of its node and, beyond them, until the node ``keep_until[name]``.
        """
        position = self._layout.position
        if "rows" in self.__dict__:
            yield from ((u, self.rows) for u in self._nodes)
            return
        live: dict[str, Tensor] = {}
        for u in self._nodes:
            live[u] = self._row(u, live)
            yield u, live
            for s in list(live):
                uses = [user[s] for user in (self._last_use, keep_until) if s in user]
                if all(position[use] <= position[u] for use in uses):
                    del live[s]

    def _row(self, u: str, rows: Mapping[str, Tensor]) -> Tensor:
        layout, jacobians = self._layout, self._jacobians[u]
        out = layout.like.new_empty(layout.samples, layout.sizes[u], layout.before(u))
        row = _sum_of_products(((jacobian, rows[p]) for p, jacobian in jacobians.items()), out)
        for p, jacobian in jacobians.items():
            if p in layout.offsets:  # D[u,p] J[p←p]
                row[:, :, layout.columns(p)] += jacobian
        return row


class CongruentBlocks(BlockMatrix):
    """Blocks F_vᵀ K F_w: one node's local curvature K, seen from every node through F.

    Args:
        layout: Where the blocks lie.
        factors: F_v, ``(S, k, d_v)``; absent for a node that does not reach the curvature.
        curvature: K, ``(S, k, k)``, symmetric.
    """

    def __init__(self, layout: Layout, factors: Mapping[str, Tensor], curvature: Tensor) -> None:
        super().__init__(layout)
        self._factors = factors
        self._curvature = curvature

    def _block(self, v: str, w: str) -> Tensor:
        if v in self._factors and w in self._factors:
            return self._factors[v].mT @ (self._curvature @ self._factors[w])
        return self.layout.zeros(v, w)

    def sample_sums(self) -> dict[str, Tensor]:
        """Sums over independent samples."""
        layout = self.layout
        left = torch.cat(
            [self._factors[v] if v in self._factors else self._zero_factor(v) for v in layout.names], dim=2
        )
        right = rearrange(self._curvature @ left, "s k w -> (s k) w")
        left = rearrange(left, "s k v -> v (s k)")
        return {v: left[layout.columns(v)] @ right[:, : layout.width(v)] for v in layout.names}

    def _zero_factor(self, v: str) -> Tensor:
        return self._curvature.new_zeros(self.layout.samples, self._curvature.shape[1], self.layout.sizes[v])


class FrontBlocks(BlockMatrix):
    """Blocks Σ_s Φ_v[v,s] J[s←w], w not after v: the fronts of an elimination (docs/recursion.md).

    Args:
        layout: Where the blocks lie.
        fronts: ``fronts[v][s]`` = Φ_v[v,s], ``(S, d_v, d_s)``, nodes s not after v; absent where zero.
        jacobians: The total Jacobians J.
    """

    def __init__(self, layout: Layout, fronts: Mapping[str, Mapping[str, Tensor]], jacobians: TotalJacobians) -> None:
        super().__init__(layout)
        self._fronts = fronts
        self._jacobians = jacobians

    def _block(self, v: str, w: str) -> Tensor:
        columns = self.layout.columns(w)
        block: Tensor | None = None  # memory of its own from the first product on
        own: Tensor | None = None
        for s, front in self._fronts[v].items():
            if s == w:
                own = front
            elif columns.stop <= self.layout.before(s):
                jacobian = self._jacobians.rows[s][:, :, columns]
                block = front @ jacobian if block is None else block.baddbmm_(front, jacobian)
        if block is None:
            return self.layout.zeros(v, w) if own is None else own.clone()
        return block if own is None else block.add_(own)

    def sample_sums(self) -> dict[str, Tensor]:
        """Sums over independent samples."""
        layout = self.layout
        rows = {v: layout.like.new_zeros(layout.sizes[v], layout.width(v)) for v in layout.names}
        last = {s: v for v in layout.names for s in self._fronts[v]}
        if not last:
            return rows
        for v, jacobians in self._jacobians.sweep(keep_until=last):
            for s, front in self._fronts[v].items() if v in layout.offsets else ():
                jacobian = rearrange(jacobians[s], "s k w -> (s k) w")
                rows[v][:, : jacobian.shape[1]].addmm_(rearrange(front, "s v k -> v (s k)"), jacobian)
                if s in layout.offsets:
                    rows[v][:, layout.columns(s)] += front.sum(0)
        return rows


def _sum_of_products(products: Iterable[tuple[Tensor, Tensor]], out: Tensor) -> Tensor:
    """``out = Σ left @ right``, each ``right`` padded with zero columns on the right; the widest goes first."""
    filled = 0
    for left, right in sorted(products, key=lambda product: -product[1].shape[2]):
        columns = right.shape[2]
        out[:, :, :columns].baddbmm_(left, right, beta=1 if filled else 0)
        filled = max(filled, columns)
    out[:, :, filled:] = 0
    return out
