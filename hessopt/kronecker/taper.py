"""The taper that keeps a banded curvature matrix positive semidefinite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hessopt.network.cliques import Bandwidth, Cliques, band_cliques, check_bandwidth


def clique_taper(cliques: Cliques, count: int) -> NDArray[np.float64]:
    """Weights ``t`` of the pairs of layers, so that ``t ∘ M`` is banded and positive semidefinite.

    With ``n(v, w)`` the number of cliques that hold both v and w::

        t(v, w) = n(v, w) / √( n(v, v) · n(w, w) )

    t is the Gram matrix of normalised membership vectors, hence positive semidefinite on any graph, and so is the
    block-wise product ``t ∘ M`` with any positive semidefinite M (Schur). t is 1 on the diagonal, 0 for pairs that
    share no clique, and 1 everywhere if one clique holds all layers. On the interior of a chain with bandwidth k it is
    ``1 - |v - w| / (k + 1)``.

    Args:
        cliques: Cliques of the interaction graph, from :func:`hessopt.network.cliques.band_cliques`.
        count: Number of layers n.

    Returns:
        ``(n, n)``, symmetric.

    Raises:
        ValueError: a layer is in no clique, or a clique names a layer outside of ``0..n-1``.

    Source:
        docs/banded.md; Furrer, Genton and Nychka, "Covariance tapering" (2006), for tapers in general.
    """
    held = sorted({v for clique in cliques.cliques for v in clique})
    if held != list(range(count)):
        raise ValueError(f"the cliques must cover the layers 0..{count - 1}, and no others; they cover {held}.")
    members = np.zeros((count, len(cliques.cliques)))
    for number, clique in enumerate(cliques.cliques):
        members[list(clique), number] = 1.0
    together = members @ members.T
    taper: NDArray[np.float64] = together / np.sqrt(np.outer(together.diagonal(), together.diagonal()))
    return taper


class BandTaper:
    """The weights of pairs of layers by their distances, for a bandwidth that may change.

    Tapers are kept for the last distances: they take as long as a solve, and decisions ask for the same ones again.

    Args:
        bandwidth: k, or ``"full"``.

    Raises:
        ValueError: the bandwidth is out of range.
    """

    def __init__(self, bandwidth: Bandwidth) -> None:
        check_bandwidth(bandwidth)
        self.bandwidth = bandwidth
        self._distances = np.zeros((0, 0))
        self._kept: dict[Bandwidth, NDArray[np.float64]] = {}

    def __call__(self, distances: NDArray[np.float64]) -> NDArray[np.float64]:
        """The taper of the present bandwidth, ``(n, n)``."""
        return self._mean([self.bandwidth], distances)

    def of(self, bandwidths: Sequence[Bandwidth]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        """The mean of the tapers of these bandwidths, so with the pairs of each."""
        return partial(self._mean, bandwidths)

    def _mean(self, bandwidths: Sequence[Bandwidth], distances: NDArray[np.float64]) -> NDArray[np.float64]:
        if not len(distances):
            return np.zeros((0, 0))
        if not np.array_equal(distances, self._distances):
            self._distances, self._kept = distances, {}
        for k in bandwidths:
            if k not in self._kept:
                self._kept[k] = clique_taper(band_cliques(distances, k), len(distances))
        found: NDArray[np.float64] = np.mean([self._kept[k] for k in bandwidths], axis=0)
        return found
