"""Gains of single steps, and the stability criterion that follows from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diagnostics
from diagnostics.bounds.gains import Gains, local_gains, sum_over_paths
from diagnostics.bounds.paths import count_paths
from tests.helpers.networks import Diamond, ResidualCat


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


def _capture(model: nn.Module) -> diagnostics.Graph:
    torch.manual_seed(0)
    return diagnostics.capture(model.double(), torch.randn(4, 5, dtype=torch.float64), _wavy)


def test_rho_is_the_largest_singular_value_of_a_step_and_s_the_most_children() -> None:
    model = Diamond()
    graph = _capture(model)
    figures = local_gains(graph)
    stem = graph["stem"].value.detach()
    expected = {}
    for side in ("left", "right"):
        jacobian = torch.func.vmap(torch.func.jacrev(getattr(model, side)))(stem).detach().numpy()
        expected[side] = np.linalg.norm(jacobian, 2, axis=(1, 2))
    column = {edge: figures.norms[:, i].numpy() for i, edge in enumerate(figures.edges)}
    for side, values in expected.items():
        np.testing.assert_allclose(column["stem", side], values, rtol=1e-12)
    assert figures.children == 2
    assert figures.rho == pytest.approx(max(norms.max() for norms in column.values()), rel=1e-14)
    assert figures.rho_mean == pytest.approx(max(norms.mean() for norms in column.values()), rel=1e-14)
    assert figures.rho_mean <= figures.rho
    sums = [(column["stem", "left"] + column["stem", "right"]).max()]
    sums += [column["left", "merge"].max(), column["right", "merge"].max(), column["merge", "head"].max()]
    assert figures.branch == pytest.approx(max(sums), rel=1e-14)
    assert figures.margin <= figures.sharp_margin
    assert "not guaranteed" in str(figures) or figures.stable


def test_sums_over_paths_of_the_adjacency_matrix_count_paths() -> None:
    graph = _capture(ResidualCat())
    counts = sum_over_paths(Gains(graph).adjacency)
    for i, p in enumerate(graph.nodes):
        for j, v in enumerate(graph.nodes):
            assert counts[i, j].item() == count_paths(graph, v.name, p.name)


def test_below_the_margin_jacobians_decay_geometrically_at_any_depth() -> None:
    class Skips(nn.Module):
        """Every node feeds the next two."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(12))
            with torch.no_grad():
                for layer, _ in self.layers:
                    layer.weight.mul_(0.4 / torch.linalg.matrix_norm(layer.weight, 2))

        def forward(self, x: Tensor) -> Tensor:
            before, now = torch.zeros_like(x), x
            for layer in self.layers:
                before, now = now, layer(now + before)
            return now

    graph = _capture(Skips())
    figures = local_gains(graph)
    assert figures.stable
    assert figures.margin == pytest.approx(1 - 2 * figures.rho)
    assert "decays geometrically" in str(figures)
    gains = Gains(graph)
    shortest, _ = gains.lengths()
    norms = gains.jacobian_norms()
    ratio = figures.children * figures.rho
    for p, v in gains.downstream():
        i, j = gains.names.index(p), gains.names.index(v)
        assert norms[:, i, j].max() <= ratio ** shortest[i, j].item() / figures.margin
        assert norms[:, i, j].max() <= figures.branch ** shortest[i, j].item() / figures.sharp_margin


def test_a_single_node_has_no_gain() -> None:
    figures = local_gains(_capture(nn.Sequential(nn.Linear(5, 3))))
    assert (figures.rho, figures.branch, figures.children, figures.edges) == (0.0, 0.0, 0, ())
