"""How much one step through the network can amplify: ρ, s, sums over paths of products of norms, and what follows."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

from diagnostics.blocks.factored import TotalJacobians
from diagnostics.blocks.layout import Layout
from diagnostics.graph.graph import Graph
from diagnostics.graph.local import LOSS, local_derivatives


@dataclass(frozen=True, eq=False, repr=False)
class LocalGains:
    """Spectral norms of the local Jacobians and the numbers that bounds are made of; made by :func:`local_gains`.

    Attributes:
        edges: The edges ``(parent, child)``, E of them.
        norms: ‖D[child, parent]‖₂ per sample and edge, ``(S, E)``.
        rho: ρ, the largest of them. Bounds need this one.
        rho_mean: The largest batch mean ``max_edges (1/S) Σ_b ‖D_b‖₂``: the ρ of the paper's tables. Products of means
            do not bound means of products, so bounds with it can fail.
        children: s = ``max |Ch(v)|``, the loss not counted.
        branch: ``max_{v,b} Σ_{u∈Ch(v)} ‖D_b[u,v]‖₂ ≤ sρ``: what the norms of all steps out of one node add up to.
    """

    edges: tuple[tuple[str, str], ...]
    norms: Tensor
    rho: float
    rho_mean: float
    children: int
    branch: float

    @property
    def margin(self) -> float:
        """1 − sρ. Positive: geometric stability (cf. Cor. 73).

        Then ``‖J[p←v]‖₂ ≤ (sρ)^d / (1 − sρ)`` for p at directed distance d from v, at any depth of the network: at
        most s^L paths of length L leave v, and each multiplies at most by ρ^L. A sufficient condition only.
        """
        return 1 - self.children * self.rho

    @property
    def sharp_margin(self) -> float:
        """1 − branch ≥ ``margin``: the same conclusion with branch for sρ.

        The products of norms along all paths of length L out of v add up to at most branch^L, by induction on L.
        """
        return 1 - self.branch

    @property
    def stable(self) -> bool:
        """Whether sρ < 1."""
        return self.margin > 0

    def __str__(self) -> str:
        verdict = "decays geometrically" if self.stable else "not guaranteed to decay"
        return (
            f"rho = {self.rho:.4g} (of batch means {self.rho_mean:.4g}), s = {self.children}, s·rho = "
            f"{self.children * self.rho:.4g}, largest sum over children {self.branch:.4g}: {verdict}, "
            f"margin {self.margin:.3g} (sharp {self.sharp_margin:.3g})"
        )

    __repr__ = __str__


def local_gains(graph: Graph) -> LocalGains:
    """ρ = max ‖D[u,v]‖₂ over edges and samples, ``s = max |Ch(v)|``, and the stability margin 1 − sρ (cf. Cor. 73).

    An edge is one of the captured graph: what lies between two nodes is one step, so the figures depend on the choice
    of nodes. Coupled samples are one joint sample. Without edges ρ is 0.

    Args:
        graph: A captured network.
    """
    return Gains(graph).figures()


class Gains:
    """Matrices over the nodes in topological order that bounds are computed from, per sample.

    Args:
        graph: A captured network.

    Attributes:
        names: Names of the n nodes.
        steps: A, ``(S, n, n)``: ``A[u,p] = ‖D[u,p]‖₂`` for p a parent of u, else 0; strictly lower triangular.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.local = local_derivatives(graph)
        self.layout = Layout.of(graph)
        self.names = self.layout.names
        n = len(self.names)
        self.steps = self.layout.like.new_zeros(self.layout.samples, n, n)
        at = self.layout.position
        for u, parents in self.local.jacobians.items():
            for p, jacobian in parents.items():
                self.steps[:, at[u], at[p]] = torch.linalg.matrix_norm(jacobian, 2)

    def figures(self) -> LocalGains:
        """ρ, s and what follows from them."""
        edges = tuple((p, node.name) for node in self.graph.nodes for p in node.parents)
        children = max(len(node.children) for node in self.graph.nodes)
        if not edges:
            return LocalGains(edges, self.steps.new_zeros(len(self.steps), 0), 0.0, 0.0, children, 0.0)
        at = self.layout.position
        norms = torch.stack([self.steps[:, at[u], at[p]] for p, u in edges], dim=1)
        return LocalGains(
            edges=edges,
            norms=norms,
            rho=norms.amax().item(),
            rho_mean=norms.mean(0).amax().item(),
            children=children,
            branch=self.steps.sum(1).amax().item(),
        )

    @property
    def adjacency(self) -> Tensor:
        """1 where ``u`` has the parent ``p``, ``(n, n)``."""
        edges = torch.zeros_like(self.steps[0])
        for node in self.graph.nodes:
            for p in node.parents:
                edges[self.layout.position[node.name], self.layout.position[p]] = 1
        return edges

    def jacobian_norms(self) -> Tensor:
        """‖J[p←v]‖₂ at ``[:, p, v]``, ``(S, n, n)``; 1 on the diagonal."""
        rows = TotalJacobians(self.graph, self.layout, self.local.jacobians).rows
        norms = torch.eye(len(self.names), dtype=self.steps.dtype, device=self.steps.device).repeat(
            self.layout.samples, 1, 1
        )
        for p, v in self.downstream():
            block = rows[p][:, :, self.layout.columns(v)]
            norms[:, self.layout.position[p], self.layout.position[v]] = torch.linalg.matrix_norm(block, 2)
        return norms

    def downstream(self) -> list[tuple[str, str]]:
        """The pairs ``(p, v)`` with p strictly downstream of v."""
        network = self.graph.to_networkx()
        return [(p, v) for v in self.names for p in nx.descendants(network, v)]

    def curvature_norms(self, part: str, order: float | str = "fro") -> Tensor:
        """κ = Σ_u ‖K_u[p,q]‖ at ``[:, p, q]``, ``(S, n, n)``, symmetric; the loss is the u of part ``"gn"``."""
        if part not in ("total", "gn", "tensor"):
            raise ValueError(f'part must be "total", "gn" or "tensor", got {part!r}.')
        kappa = torch.zeros_like(self.steps)
        for u, curvature in self.local.curvatures.items():
            if part == "total" or (part == "gn") == (u == LOSS):
                for (p, q), block in curvature.items():
                    i, j = self.layout.position[p], self.layout.position[q]
                    norm = torch.linalg.matrix_norm(block, order)
                    kappa[:, i, j] += norm
                    if i != j:
                        kappa[:, j, i] += norm
        return kappa

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Shortest and longest directed path lengths from v to p at ``[p, v]``; −1 where there is no path."""
        n = len(self.names)
        shortest = torch.full((n, n), -1, dtype=torch.long)
        longest = torch.full((n, n), -1, dtype=torch.long)
        at = self.layout.position
        for node in self.graph.nodes:  # parents come first
            u = at[node.name]
            shortest[u, u] = longest[u, u] = 0
            for v in range(u):
                through = [at[p] for p in node.parents if shortest[at[p], v] >= 0]
                if through:
                    shortest[u, v] = 1 + min(int(shortest[p, v]) for p in through)
                    longest[u, v] = 1 + max(int(longest[p, v]) for p in through)
        return shortest, longest


def sum_over_paths(steps: Tensor) -> Tensor:
    """``(I − A)⁻¹ = Σ_L A^L`` for strictly lower triangular A ≥ 0, ``(…, n, n)``: products along paths, summed.

    With A the norms ‖D[u,p]‖₂ it bounds ‖J[p←v]‖₂ (triangle inequality over paths, submultiplicativity along each);
    with the adjacency matrix it counts paths. Forward substitution adds non-negative numbers only: no cancellation.
    """
    identity = torch.eye(steps.shape[-1], dtype=steps.dtype, device=steps.device).expand_as(steps)
    sums: Tensor = torch.linalg.solve_triangular(identity - steps, identity, upper=False, unitriangular=True)
    return sums
