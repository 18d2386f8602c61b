"""Cliques and separators of the layers that lie within a band of each other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike

Bandwidth: TypeAlias = int | Literal["full"]


@dataclass(frozen=True)
class Cliques:
    """Clique tree of a chordal graph over layers ``0..n-1``.

    For every layer, the number of cliques that contain it minus the number of separators that contain it is one; the
    same holds for every pair of adjacent layers. That is why a sum over cliques minus a sum over separators counts
    every block inside the band exactly once.

    Attributes:
        cliques: The maximal cliques, each ascending, in lexicographic order.
        separators: The intersections along the edges of the clique tree, each ascending, in lexicographic order, and
            **with multiplicity**: a separator shared by three branches of the tree is listed twice. Empty
            intersections (between connected components) are left out.
    """

    cliques: tuple[tuple[int, ...], ...]
    separators: tuple[tuple[int, ...], ...]


def band_cliques(distance: ArrayLike, bandwidth: Bandwidth) -> Cliques:
    """Cliques and separators of the interaction graph ``{(v, w): distance[v, w] <= bandwidth}``.

    The graph is completed to a chordal one where it is not chordal already (a minimal completion, by MCS-M), so a
    clique can hold pairs that are further apart than ``bandwidth``. The clique tree is a maximum-weight spanning
    forest of the intersection graph of the cliques, the weight being the size of the intersection.

    Args:
        distance: ``(n, n)`` undirected shortest-path lengths between layers, symmetric, zero on the diagonal, ``inf``
            for layers that are not connected.
        bandwidth: Largest distance of layers that interact: 0 makes every layer its own clique. ``"full"`` makes one
            clique of all layers, connected or not.

    Returns:
        The :class:`Cliques`. On a chain they are the windows ``i..i+bandwidth`` and their overlaps.

    Raises:
        ValueError: ``distance`` is not a symmetric square matrix of non-negative numbers with a zero diagonal, or
            ``bandwidth`` is neither a non-negative integer nor ``"full"``.

    Source:
        Blair and Peyton, "An introduction to chordal graphs and clique trees" (1993); Berry, Blair, Heggernes and
        Peyton, "Maximum cardinality search for computing minimal triangulations of graphs" (2004).
    """
    lengths = np.asarray(distance, dtype=float)
    _check_distance(lengths)
    check_bandwidth(bandwidth)
    reach = np.inf if bandwidth == "full" else bandwidth
    band: nx.Graph[int] = nx.Graph()
    band.add_nodes_from(range(len(lengths)))
    band.add_edges_from((int(v), int(w)) for v, w in np.argwhere(np.triu(lengths <= reach, k=1)))

    chordal, _ = nx.complete_to_chordal_graph(band)
    cliques = sorted(tuple(sorted(clique)) for clique in nx.chordal_graph_cliques(chordal))

    # networkx.junction_tree names its nodes by their members, so separators that are equal become one node and their
    # number is lost. Here the tree's nodes are the positions of the cliques and a separator is an edge.
    intersections: nx.Graph[int] = nx.Graph()
    intersections.add_nodes_from(range(len(cliques)))
    for i, j in combinations(range(len(cliques)), 2):
        common = set(cliques[i]) & set(cliques[j])
        if common:
            intersections.add_edge(i, j, weight=len(common))
    tree = nx.maximum_spanning_tree(intersections)
    separators = sorted(tuple(sorted(set(cliques[i]) & set(cliques[j]))) for i, j in tree.edges)
    return Cliques(tuple(cliques), tuple(separators))


def check_bandwidth(bandwidth: object) -> None:
    """Raise a ValueError unless ``bandwidth`` is a non-negative integer or ``"full"``."""
    whole = isinstance(bandwidth, int) and not isinstance(bandwidth, bool) and bandwidth >= 0
    if not whole and bandwidth != "full":
        raise ValueError(f'bandwidth must be an integer of at least 0 or "full", got {bandwidth!r}.')


def _check_distance(distance: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1]:
        raise ValueError(f"distance must be a square matrix, got shape {distance.shape}.")
    if np.isnan(distance).any() or (distance < 0).any() or distance.diagonal().any():
        raise ValueError("distance must hold non-negative numbers (inf if unconnected) and zeros on the diagonal.")
    if not np.array_equal(distance, distance.T):
        raise ValueError("distance must be symmetric: give lengths of undirected shortest paths.")
