"""The clique tree of a band: chordal, complete, and counting every block inside the band exactly once."""

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessopt.network.cliques import band_cliques


def distances(graph: nx.Graph) -> np.ndarray:
    return np.asarray(nx.floyd_warshall_numpy(graph, nodelist=range(len(graph))))


@st.composite
def graphs(draw: st.DrawFn) -> nx.Graph:
    count = draw(st.integers(1, 9))
    pairs = list(combinations(range(count), 2))
    graph = nx.Graph()
    graph.add_nodes_from(range(count))
    if pairs:
        graph.add_edges_from(draw(st.lists(st.sampled_from(pairs), unique=True)))
    return graph


@pytest.mark.parametrize("bandwidth", [0, 1, 2, 4, 5, 9])
def test_chain_gives_windows_and_overlaps(bandwidth: int) -> None:
    count, k = 6, bandwidth
    found = band_cliques(distances(nx.path_graph(count)), bandwidth)
    starts = range(max(count - k, 1))
    assert found.cliques == tuple(tuple(range(i, min(i + k, count - 1) + 1)) for i in starts)
    assert found.separators == (() if k == 0 else tuple(tuple(range(i + 1, i + k + 1)) for i in starts[:-1]))


def test_full_is_one_clique_even_of_unconnected_layers() -> None:
    distance = np.full((3, 3), np.inf)
    np.fill_diagonal(distance, 0)
    assert band_cliques(distance, "full").cliques == ((0, 1, 2),)
    assert band_cliques(distance, 7).cliques == ((0,), (1,), (2,))


def test_separators_keep_their_multiplicity() -> None:
    star = nx.star_graph(4)
    found = band_cliques(distances(star), 1)
    assert found.cliques == ((0, 1), (0, 2), (0, 3), (0, 4))
    assert found.separators == ((0,), (0,), (0,))


def test_cycle_is_completed() -> None:
    found = band_cliques(distances(nx.cycle_graph(4)), 1)
    assert sorted(map(len, found.cliques)) == [3, 3]
    assert list(map(len, found.separators)) == [2]


def test_isolated_layers_and_several_components() -> None:
    graph = nx.Graph([(0, 1), (1, 2), (4, 5)])
    graph.add_node(3)
    found = band_cliques(distances(graph), 1)
    assert found.cliques == ((0, 1), (1, 2), (3,), (4, 5))
    assert found.separators == ((1,),)


def test_one_layer_and_none() -> None:
    assert band_cliques([[0.0]], 1).cliques == ((0,),)
    assert band_cliques(np.zeros((0, 0)), 1).cliques == ()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(graphs(), st.integers(0, 5))
def test_cliques_cover_the_band_once(graph: nx.Graph, bandwidth: int) -> None:
    distance = distances(graph)
    found = band_cliques(distance, bandwidth)
    count = len(distance)
    # Every layer and every pair inside a clique is counted once: cliques minus separators.
    counts = np.zeros((count, count), dtype=int)
    for members, sign in [(c, 1) for c in found.cliques] + [(s, -1) for s in found.separators]:
        counts[np.ix_(members, members)] += sign
    inside = np.zeros((count, count), dtype=bool)
    for members in found.cliques:
        inside[np.ix_(members, members)] = True
    assert np.array_equal(counts, inside.astype(int))
    assert not (~inside & (distance <= bandwidth)).any()
    # The cliques are exactly the maximal cliques (by another algorithm) of a chordal graph.
    chordal = nx.Graph()
    chordal.add_nodes_from(range(count))
    chordal.add_edges_from((int(v), int(w)) for v, w in np.argwhere(np.triu(inside, 1)))
    assert nx.is_chordal(chordal)
    assert sorted(tuple(sorted(c)) for c in nx.find_cliques(chordal)) == list(found.cliques)
    # Nothing is filled in where the band is chordal already.
    band = nx.Graph()
    band.add_nodes_from(range(count))
    band.add_edges_from((int(v), int(w)) for v, w in np.argwhere(np.triu(distance <= bandwidth, 1)))
    if nx.is_chordal(band):
        assert set(map(frozenset, band.edges)) == set(map(frozenset, chordal.edges))


def test_order_is_deterministic() -> None:
    distance = distances(nx.gnp_random_graph(12, 0.3, seed=3))
    assert all(band_cliques(distance, 2) == band_cliques(distance, 2) for _ in range(5))


@pytest.mark.parametrize("bandwidth", [-1, 1.0, True, None, "auto"])
def test_bad_bandwidth(bandwidth: object) -> None:
    with pytest.raises(ValueError, match=r'integer of at least 0 or "full"'):
        band_cliques([[0.0]], bandwidth)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        ([0.0, 1.0], "square"),
        ([[0.0, 1.0]], "square"),
        ([[0.0, 1.0], [2.0, 0.0]], "symmetric"),
        ([[0.0, -1.0], [-1.0, 0.0]], "non-negative"),
        ([[1.0]], "diagonal"),
        ([[0.0, float("nan")], [float("nan"), 0.0]], "non-negative"),
    ],
)
def test_bad_distance(distance: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        band_cliques(distance, 1)
