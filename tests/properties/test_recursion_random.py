"""The recursion on random DAGs against double back-propagation."""

from __future__ import annotations

import networkx as nx
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

import diagnostics
from tests.helpers.oracle import double_backprop
from tests.helpers.random_dags import Plan, build, plans


def _loss(z: Tensor) -> Tensor:
    return (torch.sin(z) * z + z.square()).sum() / len(z)


def _reaches_output(plan: Plan, vertex: int) -> bool:
    edges = [(p, i) for i, v in enumerate(plan.vertices) for p in v.parents]
    return nx.has_path(nx.DiGraph(edges), vertex, len(plan.vertices) - 1)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_blocks_of_random_dags_equal_double_backpropagation(plan: Plan) -> None:
    # a network whose chosen nodes all miss the output has nothing to compare, and capture refuses some of them
    assume(any(v.chosen and _reaches_output(plan, i) for i, v in enumerate(plan.vertices[:-1])))
    model, x, names = build(plan)
    oracle = double_backprop(model, x, _loss, names, "output")
    expected, expected_gn = oracle.per_sample("total"), oracle.per_sample("gn")

    blocks = diagnostics.hessian_blocks(diagnostics.capture(model, x, _loss, names), by_source=True)
    averaged = blocks.mean()

    scale = max(block.norm().item() for block in expected.values())
    for v, w in expected:
        total, gn, tensor = expected[v, w], expected_gn[v, w], expected[v, w] - expected_gn[v, w]
        # relative to the block; where H^GN and H^T cancel in it, to the larger of them and to the rounding of the whole
        allowed = 1e-12 * max(total.norm().item(), gn.norm().item(), 1e-3 * scale)
        assert (blocks.total[v, w] - total).norm() <= allowed
        assert (blocks.gn[v, w] - gn).norm() <= allowed
        assert (blocks.tensor[v, w] - tensor).norm() <= allowed
        assert (sum(share[v, w] for share in blocks.tensor_by_source.values()) - tensor).norm() <= allowed
        assert (averaged.total[v, w] - total.sum(0)).norm() <= allowed


@settings(max_examples=100, deadline=None, derandomize=True)
@given(plan=plans())
def test_graph_of_random_dags_is_the_drawn_graph(plan: Plan) -> None:
    model, x, _ = build(plan)
    everything = [f"nodes.{i}" for i in range(len(plan.vertices))]
    assume(any(_reaches_output(plan, i) for i in range(len(plan.vertices) - 1)))
    graph = diagnostics.capture(model, x, _loss, everything)
    drawn = nx.DiGraph()
    drawn.add_nodes_from(everything)
    drawn.add_edges_from((f"nodes.{p}", f"nodes.{i}") for i, v in enumerate(plan.vertices) for p in v.parents if p >= 0)
    assert set(graph.to_networkx().edges) == set(drawn.edges)
    lengths = dict(nx.all_pairs_shortest_path_length(drawn.to_undirected()))
    for v in everything:
        for w in everything:
            assert graph.distance(v, w) == lengths[v].get(w, float("inf"))
