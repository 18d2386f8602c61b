"""Predicted multiplications against those that torch is seen to do."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import diagnostics
import diagnostics.blocks.recursion
from diagnostics.blocks.cost import measure_cost, predict_cost
from diagnostics.graph.local import local_derivatives
from tests.helpers.networks import Attention, Chain, Diamond, ResidualCat
from tests.helpers.random_dags import Plan, build, plans


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z + z.square()).sum() / len(z)


class Multiplications(TorchDispatchMode):
    """Counts m·k·n of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]
        else:
            assert name not in ("matmul", "mv", "dot", "addmv", "addbmm", "linear", "einsum"), name
        return func(*args, **(kwargs or {}))


def _count(graph: diagnostics.Graph, monkeypatch: pytest.MonkeyPatch) -> int:
    local = local_derivatives(graph)
    with monkeypatch.context() as patch:
        patch.setattr(diagnostics.blocks.recursion, "differentiate", lambda _: local)
        with Multiplications() as counter:
            diagnostics.hessian_blocks(graph).mean()
    return counter.count


CASES = {
    "chain": (lambda: Chain(5, 4, 3, 4, 3), (4, 5)),
    "residual": (ResidualCat, (3, 5)),
    "diamond": (Diamond, (2, 5)),
    "attention": (Attention, (2, 3, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_count_is_what_torch_multiplies(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = CASES[case]
    torch.manual_seed(0)
    graph = diagnostics.capture(make().double(), torch.randn(shape, dtype=torch.float64), _wavy)
    predicted = predict_cost(graph, exact=True)
    assert predicted.total == _count(graph, monkeypatch)
    assert predicted.total <= predict_cost(graph).total


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(plan=plans())
def test_the_count_of_random_dags_is_what_torch_multiplies(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    edges = [(p, i) for i, v in enumerate(plan.vertices) for p in v.parents]
    reaches = nx.ancestors(nx.DiGraph(edges), len(plan.vertices) - 1)
    assume(any(v.chosen and i in reaches for i, v in enumerate(plan.vertices[:-1])))
    model, x, names = build(plan)
    graph = diagnostics.capture(model, x, _wavy, names)
    predicted = predict_cost(graph, exact=True)
    assert predicted.total == _count(graph, monkeypatch)
    assert predicted.total <= predict_cost(graph).total


def test_a_network_that_does_not_bend_needs_no_total_jacobians(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    graph = diagnostics.capture(model, torch.randn(2, 3, dtype=torch.float64), _wavy)
    predicted = predict_cost(graph, exact=True)
    assert predicted.total == _count(graph, monkeypatch)
    assert predicted.jacobians == 0


def test_a_chain_takes_n_squared_d_cubed() -> None:
    def products(n: int, d: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Sequential(nn.Linear(d, d), nn.Tanh()) for _ in range(n)])
        graph = diagnostics.capture(model, torch.randn(1, d), _wavy)
        cost = predict_cost(graph)
        return cost.jacobians + cost.elimination + cost.tensor

    for n, d in [(5, 4), (12, 4), (12, 7)]:
        assert products(n, d) - n**2 * d**3 == pytest.approx(0, abs=4 * n * d**3)
    assert products(40, 4) / (40**2 * 4**3) == pytest.approx(1, abs=0.1)


def test_seconds_are_measured_beside_the_count() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(Chain(5, 8, 8, 3), torch.randn(4, 5), _wavy)
    cost = measure_cost(graph, repeats=2)
    assert cost.predicted == predict_cost(graph)
    assert cost.seconds > 0
    assert cost.rate == pytest.approx(cost.predicted.total / cost.seconds)
    with pytest.raises(ValueError, match="at least 1"):
        measure_cost(graph, repeats=0)
