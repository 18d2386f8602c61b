"""Rank bounds by vertex cuts hold on random networks and are attained at bottlenecks; zero blocks are exactly zero."""

from __future__ import annotations

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

import diagnostics
from diagnostics.bounds.ranks import bottleneck, rank_bounds
from tests.helpers.networks import Chain, Diamond
from tests.helpers.oracle import double_backprop
from tests.helpers.random_dags import Plan, build, plans


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z + z.square()).sum() / len(z)


def _reaching(plan: Plan) -> bool:
    edges = [(p, i) for i, v in enumerate(plan.vertices) for p in v.parents]
    reaches = nx.ancestors(nx.DiGraph(edges), len(plan.vertices) - 1)
    return any(v.chosen and i in reaches for i, v in enumerate(plan.vertices[:-1]))


def _rank(block: np.ndarray, scale: float) -> int:
    """Singular values above the rounding of the largest block, which products of small factors carry with them."""
    values = np.linalg.svd(block, compute_uv=False)
    return int((values > 1e-12 * scale).sum())


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_ranks_of_random_dags_stay_below_their_bounds(plan: Plan) -> None:
    assume(_reaching(plan))
    model, x, names = build(plan)
    graph = diagnostics.capture(model, x, _wavy, names)
    oracle = double_backprop(model, x, _wavy, names, "output")
    blocks = diagnostics.hessian_blocks(graph)
    for part in ("gn", "total"):
        truth = oracle.per_sample(part)
        scale = max(block.norm().item() for block in truth.values())
        for per_sample in (True, False):
            table = rank_bounds(graph, blocks, part=part, per_sample=per_sample, include_output=True, rtol=1e-9)
            for i, v in enumerate(table.nodes):
                for j, w in enumerate(table.nodes):
                    block = truth[v, w].numpy()
                    samples = block if per_sample else [block.sum(0)]
                    assert max(_rank(sample, scale) for sample in samples) <= table.bound[i, j]
            significant = table.stable.nan_to_num(0.0)
            assert (significant <= table.rank.double() * (1 + 1e-8)).all()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(most=5))
def test_the_bottleneck_is_the_narrowest_cut_of_all(plan: Plan) -> None:
    assume(_reaching(plan))
    model, x, names = build(plan)
    graph = diagnostics.capture(model, x, _wavy, names)
    network = graph.to_networkx()
    network.add_edges_from((z, "loss") for z in graph.loss_parents)
    every = [node.name for node in graph.nodes]
    for source in every:
        widths = []
        for size in range(len(every) + 1):
            for cut in combinations(every, size):
                rest = network.subgraph(set(network) - set(cut))
                if source in cut or not nx.has_path(rest, source, "loss"):
                    widths.append(sum(graph.size(graph[n]) for n in cut))
        width, cut = bottleneck(graph, source)
        assert width == min(widths)
        assert sum(graph.size(graph[n]) for n in cut) == width


class Bottleneck(nn.Module):
    """5 → 6 → 6 → 2 → 6 → 6 → 4, with a skip around one wide layer before and after the narrow one."""

    def __init__(self, bypass: bool = False) -> None:
        super().__init__()
        self.bypass = bypass
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)
        self.narrow = nn.Linear(6, 2)
        self.c, self.d = nn.Linear(2, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.a(x))
        b = a + torch.tanh(self.b(a))
        c = torch.tanh(self.c(torch.tanh(self.narrow(b))))
        d = c + torch.tanh(self.d(c)) + (a if self.bypass else 0)
        return self.head(d)


def test_a_bottleneck_limits_ranks_and_its_width_is_attained() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    graph = diagnostics.capture(Bottleneck().double(), x, _wavy)
    assert bottleneck(graph, "a") == (2, ("narrow",))
    assert bottleneck(graph, "a", "b") in [(6, ("a",)), (6, ("b",))]
    assert bottleneck(graph, "d") == (4, ("head",))
    assert bottleneck(graph, "d", "a") == (0, ())
    gn = rank_bounds(graph, per_sample=True, rtol=1e-10)
    assert gn.nodes == ("a", "b", "narrow", "c", "d")
    assert gn.bound.tolist() == [[2, 2, 2, 2, 2]] * 3 + [[2, 2, 2, 4, 4]] * 2
    assert torch.equal(gn.rank, gn.bound)
    total = rank_bounds(graph, part="total", per_sample=True, rtol=1e-10)
    i, j = total.nodes.index("a"), total.nodes.index("d")
    assert total.bound[i, j] == total.rank[i, j] == 2  # across the bottleneck, tensor part included
    assert total.rank[i, i] == total.bound[i, i] == 6  # curvature of the bottleneck itself has full rank before it
    assert total.bound[i, 1] == 6
    around = rank_bounds(
        diagnostics.capture(Bottleneck(bypass=True).double(), x, _wavy), part="gn", per_sample=True, rtol=1e-10
    )
    assert around.bound[0, 0] == around.rank[0, 0] == 4  # a skip lets more through; the output has four entries


