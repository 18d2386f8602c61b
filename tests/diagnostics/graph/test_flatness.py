"""What is called flat has no local curvature, and what bends is not called flat, custom operations among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import diagnostics
from diagnostics.graph.flatness import cannot_bend
from diagnostics.graph.graph import Node
from diagnostics.graph.local import differentiate


class _OwnRelu(torch.autograd.Function):
    """A ReLU that no list of names can know."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        result: Tensor = signal * (a > 0)
        return result


class _OwnExp(_OwnRelu):
    """An exponential of the same name on the tape as any other Python function."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.exp()

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return signal * a.exp()


class _Rounding(torch.autograd.Function):
    """A straight-through estimator: the slope of the identity."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.round()

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        return signal


class _Between(nn.Module):
    """Two activations on images, joined by a function."""

    def __init__(self, join: Callable[[_Between, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3)
        self.weight, self.join, self.out = nn.Parameter(torch.randn(4, 4)), join, nn.Identity()
        self.norm = nn.BatchNorm2d(2)
        self.norm.running_mean, self.norm.running_var = torch.randn(2), 0.5 + torch.rand(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.join(self, self.a(x), self.b(x))).flatten(1)


FLAT: dict[str, Callable[[_Between, Tensor, Tensor], Tensor]] = {
    "sum": lambda m, a, b: a + 2 * b - a.mean(1, keepdim=True),
    "cat and relu": lambda m, a, b: F.leaky_relu(torch.cat([a, b.relu()], 1)),
    "convolution": lambda m, a, b: m.conv(a.relu()) + m.conv(b),
    "product with a parameter": lambda m, a, b: (a @ m.weight) * 3 + m.weight * b,
    "division by a parameter": lambda m, a, b: a / (1 + m.weight.square()),
    "pooling": lambda m, a, b: F.max_pool2d(a, 2) - F.avg_pool2d(b, 2),
    "views": lambda m, a, b: (
        a.transpose(2, 3).reshape(len(a), 2, 2, 8)[:, :1] + b.flatten(1).view(len(b), 2, 2, 8)[:, 1:]
    ),
    "batch-norm with running statistics": lambda m, a, b: F.relu(m.norm.eval()(a) + b),
    "batch-norm written out": lambda m, a, b: (a - m.norm.running_mean[0]) / (m.norm.running_var[0] + 1).sqrt() * 3 + b,
    "dropout": lambda m, a, b: F.dropout(a, 0.5, training=True) + F.dropout(b, 0.5, training=False),
    "hard functions": lambda m, a, b: F.relu6(a) + b.abs() + F.softshrink(a) - F.hardtanh(b) + a.clamp(-1, 0.5),
    "prelu": lambda m, a, b: F.prelu(a, m.weight[0, :2]) + b,
    "selections": lambda m, a, b: torch.maximum(a, b) + torch.where(a > b, 2 * a, b) + a.sort(2)[0] + b[:, [1, 0]],
    "other pooling": lambda m, a, b: F.adaptive_max_pool2d(a, 2) + F.adaptive_avg_pool2d(b, 2) + a.amax((2, 3), True),
    "resampling": lambda m, a, b: F.interpolate(a, scale_factor=2, mode="bilinear") + F.pad(b, (2,) * 4, "reflect"),
    "a Python function": lambda m, a, b: _OwnRelu.apply(a) + _Rounding.apply(b),
}
BENT: dict[str, Callable[[_Between, Tensor, Tensor], Tensor]] = {
    "product": lambda m, a, b: a * b,
    "square": lambda m, a, b: a * a,
    "matrix product": lambda m, a, b: a @ b.mT,
    "division": lambda m, a, b: m.weight / (5 + a),
    "tanh": lambda m, a, b: a.tanh() + b,
    "softmax": lambda m, a, b: a.softmax(1),
    "batch-norm with batch statistics": lambda m, a, b: m.norm.train()(a) + b,
    "layer norm": lambda m, a, b: F.layer_norm(a, [4]),
    "batch-norm with a computed weight": lambda m, a, b: F.batch_norm(
        a, m.norm.running_mean, m.norm.running_var, b.mean((0, 2, 3))
    ),
    "gelu behind eval batch-norm": lambda m, a, b: F.gelu(m.norm.eval()(a)),
    "hard swish": lambda m, a, b: F.hardswish(a),
    "a bending Python function": lambda m, a, b: _OwnExp.apply(a) + _OwnRelu.apply(b),
    "a convolution with a computed weight": lambda m, a, b: F.conv2d(a, m.conv.weight * b.mean()),
}


@pytest.mark.parametrize("name", [*FLAT, *BENT])
def test_flatness_is_that_of_the_local_curvature(name: str) -> None:
    torch.manual_seed(0)
    model = _Between({**FLAT, **BENT}[name]).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    graph = diagnostics.capture(model, x, lambda z: (torch.sin(z) * z).sum(), ["a", "b", "out"])
    node = graph["out"]
    parents = [graph[p].value for p in node.parents]
    slopes = torch.autograd.grad(node.segment, parents, torch.randn_like(node.segment), create_graph=True)
    slope = torch.stack([s.square().sum() for s in slopes]).sum()  # its derivative is 2 (second derivative) · slope
    seconds = torch.autograd.grad(slope, parents, retain_graph=True, allow_unused=True) if slope.requires_grad else ()
    assert any(bool(second.any()) for second in seconds if second is not None) == (name in BENT)
    assert any(bool(block.any()) for block in differentiate(graph).curvatures["out"].values()) == (name in BENT)
    state, tape = torch.get_rng_state(), node.segment.grad_fn
    assert cannot_bend(node, parents) == (name in FLAT)
    assert torch.equal(state, torch.get_rng_state())
    torch.autograd.grad(node.segment.sum(), parents, allow_unused=True)  # the tape is as it was
    assert tape is node.segment.grad_fn
    assert all(parameter.grad is None for parameter in model.parameters())


SATURATED: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda z: torch.tanh(1000 * z.sign() + z),
    "sigmoid": lambda z: torch.sigmoid(z - 1e4),
    "softmax": lambda z: (1e6 * z).softmax(1),
    "softplus": lambda z: F.softplus(z + 100),
    "gelu": lambda z: F.gelu(z + 100),
    "silu": lambda z: F.silu(z - 1e4),
    "elu on the linear side": lambda z: F.elu(z.abs() + 1),
    "hard swish on the linear side": lambda z: F.hardswish(z + 100),
    "a huber loss on the linear side": lambda z: F.smooth_l1_loss(1e6 * z, torch.zeros_like(z), reduction="none"),
}


@pytest.mark.parametrize("name", SATURATED)
def test_a_smooth_function_bends_where_it_is_saturated_too(name: str) -> None:
    torch.manual_seed(0)
    parent = (torch.randn(4, 3, dtype=torch.float64) + 0.1).requires_grad_()
    value = SATURATED[name](parent)
    slope = torch.autograd.grad(value.sum(), parent, create_graph=True)[0]
    second = torch.autograd.grad(slope.sum(), parent)[0] if slope.requires_grad else torch.zeros(1)
    assert not second.any()  # what the values alone would show
    assert not cannot_bend(_node(value), [parent])


def test_an_operation_without_a_second_derivative_is_not_called_flat() -> None:
    class Once(_OwnRelu):
        @staticmethod
        @once_differentiable
        def backward(ctx: Any, signal: Tensor) -> Tensor:
            (a,) = ctx.saved_tensors
            result: Tensor = signal * a.exp()
            return result

    parent = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert not cannot_bend(_node(Once.apply(parent)), [parent])


def _node(segment: Tensor) -> Node:
    return Node("node", ("parent",), (), (), segment.detach(), segment, None)


class _Residual(nn.Module):
    """A residual block in the layout of ResNets."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), activation()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.act(x + self.bn(self.conv(x)))
        return z


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize("training", [False, True])
def test_a_convolutional_network_with_batch_norm(activation: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), activation()), _Residual(activation)]
    model = nn.Sequential(*body, nn.Dropout(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    model.train(training)
    batch = torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.randint(3, (6,))
    report = diagnostics.diagnose(model, batch, F.cross_entropy, sections=["metrics"], progress=False)
    bends = [node["bends"] for node in report.sections["network"]["nodes"]]
    tensor = report.table().tensor_norm
    straight = activation in (nn.ReLU, nn.LeakyReLU) and not training
    assert any(bends) != straight
    assert bool((tensor == 0).all()) == straight
    assert any(v.wording == "flat" for v in report.verdicts) == straight
    assert not any(v.wording == "no_signal" for v in report.verdicts)
