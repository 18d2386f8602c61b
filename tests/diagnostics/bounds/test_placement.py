"""Recommended skips against brute force by networkx."""

from __future__ import annotations

import math
from itertools import combinations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diagnostics
from diagnostics.bounds.placement import recommend_skips
from tests.helpers.networks import Chain


def _chain(n: int) -> nx.DiGraph:
    return nx.path_graph(n, create_using=nx.DiGraph)


@st.composite
def _networks(draw: st.DrawFn) -> nx.DiGraph:
    n = draw(st.integers(2, 7))
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    for i in range(1, n):  # every node has a parent: connected
        graph.add_edges_from((p, i) for p in draw(st.sets(st.integers(0, i - 1), min_size=1, max_size=2)))
    return graph


def _with(graph: nx.DiGraph, edges: tuple[tuple[int, int], ...]) -> nx.Graph:
    more = graph.to_undirected()
    more.add_edges_from(edges)
    return more


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graph=_networks(), budget=st.integers(0, 2))
def test_the_exhaustive_search_finds_the_optimum_of_networkx(graph: nx.DiGraph, budget: int) -> None:
    found = recommend_skips(graph, budget)
    assert found.exhaustive
    order = list(nx.topological_sort(graph))
    candidates = [edge for edge in combinations(order, 2) if not graph.has_edge(*edge)]
    scores = []
    for edges in combinations(candidates, min(budget, len(candidates))):
        more = _with(graph, edges)
        scores.append((nx.diameter(more), nx.average_shortest_path_length(more)))
    assert (found.diameter, pytest.approx(found.mean_distance)) == min(scores)
    assert len(found.edges) <= budget
    assert nx.is_directed_acyclic_graph(nx.DiGraph([*graph.edges, *found.edges]))
    assert nx.diameter(_with(graph, found.edges)) == found.diameter
    assert nx.average_shortest_path_length(_with(graph, found.edges)) == pytest.approx(found.mean_distance)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graph=_networks(), budget=st.integers(0, 3))
def test_the_greedy_search_reports_true_distances_and_is_never_better(graph: nx.DiGraph, budget: int) -> None:
    greedy, best = recommend_skips(graph, budget, exhaustive_limit=0), recommend_skips(graph, budget)
    assert not greedy.exhaustive
    assert (greedy.diameter, greedy.mean_distance) >= (best.diameter, best.mean_distance - 1e-12)
    assert greedy.diameter <= greedy.diameter_before == nx.diameter(graph.to_undirected())
    more = _with(graph, greedy.edges)
    assert (nx.diameter(more), nx.average_shortest_path_length(more)) == (
        greedy.diameter,
        pytest.approx(greedy.mean_distance),
    )


def test_a_single_skip_of_a_chain_closes_a_cycle_that_leaves_tails() -> None:
    found = recommend_skips(_chain(9), 1)
    (edge,) = found.edges
    assert found.diameter_before == 8
    assert edge == (1, 7)  # a ring of seven, and a tail of one at both ends
    assert found.diameter == 4
    assert found.decay(0.5) == (0.5**8, 0.5**4)
    assert found.decay(0.5, 3.0)[1] == 3 * 0.5**4


def test_large_networks_are_searched_greedily() -> None:
    found = recommend_skips(_chain(40), 4)
    assert not found.exhaustive
    assert len(found.edges) == 4
    assert found.diameter < found.diameter_before / 2


def test_edges_can_be_excluded_and_a_complete_network_needs_none() -> None:
    found = recommend_skips(_chain(6), 1, allowed=lambda a, b: (a, b) == (1, 4))
    assert found.edges == ((1, 4),)
    assert recommend_skips(_chain(6), 3, allowed=lambda a, b: False).edges == ()
    complete = nx.DiGraph(combinations(range(5), 2))
    assert recommend_skips(complete, 3).edges == ()
    assert recommend_skips(complete, 3, exhaustive_limit=0).edges == ()


def test_unconnected_parts_are_connected_first() -> None:
    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("d", "e")])
    found = recommend_skips(graph, 1)
    assert found.diameter_before == math.inf
    assert found.diameter == 3


def test_a_captured_network_is_read_in_its_own_order() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(Chain(5, *[4] * 8, 3), torch.randn(3, 5), lambda z: z.square().mean())
    same_width = recommend_skips(graph, 2, allowed=lambda a, b: graph.size(graph[a]) == graph.size(graph[b]))
    assert same_width.edges
    assert all("8" not in edge for edge in same_width.edges)  # the head is narrower
    assert same_width.diameter < same_width.diameter_before == 8


def test_what_is_no_dag_or_no_budget_is_refused() -> None:
    with pytest.raises(diagnostics.DiagnosticsError, match="not a directed acyclic graph"):
        recommend_skips(nx.DiGraph([(0, 1), (1, 0)]), 1)
    with pytest.raises(ValueError, match="at least 0"):
        recommend_skips(_chain(3), -1)


def test_a_single_node_has_no_distance() -> None:
    graph = nx.DiGraph()
    graph.add_node("only")
    found = recommend_skips(graph, 2)
    assert (found.edges, found.diameter, found.mean_distance) == ((), 0, 0)
