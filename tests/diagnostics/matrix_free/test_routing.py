"""Curvature routing against double back-propagation, the exact recursion and the products on the whole tape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import diagnostics
from diagnostics.errors import CaptureError, DiagnosticsError, StaleGraphError
from diagnostics.matrix_free.node_products import NodeProducts
from diagnostics.matrix_free.routing import RoutedCurvature, route
from tests.helpers import random_dags
from tests.helpers.networks import (
    Attention,
    CalledTwice,
    Counterexample,
    DeadEnd,
    Diamond,
    Normalised,
    Recurrent,
    ResidualCat,
    SkipIntoMerge,
)


def wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


class Images(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.SiLU()),
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Flatten()),
            nn.Linear(36, 3),
        )


class Tied(nn.Module):
    """A weight that two nodes share, one of them transposed, and one that is a node's own parameter twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return torch.sin(self.second(h, h) @ self.first.weight) * self.first.bias


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "skip into a merge": (ResidualCat, (6, 5)),
    "diamond": (Diamond, (6, 5)),
    "called twice": (CalledTwice, (6, 5)),
    "attention": (partial(Attention, fused=True), (4, 3, 3)),
    "recurrent": (Recurrent, (4, 3, 3)),
    "dead end": (DeadEnd, (4, 5)),
    "unrelated nodes": (Counterexample, (4, 3)),
    "skip": (SkipIntoMerge, (4, 3)),
    "layer norm": (Normalised, (4, 5)),
    "batch statistics": (Images, (3, 2, 6, 6)),
    "tied": (Tied, (4, 4)),
}


def _network(name: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    return build().double().to(device), torch.randn(shape, dtype=torch.float64).to(device)


def _parameter_tangents(model: nn.Module, k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(k, *p.shape, dtype=p.dtype, generator=generator).to(p.device)
        for name, p in model.named_parameters()
    }


def _double_backprop(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], tangents: dict[str, Tensor]
) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    parameters = list(named.values())
    gradients = torch.autograd.grad(loss(model(x)), parameters, create_graph=True, materialize_grads=True)
    rows = []
    for i in range(len(next(iter(tangents.values())))):
        slope = sum((g * tangents[n][i]).sum() for n, g in zip(named, gradients, strict=True) if n in tangents)
        assert isinstance(slope, Tensor)
        rows.append(torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True))
    return {n: torch.stack(column) for n, column in zip(named, zip(*rows, strict=True), strict=True)}


