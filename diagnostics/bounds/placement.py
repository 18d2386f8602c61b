"""Where to place skip connections: edges that bring all nodes closer to each other, for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from diagnostics.bounds.paths import AnyGraph
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph, shortest_paths

Distances: TypeAlias = NDArray[np.float64]
_Score: TypeAlias = tuple[int, float, float]


@dataclass(frozen=True)
class SkipPlacement:
    """Recommended skip connections; made by :func:`recommend_skips`.

    Attributes:
        edges: The new edges ``(from, to)``, in order of choice (of the nodes, if the search was exhaustive).
        diameter: Largest undirected distance between two nodes with them; infinite if some stay unconnected.
        diameter_before: Without them.
        mean_distance: Mean over all pairs of different nodes with them.
        mean_distance_before: Without them.
        exhaustive: True: no other choice of as many edges scores better. False: greedy, one edge after the other.
    """

    edges: tuple[tuple[str, str], ...]
    diameter: float
    diameter_before: float
    mean_distance: float
    mean_distance_before: float
    exhaustive: bool

    def decay(self, ratio: float, constant: float = 1.0) -> tuple[float, float]:
        """``constant · ratio^diameter`` before and after: the a-priori model of the weakest interaction.

        Args:
            ratio: sρ or e^{λ₁} (see :func:`diagnostics.bounds.interaction.a_priori_radius`).
            constant: C.
        """
        return constant * ratio**self.diameter_before, constant * ratio**self.diameter


def recommend_skips(
    graph: AnyGraph,
    budget: int,
    *,
    allowed: Callable[[str, str], bool] | None = None,
    exhaustive_limit: int = 20_000,
) -> SkipPlacement:
    """Recommend at most ``budget`` new edges that minimise the largest distance between nodes (cf. Prop. 75).

    The rule: fewest unconnected pairs, then least diameter, then least mean distance, undirected. Under the a-priori
    model of interaction, C r^dist with r < 1, a smaller diameter is a stronger weakest interaction, whatever C and r
    are, so they need not be known. (Each edge also raises the number of children, so sρ itself: measure afterwards.)

    All choices are tried if there are at most ``exhaustive_limit``, otherwise the best edge is added ``budget`` times.
    The greedy result can be worse: it breaks ties of the diameter by the mean distance, edge by edge. A new edge (a, b)
    gives distances ``min(d(v,w), d(v,a) + 1 + d(b,w), d(v,b) + 1 + d(a,w))`` exactly, as a shortest path uses it at
    most once. No edge lengthens a path; one that improves nothing is not recommended by the greedy search.

    Args:
        graph: A captured network, or a DAG of networkx with edges from parent to child.
        budget: Most edges to add.
        allowed: ``allowed(a, b) -> bool`` for a before b in topological order: False excludes the edge, for example
            because the widths differ. None: all that do not exist yet.
        exhaustive_limit: Most choices to try.
    """
    if budget < 0:
        raise ValueError(f"budget must be at least 0, got {budget}.")
    network, names = _ordered(graph)
    candidates = [
        (i, j)
        for i, j in combinations(range(len(names)), 2)
        if not network.has_edge(names[i], names[j]) and (allowed is None or allowed(names[i], names[j]))
    ]
    before = shortest_paths(names, network.edges)
    budget = min(budget, len(candidates))
    exhaustive = math.comb(len(candidates), budget) <= exhaustive_limit
    chosen, after = _search_all(before, candidates, budget) if exhaustive else _greedy(before, candidates, budget)
    return SkipPlacement(
        edges=tuple((names[i], names[j]) for i, j in chosen),
        diameter=_diameter(after),
        diameter_before=_diameter(before),
        mean_distance=_mean(after),
        mean_distance_before=_mean(before),
        exhaustive=exhaustive,
    )


def _ordered(graph: AnyGraph) -> tuple[nx.DiGraph[str], list[str]]:
    if isinstance(graph, Graph):
        return graph.to_networkx(), [node.name for node in graph.nodes]
    if not nx.is_directed_acyclic_graph(graph):
        raise DiagnosticsError("the graph is not a directed acyclic graph: give edges from parent to child.")
    return graph, list(nx.topological_sort(graph))


def _add(distances: Distances, edge: tuple[int, int]) -> Distances:
    a, b = edge
    over = distances[:, a, None] + 1 + distances[None, b, :]
    shorter: Distances = np.minimum(distances, np.minimum(over, over.T))
    return shorter


def _search_all(
    before: Distances, candidates: Sequence[tuple[int, int]], budget: int
) -> tuple[tuple[tuple[int, int], ...], Distances]:
    best: tuple[tuple[int, int], ...] = ()
    best_distances, best_score = before, _score(before)
    for edges in combinations(candidates, budget):
        distances = before
        for edge in edges:
            distances = _add(distances, edge)
        score = _score(distances)
        if score < best_score:
            best, best_distances, best_score = edges, distances, score
    return best, best_distances


def _greedy(
    distances: Distances, candidates: Sequence[tuple[int, int]], budget: int
) -> tuple[tuple[tuple[int, int], ...], Distances]:
    chosen: list[tuple[int, int]] = []
    for _ in range(budget):
        scored = [(_score(_add(distances, edge)), edge) for edge in candidates if edge not in chosen]
        score, edge = min(scored)
        if score >= _score(distances):
            break
        chosen.append(edge)
        distances = _add(distances, edge)
    return tuple(chosen), distances


def _score(distances: Distances) -> _Score:
    """What is minimised, in this order: unconnected pairs, diameter of the rest, sum of distances of the rest."""
    finite = np.isfinite(distances)
    reached = distances[finite]
    return int((~finite).sum()), float(reached.max()), float(reached.sum())


def _diameter(distances: Distances) -> float:
    return float(distances.max())


def _mean(distances: Distances) -> float:
    n = len(distances)
    return float(distances.sum()) / (n * (n - 1)) if n > 1 else 0.0
