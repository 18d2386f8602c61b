"""Products on the whole tape, and single blocks as operators, against the exact recursion."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import diagnostics
from diagnostics.autograd import lean_kernels
from diagnostics.errors import DiagnosticsError, StaleGraphError
from diagnostics.matrix_free.block_operator import BlockOperator
from diagnostics.matrix_free.node_products import NodeProducts
from tests.helpers import random_dags
from tests.helpers.networks import (
    Attention,
    CalledTwice,
    Chain,
    Counterexample,
    DeadEnd,
    Diamond,
    Recurrent,
    ResidualCat,
    SkipIntoMerge,
)
from tests.helpers.oracle import relative_error

PARTS = ("total", "gn", "tensor")


def wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


class Convolutions(nn.Module):
    """Every kind of convolution that is run as a linear map, batch-norm, and ones that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.SiLU())
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(4))
        self.c = nn.Sequential(nn.Conv2d(4, 3, 3, padding="same"), nn.GELU(), nn.ConvTranspose2d(3, 2, 2))
        self.d = nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(34, 3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.d(self.c(torch.tanh(self.b(a)) + a))


class TwoOutputs(nn.Module):
    """Two outputs, one computed from the other, both nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(torch.tanh(self.stem(x)))
        return first, self.second(torch.sin(first))


class InPlace(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))


def _of_both(z: tuple[Tensor, Tensor]) -> Tensor:
    return (z[0].sin().sum(1) * z[1].exp().sum(1)).mean()


def _in_place(z: Tensor) -> Tensor:
    return z.exp_().square().mean()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor], bool]] = {
    "skip into a merge": (ResidualCat, (6, 5), wavy, True),
    "diamond": (Diamond, (6, 5), wavy, True),
    "called twice": (CalledTwice, (6, 5), wavy, True),
    "attention": (lambda: Attention(fused=True), (4, 3, 3), wavy, True),
    "recurrent": (Recurrent, (4, 3, 3), wavy, True),
    "dead end": (DeadEnd, (4, 5), wavy, True),
    "unrelated nodes": (Counterexample, (4, 3), wavy, True),
    "skip": (SkipIntoMerge, (4, 3), wavy, True),
    "convolutions": (Convolutions, (3, 2, 10, 10), wavy, False),
    "batch statistics": (Convolutions, (3, 2, 10, 10), wavy, True),
    "dropout": (lambda: nn.Sequential(Chain(5, 4, 4, 3), nn.Dropout(0.5)), (6, 5), wavy, True),
    "two outputs": (TwoOutputs, (4, 5), _of_both, True),
    "in place": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
        (4, 5),
        _in_place,
        True,
    ),
}


def _graph(name: str, device: torch.device, nodes: object = None, reduction: str = "mean") -> diagnostics.Graph:
    build, shape, loss, training = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double().to(device).train(training)
    x = torch.randn(shape, dtype=torch.float64).to(device)
    return diagnostics.capture(model, x, loss, nodes, reduction=reduction)  # type: ignore[arg-type]


def _check_products(graph: diagnostics.Graph, tolerance: float = 1e-12) -> None:
    """All parts of ``Σ_w H[v,w] t_w`` with tangents of every sample's own, at all nodes v."""
    names = [node.name for node in graph.nodes]
    tangents = {n.name: torch.randn(3, *n.shape, dtype=torch.float64, device=n.value.device) for n in graph.nodes}
    blocks = diagnostics.hessian_blocks(graph)
    found = {
        "total": NodeProducts.of(graph).total(tangents, names),
        "gn": NodeProducts.of(graph).gauss_newton(tangents, names),
        "tensor": NodeProducts.of(graph).tensor(tangents, names)[0],
    }
    flat = {name: t.reshape(3, graph.samples, -1) for name, t in tangents.items()}
    for v in names:
        expected = {
            part: sum(torch.einsum("sij,ksj->ksi", getattr(blocks, part)[v, w], flat[w]) for w in names)
            for part in PARTS
        }
        for part in PARTS:
            difference = found[part][v].reshape(3, graph.samples, -1) - expected[part]
            assert difference.norm() <= tolerance * (1e-3 + expected["total"].norm()), (part, v)


@pytest.mark.parametrize("name", NETWORKS)
def test_products_equal_the_exact_blocks(name: str, device: torch.device) -> None:
    _check_products(_graph(name, device))


@settings(deadline=None, max_examples=40)
@given(random_dags.plans())
def test_products_equal_the_exact_blocks_on_random_graphs(plan: random_dags.Plan) -> None:
    model, x, nodes = random_dags.build(plan)
    _check_products(diagnostics.capture(model, x, wavy, nodes), 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "name", ["skip into a merge", "called twice", "batch statistics", "convolutions", "two outputs"]
)
def test_block_operators_are_the_batch_means(name: str, reduction: str, device: torch.device) -> None:
    graph = _graph(name, device, reduction=reduction)
    blocks = diagnostics.hessian_blocks(graph).mean()
    scale = max(block.norm() for block in blocks.total.values())
    for v, w in blocks.total:
        for part in PARTS:
            op = BlockOperator(graph, v, w, part)
            expected = getattr(blocks, part)[v, w]
            assert op.shape == expected.shape
            unit = torch.eye(len(expected), dtype=torch.float64, device=device)
            assert (op.to_dense() - expected).norm() < 1e-13 * scale
            assert (op.adjoint_matmat(unit) - expected.mT).norm() < 1e-13 * scale
            assert op.symmetric == (v == w)


def test_columns_in_parts_are_the_same(device: torch.device) -> None:
    graph = _graph("convolutions", device)
    unlimited = BlockOperator(graph, "a", "b")
    little = BlockOperator(graph, "a", "b")
    little.memory_limit = 5 * 8 * graph.whole.entries
    columns = torch.randn(unlimited.shape[1], 9, dtype=torch.float64, device=device)
    assert NodeProducts.of(graph).columns_in(little.memory_limit) < 5
    assert relative_error(little @ columns, unlimited @ columns) < 1e-14


def test_the_whole_tape_leaves_no_trace_and_is_recorded_once() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    graph = diagnostics.capture(model, x, wavy, ["0", "3"])
    state, buffers = torch.get_rng_state(), {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        tape = graph.whole
    torch.manual_seed(1)
    state = torch.get_rng_state()
    BlockOperator(graph, "0", "3").to_dense()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert graph.whole is tape
    for node in graph.nodes:
        assert torch.equal(tape.values[node.name], node.value)  # the same dropout mask, the same batch statistics


def test_convolutions_and_batch_norm_run_as_linear_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own second derivative of a convolution also computes the gradient of its weight."""
    model = Convolutions().double().eval()
    graph = diagnostics.capture(model, torch.randn(3, 2, 10, 10, dtype=torch.float64), wavy)
    uses: list[tuple[int, ...]] = []
    call = lean_kernels._Convolution.__call__

    def counted(self: lean_kernels._Convolution, x: Tensor) -> Tensor:
        uses.append(tuple(self.weight.shape))
        return call(self, x)

    monkeypatch.setattr(lean_kernels._Convolution, "__call__", counted)
    _ = graph.whole
    # the first convolution sees no node, and padding="same" is left to PyTorch
    assert uses == [(4, 2, 3, 3), (2, 2, 3)]
    names: list[str] = []
    pending = [graph.whole.loss.grad_fn]
    seen = set()
    while pending:
        function = pending.pop()
        if function is not None and function not in seen:
            seen.add(function)
            names.append(function.name())
            pending += [parent for parent, _ in function.next_functions]
    assert not any("BatchNorm" in name for name in names)


def test_no_tensor_part_is_exactly_zero_without_nonlinearity() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    graph = diagnostics.capture(model, torch.randn(6, 5, dtype=torch.float64), wavy, ["0", "2"])
    assert not BlockOperator(graph, "0", "2", "tensor").to_dense().any()
    assert BlockOperator(graph, "0", "2", "gn").to_dense().any()


def test_products_are_counted() -> None:
    graph = _graph("diamond", torch.device("cpu"))
    x = torch.randn(BlockOperator(graph, "left", "right").shape[1], 5, dtype=torch.float64)
    BlockOperator(graph, "left", "right") @ x
    assert NodeProducts.of(graph).count == {"total": 5, "tensor": 0, "vjp": 0}
    BlockOperator(graph, "left", "right", "tensor") @ x
    BlockOperator(graph, "left", "right", "gn") @ x
    assert NodeProducts.of(graph).count == {"total": 5, "tensor": 5, "vjp": 10}  # G: there, and back


def test_bad_use_is_refused_with_the_cause() -> None:
    model = Chain(5, 4, 4, 3).double()
    graph = diagnostics.capture(model, torch.randn(6, 5, dtype=torch.float64), wavy)
    with pytest.raises(KeyError, match="no node 'nowhere'"):
        BlockOperator(graph, "nowhere", "0")
    with pytest.raises(ValueError, match="part must be"):
        BlockOperator(graph, "0", "1", "half")  # type: ignore[arg-type]
    op = BlockOperator(graph, "0", "1")
    op @ torch.randn(4, dtype=torch.float64)  # everything is recorded
    with torch.no_grad():
        model[0][0].weight += 1
    with pytest.raises(StaleGraphError, match="Capture again"):
        op @ torch.randn(4, dtype=torch.float64)

    class Detour(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx, g):
            return g.detach() * ctx.saved_tensors[0].exp()  # the signal is off the tape

    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Detour.apply(x)

    wrong = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), Bent()), nn.Linear(4, 3)).double()
    bent = diagnostics.capture(wrong, torch.randn(6, 5, dtype=torch.float64), wavy)
    with pytest.raises(DiagnosticsError, match=r"node '1' cannot be differentiated twice|node '1\.1' cannot"):
        BlockOperator(bent, "0", "0").to_dense()


def test_a_model_that_keeps_state_is_refused() -> None:
    calls = []

    class Stateful(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x) * len(calls)

    model = nn.Sequential(nn.Linear(5, 4), Stateful(4, 3)).double()
    graph = diagnostics.capture(model, torch.randn(6, 5, dtype=torch.float64), wavy)
    with pytest.raises(DiagnosticsError, match="keeps state outside of buffers"):
        _ = graph.whole


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_without_statistics_or_weights(training: bool) -> None:
    for norm in (nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4)):
        model = nn.Sequential(nn.Linear(5, 4), norm, nn.Tanh(), nn.Linear(4, 3)).double()
        model(torch.randn(7, 5, dtype=torch.float64) * 3 + 1)  # statistics that are not the default
        model.train(training)
        _check_products(diagnostics.capture(model, torch.randn(6, 5, dtype=torch.float64), wavy, ["0", "2"]))


def test_unbatched_convolutions_are_left_alone() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.conv = nn.Linear(4, 8), nn.Conv1d(2, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.lift(x))
            return torch.stack([F.conv1d(row.view(2, 4), self.conv.weight).flatten() for row in h])

    model = Single().double()
    _check_products(diagnostics.capture(model, torch.randn(3, 4, dtype=torch.float64), wavy, ["lift"]))
