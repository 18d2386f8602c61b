"""Paths, their Jacobians, and Gauss-Newton blocks as sums over pairs of paths."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

import diagnostics
from diagnostics.bounds.paths import Path, count_paths, path_jacobian, path_resonance, paths
from tests.helpers.networks import Chain, Diamond, ResidualCat
from tests.helpers.oracle import double_backprop, relative_error
from tests.helpers.random_dags import Plan, build, plans


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z + z.square()).sum() / len(z)


def _contrast(z: Tensor) -> Tensor:
    """A loss over pairs of samples."""
    return torch.logsumexp(z @ z.mT, dim=(0, 1))


def _capture(model: nn.Module, batch: int = 4, device: str | torch.device = "cpu") -> diagnostics.Graph:
    torch.manual_seed(0)
    x = torch.randn(batch, 5, dtype=torch.float64)
    return diagnostics.capture(model.double().to(device), x.to(device), _wavy)


def _ladder(rungs: int) -> nx.DiGraph:
    """A chain of diamonds: 2^rungs paths."""
    graph = nx.DiGraph()
    for i in range(rungs):
        graph.add_edges_from([(f"{i}", f"{i}a"), (f"{i}", f"{i}b"), (f"{i}a", f"{i + 1}"), (f"{i}b", f"{i + 1}")])
    return graph


def test_paths_of_a_residual_network_are_listed_shortest_first() -> None:
    graph = _capture(ResidualCat())
    found = paths(graph, "stem", "merge")
    assert [str(path) for path in found] == [
        "stem → merge",
        "stem → block1 → merge",
        "stem → block2 → merge",
        "stem → block1 → block2 → merge",
    ]
    assert [len(path) for path in found] == [1, 2, 2, 3]
    assert found[3].edges == (("stem", "block1"), ("block1", "block2"), ("block2", "merge"))
    assert (found[3].source, found[3].target) == ("stem", "merge")


def test_a_node_reaches_itself_by_the_path_of_length_zero_and_nothing_backwards() -> None:
    graph = _capture(ResidualCat())
    assert paths(graph, "merge", "merge") == (Path(("merge",)),)
    assert paths(graph, "merge", "stem") == ()
    assert count_paths(graph, "merge", "merge") == 1
    assert count_paths(graph, "merge", "stem") == 0
    identity = path_jacobian(graph, Path(("merge",)))
    assert torch.equal(identity, torch.eye(5, dtype=torch.float64).expand(4, -1, -1))


def test_counting_needs_no_listing_and_guards_it() -> None:
    graph = _ladder(80)
    assert count_paths(graph, "0", "80") == 2**80
    with pytest.raises(
        diagnostics.DiagnosticsError, match=rf"there are {2**80:,} paths from '0' to '80'.*Raise `limit`"
    ):
        paths(graph, "0", "80")
    assert len(paths(_ladder(5), "0", "5", limit=32)) == 32
    with pytest.raises(diagnostics.DiagnosticsError, match="32 paths"):
        paths(_ladder(5), "0", "5", limit=31)


def test_what_leads_nowhere_is_not_searched() -> None:
    graph = _ladder(60)  # 2^60 walks into a dead end
    graph.add_edge("0", "goal")
    assert paths(graph, "0", "goal") == (Path(("0", "goal")),)


def test_unknown_nodes_are_named() -> None:
    graph = _capture(Diamond())
    with pytest.raises(KeyError, match="no node 'nowhere'"):
        paths(graph, "stem", "nowhere")
    with pytest.raises(diagnostics.DiagnosticsError, match="'left' is no parent of 'right'"):
        path_jacobian(graph, Path(("left", "right")))


def test_gauss_newton_shares_of_a_diamond_equal_products_of_autograd_jacobians(device: torch.device) -> None:
    model = Diamond()
    graph = _capture(model, batch=1, device=device)
    table = path_resonance(graph, "stem", "merge")
    assert [str(path) for path in table.left] == ["stem → left → merge → head", "stem → right → merge → head"]
    stem = graph["stem"].value.detach()
    left, right = model.left(stem), model.right(stem)
    merged = model.merge(torch.cat([left, right], -1))
    head = model.head.weight.detach()
    out = torch.func.jacrev(model.merge)(torch.cat([left, right], -1))[0, :, 0]
    sides = [out[:, :3] @ torch.func.jacrev(model.left)(stem)[0, :, 0]]
    sides.append(out[:, 3:] @ torch.func.jacrev(model.right)(stem)[0, :, 0])
    curvature = torch.func.jacrev(torch.func.grad(_wavy))(model.head(merged))[0, :, 0]
    for i, side in enumerate(sides):
        expected = side.T @ head.T @ curvature @ head
        assert relative_error(table.contribution(i, 0).detach(), expected.detach()) < 1e-12
        assert table.norms[i, 0].item() == pytest.approx(expected.norm().item(), rel=1e-12)
    assert table.shares.sum().item() == pytest.approx(1, abs=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_sums_over_paths_of_random_dags_equal_jacobians_and_gauss_newton_blocks(plan: Plan) -> None:
    edges = [(p, i) for i, v in enumerate(plan.vertices) for p in v.parents]
    reaches = nx.ancestors(nx.DiGraph(edges), len(plan.vertices) - 1)
    assume(any(v.chosen and i in reaches for i, v in enumerate(plan.vertices[:-1])))
    model, x, names = build(plan)
    graph = diagnostics.capture(model, x, _wavy, names)
    blocks = diagnostics.hessian_blocks(graph)
    expected_gn = double_backprop(model, x, _wavy, names, "output").per_sample("gn")
    scale = max(block.norm().item() for block in expected_gn.values())
    for i, v in enumerate(graph.nodes):
        for w in graph.nodes[: i + 1]:
            found = paths(graph, w.name, v.name)
            assert len(found) == count_paths(graph, w.name, v.name)
            total = sum(path_jacobian(graph, path) for path in found)
            expected = _autograd_jacobian(graph, v.name, w.name)
            assert (total - expected).norm() <= 1e-12 * max(1.0, expected.norm().item())
            each = path_resonance(graph, v.name, w.name, per_sample=True)
            mean = path_resonance(graph, v.name, w.name)
            sizes = [sum(p.norm().item() for p in part.norms.flatten()) for part in (each, mean)]
            pair = ("output" if v.module is None else v.name, "output" if w.module is None else w.name)
            allowed = 1e-12 * max(expected_gn[pair].norm().item(), sizes[0], 1e-3 * scale)
            assert (each.total - expected_gn[pair]).norm() <= allowed
            assert (mean.total - expected_gn[pair].sum(0)).norm() <= allowed
            assert (mean.total - blocks.mean().gn[v.name, w.name]).norm() <= allowed
            if mean.total.norm() > 1e-3 * sizes[1] > 0:
                assert mean.shares.sum().item() == pytest.approx(1, abs=1e-9)


def _autograd_jacobian(graph: diagnostics.Graph, v: str, w: str) -> Tensor:
    """J[v←w] by pushing through the segments of the tape: entry by entry, no products of local Jacobians."""
    d_v, d_w = graph.size(graph[v]), graph.size(graph[w])
    rows = []
    for i in range(d_v):
        back = {v: torch.zeros(graph.batch_size, d_v, dtype=torch.float64)}
        back[v][:, i] = 1
        for node in reversed(graph.nodes):
            if node.name in back and node.name != w and node.parents:
                values = [graph[p].value for p in node.parents]
                slopes = torch.autograd.grad(
                    node.segment, values, back[node.name], retain_graph=True, allow_unused=True
                )
                for p, slope in zip(node.parents, slopes, strict=True):
                    if slope is not None:
                        back[p] = back[p] + slope if p in back else slope
        rows.append(back.get(w, torch.zeros(graph.batch_size, d_w, dtype=torch.float64)))
    return torch.stack(rows, 1)


def test_coupled_samples_and_sum_losses_follow_the_blocks() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    for loss, reduction in ((_contrast, "mean"), (_contrast, "sum"), (_wavy, "sum")):
        graph = diagnostics.capture(Chain(5, 4, 4, 3).double(), x, loss, reduction=reduction)
        assert graph.coupled == (loss is _contrast)
        blocks = diagnostics.hessian_blocks(graph)
        v, w = graph.nodes[1].name, graph.nodes[0].name
        assert path_resonance(graph, v, w).residual(blocks) < 1e-12
        assert path_resonance(graph, v, w).residual(blocks.mean()) < 1e-12
        assert path_resonance(graph, v, w, per_sample=True).residual(blocks) < 1e-12
        with pytest.raises(diagnostics.DiagnosticsError, match="batch means"):
            path_resonance(graph, v, w, per_sample=True).residual(blocks.mean())
        assert path_resonance(graph, v, v).residual(blocks) < 1e-12
        # the check can fail: the whole Hessian is another matrix
        assert relative_error(path_resonance(graph, w, w).total, blocks.mean().total[w, w]) > 1e-3


def test_several_outputs_add_up() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.stem(x))
            return torch.tanh(self.a(h)), torch.tanh(self.b(h))

    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    graph = diagnostics.capture(Two().double(), x, lambda z: (z[0].sum(1) * z[1].prod(1)).mean(), ["stem", "a", "b"])
    blocks = diagnostics.hessian_blocks(graph)
    for v in ("stem", "a", "b"):
        for w in ("stem", "a", "b"):
            assert path_resonance(graph, v, w).residual(blocks) < 1e-12
    assert len(path_resonance(graph, "stem", "stem").left) == 2


def test_a_network_with_too_many_pairs_of_paths_is_refused_before_any_product() -> None:
    graph = _capture(ResidualCat())
    with pytest.raises(diagnostics.DiagnosticsError, match=r"there are 4 x 4 = 16 pairs of paths.*limit of 15"):
        path_resonance(graph, "stem", "stem", limit=15)
    assert path_resonance(graph, "stem", "stem", limit=16).norms.shape == (4, 4)


def test_the_table_prints_the_largest_pairs_first() -> None:
    table = path_resonance(_capture(ResidualCat()), "stem", "block1")
    lines = str(table).splitlines()
    assert lines[0] == "|H^GN[stem, block1]| as a sum over 4 x 2 pairs of paths"
    assert len(lines) == 3 + 8
    assert float(lines[3].split()[-2]) == pytest.approx(table.norms.max().item(), rel=5e-3)


def test_an_optimizer_step_makes_the_graph_stale() -> None:
    model = Chain(5, 4, 3)
    graph = _capture(model)
    with torch.no_grad():
        model[0][0].weight.mul_(2)
    with pytest.raises(diagnostics.StaleGraphError):
        path_resonance(graph, "0", "0")