def test_batch_means_have_the_ranks_of_all_samples_together() -> None:
    torch.manual_seed(0)
    model = Chain(5, 8, 8, 2).double()
    graph = diagnostics.capture(model, torch.randn(3, 5, dtype=torch.float64), _wavy)
    table = rank_bounds(graph, rtol=1e-10)
    assert table.bound.tolist() == [[6, 6], [6, 6]]  # 3 samples of 2 outputs
    assert table.rank[0, 0] == 6
    assert table.rank[1, 1] == 2  # the last map is linear: all samples share its rows
    narrow = diagnostics.capture(model, torch.randn(40, 5, dtype=torch.float64), _wavy)
    assert rank_bounds(narrow, rtol=1e-10).bound.tolist() == [[8, 8], [8, 8]]


def test_the_rank_of_the_loss_is_a_bound() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2])
    graph = diagnostics.capture(
        Chain(5, 6, 6, 3).double(),
        torch.randn(3, 5, dtype=torch.float64),
        lambda z: nn.functional.cross_entropy(z, labels),
    )
    table = rank_bounds(graph, per_sample=True, rtol=1e-10)
    assert (table.bound == 2).all()  # three classes, whose probabilities add up to one
    assert (table.rank == 2).all()


def test_blocks_of_branches_that_meet_in_a_separable_loss_are_exactly_zero() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)
            self.out_a, self.out_b, self.dead = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.stem(x))
            self.dead(h)
            return torch.tanh(self.out_a(torch.tanh(self.a(h)))), torch.tanh(self.out_b(torch.tanh(self.b(h))))

    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    nodes = ["stem", "a", "b", "dead"]
    apart = diagnostics.capture(Fork().double(), x, lambda z: _wavy(z[0]) + _wavy(z[1]), nodes)
    blocks = diagnostics.hessian_blocks(apart)
    assert not blocks.total["a", "b"].any()  # no common descendant
    assert not blocks.total["dead", "stem"].any()
    assert blocks.total["a", "stem"].norm() > 1e-3
    assert blocks.tensor["stem", "stem"].norm() > 1e-3
    together = diagnostics.capture(Fork().double(), x, lambda z: _wavy(z[0] * z[1]), nodes)
    assert diagnostics.hessian_blocks(together).gn["a", "b"].norm() > 1e-3  # the loss is a descendant, too
    table = rank_bounds(apart)
    assert table.stable[table.nodes.index("a"), table.nodes.index("b")].isnan()
    assert table.bound[table.nodes.index("dead")].tolist() == [0, 0, 0, 0]


def test_the_tensor_part_at_the_node_before_a_linear_head_is_exactly_zero() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(Chain(5, 6, 6, 4).double(), torch.randn(3, 5, dtype=torch.float64), _wavy)
    tensor = diagnostics.hessian_blocks(graph).tensor
    for v in tensor.nodes:
        assert not tensor["1", v].any()  # nothing bends between 1 and the output
    assert tensor["0", "0"].norm() > 1e-3


def test_a_narrow_merge_passes_the_gauss_newton_part_only() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.w, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(1, 3)
            self.inner = nn.CosineSimilarity()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.v(x), self.w(x))[:, None])

    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    graph = diagnostics.capture(Inner().double(), x, _wavy, ["v", "w", "inner"])
    assert bottleneck(graph, "v") == (1, ("inner",))
    gn, total = (rank_bounds(graph, part=part, per_sample=True, rtol=1e-10) for part in ("gn", "total"))
    assert gn.bound[0, 1] == gn.rank[0, 1] == 1
    assert total.bound[0, 1] == 4
    assert total.rank[0, 1] > 1  # the merge's own curvature between its parents


def test_tables_print_and_refuse_what_has_no_bound() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(Diamond().double(), torch.randn(3, 5, dtype=torch.float64), _wavy)
    assert len(str(rank_bounds(graph)).splitlines()) == 2 + 10
    with pytest.raises(ValueError, match="tensor part has no bottleneck"):
        rank_bounds(graph, part="tensor")
    with pytest.raises(diagnostics.DiagnosticsError, match="not batch means"):
        rank_bounds(graph, diagnostics.hessian_blocks(graph).mean(), per_sample=True)
