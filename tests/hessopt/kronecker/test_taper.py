"""The taper: positive semidefinite on every graph, and its limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessopt.kronecker.taper import clique_taper
from hessopt.network.cliques import Cliques, band_cliques


def chain(count: int) -> np.ndarray:
    return np.abs(np.arange(count)[:, None] - np.arange(count)).astype(float)


@st.composite
def distances(draw: st.DrawFn) -> np.ndarray:
    """Shortest paths in a random graph, connected or not."""
    count = draw(st.integers(1, 7))
    lengths = np.full((count, count), np.inf)
    np.fill_diagonal(lengths, 0)
    for v in range(count):
        for w in range(v):
            if draw(st.booleans()):
                lengths[v, w] = lengths[w, v] = 1
    for u in range(count):
        lengths = np.minimum(lengths, lengths[:, [u]] + lengths[[u]])
    return lengths


@given(distances(), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_positive_semidefinite_banded_and_one_on_the_diagonal(distance: np.ndarray, bandwidth: int) -> None:
    cliques = band_cliques(distance, bandwidth)
    taper = clique_taper(cliques, len(distance))
    assert np.linalg.eigvalsh(taper).min() > -1e-12
    assert np.allclose(taper.diagonal(), 1, atol=1e-15)
    together = {(v, w) for clique in cliques.cliques for v in clique for w in clique}
    assert {(int(v), int(w)) for v, w in np.argwhere(taper > 0)} == together
    assert (taper[distance <= bandwidth] > 0).all()


@pytest.mark.parametrize("bandwidth", [1, 2, 3])
def test_triangular_window_inside_a_chain(bandwidth: int) -> None:
    taper = clique_taper(band_cliques(chain(12), bandwidth), 12)
    inside = slice(bandwidth, 12 - bandwidth)
    expected = np.maximum(0, 1 - chain(12) / (bandwidth + 1))
    assert np.allclose(taper[inside, inside], expected[inside, inside], atol=1e-14)


def test_limits() -> None:
    assert np.array_equal(clique_taper(band_cliques(chain(5), 0), 5), np.eye(5))
    assert np.allclose(clique_taper(band_cliques(chain(5), 4), 5), 1)
    assert np.allclose(clique_taper(band_cliques(np.array([[0, np.inf], [np.inf, 0]]), "full"), 2), 1)


def test_cutting_the_band_instead_is_indefinite() -> None:
    """What the taper is there for: the same band without it."""
    taper = clique_taper(band_cliques(chain(5), 1), 5)
    assert np.linalg.eigvalsh((taper > 0).astype(float)).min() < -0.1


@pytest.mark.parametrize("cliques", [((0,),), ((0, 1), (2,))])
def test_cliques_that_do_not_cover_the_layers(cliques: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"must cover the layers 0\.\.1"):
        clique_taper(Cliques(cliques, ()), 2)
