"""The parametric Hessian and its parts against double back-propagation and torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

import diagnostics
from diagnostics.parametric import recognise
from tests.helpers.networks import (
    Attention,
    CalledTwice,
    Chain,
    Diamond,
    Normalised,
    Recurrent,
    ResidualCat,
    SkipIntoMerge,
)
from tests.helpers.oracle import relative_error
from tests.helpers.random_dags import Plan, build, plans


class SmallCNN(nn.Module):
    """Strided, padded and dilated convolutions, one of them used twice, a normalisation and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.shared = nn.Conv2d(3, 3, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.GroupNorm(1, 3)
        self.last = nn.Conv2d(3, 2, 2, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.first(x))))))
        return self.head(F.avg_pool2d(F.silu(self.last(self.norm(h))), 1).flatten(1))


class GroupedCNN(nn.Sequential):
    """Groups and one dimension, which have no structured map, and reflected padding."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), nn.Tanh(),
            nn.Flatten(2), nn.Conv1d(2, 1, 3, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(3, 2),
        )  # fmt: skip


class TiedLanguageModel(nn.Module):
    """The embedding is also the output layer: one source, two children."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(ids)))).mean(1)


class Functional(nn.Module):
    """Parameters that no module owns the use of: functional calls, a bare parameter, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return torch.tanh(F.linear(h, self.inner.weight) * self.scale)


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "chain": (lambda: Chain(5, 4, 3, 4, 3), lambda: _images(4, 5)),
    "residual_cat": (ResidualCat, lambda: _images(3, 5)),
    "diamond": (Diamond, lambda: _images(3, 5)),
    "skip_into_merge": (SkipIntoMerge, lambda: _images(3, 3)),
    "called_twice": (CalledTwice, lambda: _images(3, 5)),
    "attention": (Attention, lambda: _images(2, 4, 3)),
    "fused_attention": (lambda: Attention(fused=True), lambda: _images(2, 4, 3)),
    "transformer_layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True, activation="gelu"),
        lambda: _images(2, 3, 4),
    ),
    "layer_norm": (Normalised, lambda: _images(3, 5)),
    "lstm": (Recurrent, lambda: _images(2, 3, 3)),
    "cnn": (SmallCNN, lambda: _images(2, 2, 4, 4)),
    "grouped_cnn": (GroupedCNN, lambda: _images(2, 2, 4, 4)),
    "batch_norm_train": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        lambda: _images(5, 3),
    ),
    "batch_norm_eval": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval(),
        lambda: _images(5, 3),
    ),
    "batch_norm_cnn_train": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.BatchNorm2d(2),
            nn.Tanh(),
            nn.Conv2d(2, 2, 2, stride=2, padding=1),
            nn.Flatten(),
            nn.Linear(8, 2),
        ),
        lambda: _images(3, 1, 4, 4),
    ),
    "tied_embedding": (TiedLanguageModel, lambda: torch.tensor([[0, 1, 4], [1, 1, 3]])),
    "functional": (Functional, lambda: _images(3, 4)),
}


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).sum() / len(z)


def _double_backprop(model: nn.Module, x: Tensor, loss_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The Hessian and the generalized Gauss-Newton matrix, entry by entry."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def rows(values: Tensor) -> Tensor:
        grads = [torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True) for v in values]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in grads])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = model(x)
    gradients = torch.autograd.grad(loss_fn(z), parameters, create_graph=True, materialize_grads=True)
    hessian = rows(torch.cat([g.reshape(-1) for g in gradients]))
    free = z.detach().requires_grad_()
    curvature = torch.autograd.functional.hessian(loss_fn, free).reshape(free.numel(), free.numel())
    jacobian = rows(z.reshape(-1))
    model.load_state_dict(state)
    return hessian, jacobian.T @ curvature @ jacobian


@pytest.mark.parametrize("name", CASES)
def test_parametric_hessian_and_its_parts_equal_double_backpropagation(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, x = make().double(), inputs()
    hessian, ggn = _double_backprop(model, x, _wavy)
    graph = diagnostics.capture(model.to(device), x.to(device), _wavy)
    total, gn, tensor = (diagnostics.parameter_hessian(graph, part).cpu() for part in ("total", "gn", "tensor"))
    assert total.shape == (sum(p.numel() for p in model.parameters()),) * 2
    assert relative_error(total, hessian) < 1e-12
    assert relative_error(gn, ggn) < 1e-12
    assert (tensor - (hessian - ggn)).norm() < 1e-12 * hessian.norm()
    assert torch.equal(total, total.T)


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt() * weight + bias


def _batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool, _momentum: float, eps: float
) -> Tensor:
    shape, dims = (1, -1, *[1] * (x.ndim - 2)), [0, *range(2, x.ndim)]
    if training:
        mean, var = x.mean(dims), x.var(dims, correction=0)
    return (x - mean.view(shape)) / (var.view(shape) + eps).sqrt() * weight.view(shape) + bias.view(shape)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward mode uses it
@pytest.mark.parametrize("name", CASES)
def test_equals_torch_func_hessian(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, x = make().double(), inputs()
    matrix = diagnostics.parameter_hessian(diagnostics.capture(model, x, _wavy))
    sizes = {name: p.shape for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(point: Tensor) -> Tensor:
        parts = point.split([size.numel() for size in sizes.values()])
        values = {name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}
        return _wavy(torch.func.functional_call(model, values | {n: b.clone() for n, b in buffers.items()}, (x,)))

    # torch.func's derivatives of the fused normalisations are wrong (docs/parametric.md): these are written out
    monkeypatch.setattr(F, "layer_norm", _layer_norm)
    monkeypatch.setattr(F, "batch_norm", _batch_norm)
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.func.hessian(loss)(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert relative_error(matrix, expected) < 1e-10


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(most=4))
def test_parametric_hessian_of_random_dags_equals_double_backpropagation(plan: Plan) -> None:
    assume(-1 not in plan.vertices[-1].parents or len(plan.vertices[-1].parents) > 1)
    model, x, _ = build(plan)
    hessian, ggn = _double_backprop(model, x, _wavy)
    graph = diagnostics.capture(model, x, _wavy, ["output"])
    assert (diagnostics.parameter_hessian(graph) - hessian).norm() <= 1e-12 * hessian.norm()
    assert (diagnostics.parameter_hessian(graph, "gn") - ggn).norm() <= 1e-12 * max(ggn.norm(), hessian.norm())


@pytest.mark.parametrize("name", ["residual_cat", "cnn", "transformer_layer", "batch_norm_cnn_train"])
def test_structured_layers_equal_the_entry_by_entry_map(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    graph = diagnostics.capture(make().double(), inputs(), _wavy)
    structured = {part: diagnostics.parameter_hessian(graph, part) for part in ("total", "gn", "tensor")}
    monkeypatch.setattr(recognise, "_patch_map", lambda *_: None)
    for part, matrix in structured.items():
        assert relative_error(matrix, diagnostics.parameter_hessian(graph, part)) < 1e-12


def test_the_result_does_not_depend_on_the_nodes() -> None:
    torch.manual_seed(0)
    model, x = ResidualCat().double(), _images(3, 5)
    matrices = [
        diagnostics.parameter_hessian(diagnostics.capture(model, x, _wavy, nodes))
        for nodes in (None, ["output"], ["merge", "block1"])
    ]
    assert torch.equal(matrices[0], matrices[1])
    assert torch.equal(matrices[0], matrices[2])


def test_blocks_are_addressed_by_parameter_names() -> None:
    torch.manual_seed(0)
    model, x = Chain(5, 4, 3).double(), _images(3, 5)
    blocks = diagnostics.parameter_blocks(diagnostics.capture(model, x, _wavy))
    assert list(blocks.slices) == [name for name, _ in model.named_parameters()]
    assert blocks["0.0.weight", "1.bias"].shape == (20, 3)
    assert torch.equal(blocks["0.0.weight", "1.bias"], blocks["1.bias", "0.0.weight"].T)
    assert len(blocks) == 16
    with pytest.raises(KeyError, match=r"no parameter '0\.weight' that requires grad; there are '0\.0\.weight'"):
        blocks["0.weight", "1.bias"]


def test_frozen_parameters_are_left_out_and_the_rest_is_unchanged() -> None:
    torch.manual_seed(0)
    model, x = SmallCNN().double(), _images(2, 2, 4, 4)
    everything = diagnostics.parameter_blocks(diagnostics.capture(model, x, _wavy))
    model.first.bias.requires_grad_(False)
    model.shared.weight.requires_grad_(False)
    model.last.weight.requires_grad_(False)  # its bias is trained
    some = diagnostics.parameter_blocks(diagnostics.capture(model, x, _wavy))
    assert set(some.slices) == set(everything.slices) - {"first.bias", "shared.weight", "last.weight"}
    for pair in some:
        assert relative_error(some[pair], everything[pair]) < 1e-13
    with pytest.raises(diagnostics.DiagnosticsError, match="no parameter of the model requires grad"):
        diagnostics.parameter_hessian(diagnostics.capture(model.requires_grad_(False), x, _wavy))


def test_unused_parameters_have_zero_rows() -> None:
    torch.manual_seed(0)
    blocks = diagnostics.parameter_blocks(diagnostics.capture(Functional().double(), _images(3, 4), _wavy))
    assert not blocks.matrix[blocks.slices["unused"]].any()
    assert blocks["scale", "inner.weight"].any()


def test_parameters_that_enter_the_loss_directly_count_to_the_gauss_newton_part() -> None:
    torch.manual_seed(0)
    model, x = Chain(5, 4, 3).double(), _images(3, 5)
    weight = model[0][0].weight

    def loss(z: Tensor) -> Tensor:
        return _wavy(z) + 0.1 * weight.square().sum() * z.square().mean()

    graph = diagnostics.capture(model, x, loss)
    assert graph.loss_parameters == ("0.0.weight",)
    gradients = torch.autograd.grad(loss(model(x)), list(model.parameters()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = [torch.autograd.grad(g, list(model.parameters()), retain_graph=True) for g in flat]
    hessian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    assert relative_error(diagnostics.parameter_hessian(graph), hessian) < 1e-12
    parts = [diagnostics.parameter_hessian(graph, part) for part in ("gn", "tensor")]
    assert relative_error(parts[0] + parts[1], hessian) < 1e-12


def test_dropout_is_replayed_and_state_outside_of_buffers_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double().train()
    x = _images(4, 3)
    graph = diagnostics.capture(model, x, _wavy)
    torch.rand(7)  # the caller's own draws must not matter
    first = diagnostics.parameter_hessian(graph)
    assert torch.equal(first, diagnostics.parameter_hessian(diagnostics.capture(model, x, _wavy))) is False
    torch.testing.assert_close(graph.refined.loss, graph.loss)

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(3, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc(x) * self.calls

    with pytest.raises(diagnostics.DiagnosticsError, match="keeps state outside of buffers"):
        diagnostics.parameter_hessian(diagnostics.capture(Counts().double(), x, _wavy))


def test_refusals_name_the_size_the_part_or_the_parameter() -> None:
    model, x = Chain(5, 4, 3).double(), _images(3, 5)
    graph = diagnostics.capture(model, x, _wavy)
    with pytest.raises(diagnostics.MemoryBudgetError, match=r"takes \d+\.\d GiB, more than the limit of 0\.0 GiB"):
        diagnostics.parameter_hessian(graph, memory_limit=100)
    with pytest.raises(ValueError, match='part must be "total", "gn" or "tensor", got \'all\''):
        diagnostics.parameter_hessian(graph, "all")
    with torch.no_grad():
        model[0][0].weight.add_(1)
    with pytest.raises(diagnostics.StaleGraphError, match=r"'0\.0\.weight' was changed"):
        diagnostics.parameter_hessian(graph)


def test_neither_grads_nor_buffers_nor_random_state_change() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    graph = diagnostics.capture(model, _images(5, 3), _wavy)
    rng = torch.get_rng_state()
    diagnostics.parameter_hessian(graph)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_weight_norm_is_exact_where_the_fused_kernel_of_pytorch_is_not() -> None:
    class ByHand(nn.Module):
        def __init__(self, normed: nn.Module) -> None:
            super().__init__()
            parts = dict(normed[0].named_parameters())
            self.bias = parts["bias"]
            self.length, self.direction = (parts[f"parametrizations.weight.original{i}"] for i in (0, 1))
            self.head = normed[2]

        def forward(self, x: Tensor) -> Tensor:
            weight = self.length * self.direction / self.direction.square().sum(1, keepdim=True).sqrt()
            return self.head(torch.tanh(x @ weight.T + self.bias))

    torch.manual_seed(0)
    for width in (3, 4):  # with 4, the weight looks like a batch of its rows: it becomes a node, the samples one
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        model, x = nn.Sequential(normed, nn.Tanh(), nn.Linear(4, 2)).double(), _images(width, 3)
        hessian, ggn = _double_backprop(ByHand(model), x, _wavy)
        graph = diagnostics.capture(model, x, _wavy)
        assert relative_error(diagnostics.parameter_hessian(graph), hessian) < 1e-12
        assert relative_error(diagnostics.parameter_hessian(graph, "gn"), ggn) < 1e-12


def test_an_operation_with_a_wrong_second_derivative_is_refused() -> None:
    class Skewed(torch.autograd.Function):
        """x² summed over features, with a backward that is no gradient of anything."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum(-1, keepdim=True)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * (2 * x + x.cumsum(-1))

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[1].forward = Skewed.apply
    model[2] = nn.Linear(1, 2).double()
    graph = diagnostics.capture(model, _images(5, 3), _wavy, ["0", "1"])
    with pytest.raises(diagnostics.DiagnosticsError, match=r"node '1'.*not symmetric"):
        diagnostics.hessian_blocks(graph)