def _error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = torch.stack([(actual[name] - value).norm() for name, value in expected.items()]).norm()
    return (difference / torch.stack([value.norm() for value in expected.values()]).norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_products_equal_double_backpropagation(name: str, k: int, device: torch.device) -> None:
    model, x = _network(name, device)
    tangents = _parameter_tangents(model, k)
    graph = diagnostics.capture(model, x, wavy)
    routed = route(graph, tangents)
    assert _error(routed.total, _double_backprop(model, x, wavy, tangents)) < 1e-12
    first = next(iter(tangents))
    some = {first: tangents[first]}
    assert _error(route(graph, some).total, _double_backprop(model, x, wavy, some)) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_equal_those_of_the_parameter_hessian(name: str, device: torch.device) -> None:
    model, x = _network(name, device)
    tangents = _parameter_tangents(model, 3)
    graph = diagnostics.capture(model, x, wavy)
    routed = route(graph, tangents)
    flat = torch.cat([t.reshape(3, -1) for t in tangents.values()], 1)
    for part in ("gn", "tensor"):
        expected = flat @ diagnostics.parameter_hessian(graph, part)
        found = torch.cat([getattr(routed, part)[name].reshape(3, -1) for name in tangents], 1)
        assert (found - expected).norm() <= 1e-12 * (flat @ diagnostics.parameter_hessian(graph)).norm()


def _check_nodes(graph: diagnostics.Graph, tolerance: float) -> RoutedCurvature:
    """All parts and all shares, for tangents at all nodes, from the exact blocks."""
    blocks = diagnostics.hessian_blocks(graph, by_source=True)
    names = [node.name for node in graph.nodes]
    tangents = {node.name: torch.randn(2, *node.shape, dtype=torch.float64).to(node.value) for node in graph.nodes}
    routed = route(graph, tangents, by_source=True)
    assert routed.tensor_by_source is not None

    def expected(matrix: diagnostics.BlockMatrix, v: str) -> Tensor:
        flat = {w: t.reshape(2, graph.samples, -1) for w, t in tangents.items()}
        return sum(torch.einsum("sij,ksj->ksi", matrix[v, w], flat[w]) for w in names).reshape(tangents[v].shape)

    scale = max(expected(blocks.total, v).norm().item() for v in names)
    for v in names:
        assert (routed.total[v] - expected(blocks.total, v)).norm() <= tolerance * scale
        assert (routed.gn[v] - expected(blocks.gn, v)).norm() <= tolerance * scale
        for source, matrix in blocks.tensor_by_source.items():
            share = routed.tensor_by_source.get(source, {}).get(v, torch.zeros_like(tangents[v]))
            assert (share - expected(matrix, v)).norm() <= tolerance * scale, source
    together = route(graph, tangents)
    products = NodeProducts.of(graph).total(tangents, names)
    assert _error(together.total, products) <= tolerance * 10
    assert together.tensor_by_source is None
    return routed


@pytest.mark.parametrize("name", NETWORKS)
def test_nodes_and_sources_equal_the_exact_blocks(name: str, device: torch.device) -> None:
    model, x = _network(name, device)
    _check_nodes(diagnostics.capture(model, x, wavy), 1e-12)


@settings(deadline=None, max_examples=40)
@given(random_dags.plans())
def test_nodes_and_sources_on_random_graphs(plan: random_dags.Plan) -> None:
    model, x, nodes = random_dags.build(plan)
    _check_nodes(diagnostics.capture(model, x, wavy, nodes), 1e-11)


@pytest.mark.parametrize("name", ["skip into a merge", "called twice", "tied"])
def test_shares_add_up_exactly_and_name_the_nodes_that_bend(name: str) -> None:
    model, x = _network(name, torch.device("cpu"))
    graph = diagnostics.capture(model, x, wavy)
    routed = route(graph, _parameter_tangents(model, 2), by_source=True)
    assert routed.tensor_by_source is not None
    assert set(routed.tensor) == {n.name for n in graph.nodes} | set(dict(model.named_parameters()))
    for name_, tensor in routed.tensor.items():
        shares = [share[name_] for share in routed.tensor_by_source.values() if name_ in share]
        assert torch.equal(tensor, sum(shares, torch.zeros_like(tensor)))
        assert torch.equal(routed.total[name_], routed.gn[name_] + tensor)


def test_a_parameter_bends_a_node_that_is_linear_in_its_parents() -> None:
    """``f = W h``: its second derivative by W and h is the share of a linear layer in training's Hessian."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    graph = diagnostics.capture(model, torch.randn(4, 3, dtype=torch.float64), wavy)
    routed = route(graph, {"0.weight": torch.randn(1, 3, 3, dtype=torch.float64)}, by_source=True)
    assert routed.tensor_by_source is not None
    assert routed.tensor_by_source["1"]["1.weight"].norm() > 0
    assert not routed.tensor_by_source["0"] or not any(t.any() for t in routed.tensor_by_source["0"].values())


def test_weight_decay_inside_the_loss_belongs_to_the_gauss_newton_part() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return wavy(z) + (model[2].weight ** 4).sum() * z.sum()

    tangents = _parameter_tangents(model, 2)
    graph = diagnostics.capture(model, x, loss)
    routed = route(graph, tangents)
    assert _error(routed.total, _double_backprop(model, x, loss, tangents)) < 1e-12
    flat = torch.cat([t.reshape(2, -1) for t in tangents.values()], 1)
    found = torch.cat([routed.gn[name].reshape(2, -1) for name in tangents], 1)
    expected = flat @ diagnostics.parameter_hessian(graph, "gn")
    assert (found - expected).norm() < 1e-12 * expected.norm()


def test_frozen_and_unused_parameters() -> None:
    model, x = _network("dead end", torch.device("cpu"))
    model.head.bias.requires_grad_(False)
    graph = diagnostics.capture(model, x, wavy)
    tangents = {n: t for n, t in _parameter_tangents(model, 1).items() if n != "head.bias"}
    routed = route(graph, tangents)
    assert "head.bias" not in routed.total
    assert not routed.total["unused.weight"].any()
    assert routed.total["used.weight"].any()
    assert all(p.grad is None for p in model.parameters())


def test_the_gradients_of_users_tangents_and_modes_do_not_matter() -> None:
    model, x = _network("diamond", torch.device("cpu"))
    tangents = _parameter_tangents(model, 2)
    graph = diagnostics.capture(model, x, wavy)
    expected = route(graph, tangents).total
    with torch.no_grad():
        found = route(graph, {n: t.clone().requires_grad_() for n, t in tangents.items()}).total
    assert all(torch.equal(found[n], value) for n, value in expected.items())
    assert not any(value.requires_grad for value in found.values())


def test_bad_tangents_are_refused_with_the_cause() -> None:
    model, x = _network("diamond", torch.device("cpu"))
    graph = diagnostics.capture(model, x, wavy)
    weight = torch.randn(2, 4, 5, dtype=torch.float64)
    with pytest.raises(DiagnosticsError, match="no tangents were given"):
        route(graph, {})
    with pytest.raises(KeyError, match=r"neither a node nor a parameter.*stem\.0\.weight"):
        route(graph, {"stem.0.wait": weight})
    with pytest.raises(DiagnosticsError, match=r"need \('k', 4, 5\) and torch.float64"):
        route(graph, {"stem.0.weight": weight[0]})
    with pytest.raises(DiagnosticsError, match=r"dtype torch.float32"):
        route(graph, {"stem.0.weight": weight.float()})
    with pytest.raises(DiagnosticsError, match="same number k"):
        route(graph, {"stem.0.weight": weight, "stem.0.bias": torch.randn(3, 4, dtype=torch.float64)})
    with torch.no_grad():
        model.stem[0].weight += 1
    with pytest.raises(StaleGraphError, match="Capture again"):
        route(graph, {"stem.0.weight": weight})


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)).double()
    graph = diagnostics.capture(model, torch.tensor([[0, 1], [2, 3]]), wavy)
    with pytest.raises(CaptureError, match=r"parameter '0\.weight' is sparse.*sparse=False"):
        route(graph, {"1.weight": torch.randn(1, 3, 3, dtype=torch.float64)})
