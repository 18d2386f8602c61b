"""Factors of any layer, derivatives of the network included, against dense Jacobians by torch.func."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from diagnostics.autograd.sample_mixing import sample_rows
from hessopt import LeastSquares
from hessopt.closure.output_curvature import check_separable, residual_roots
from hessopt.closure.runner import ClosureRunner
from hessopt.errors import ModelError
from hessopt.factors.exact_curvature import ExactCurvature
from hessopt.factors.layer_factors import general_factors, layer_factors, row_dims
from hessopt.factors.sample_factors import DenseFactor, OuterFactor, symmetric_product
from hessopt.network.parameter_uses import _leaves
from tests.helpers.kronecker_reference import NETWORKS, batch, chain, dense, factors_of, flat, record, unflat

RTOL = 1e-11


def matrix_of(factors: list, like: list[list[Tensor]]) -> Tensor:
    """Ĵ of all layers, (N, P), column by column."""
    count = sum(t.numel() for layer in like for t in layer)
    columns = []
    for unit in torch.eye(count, dtype=torch.float64):
        parts = unflat(unit, like)
        columns.append(sum(f.jvp(part) for f, part in zip(factors, parts, strict=True)))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("loss", ["mse", "cross entropy"])
def test_gram_jvp_vjp_trace_against_the_dense_factor(name: str, loss: str) -> None:
    net = NETWORKS[name]()
    x, y, labels = batch(outputs=sum(net.layers[v].out_features for v in net.outputs))
    loss_fn = (
        (lambda z: functional.mse_loss(z, y)) if loss == "mse" else (lambda z: functional.cross_entropy(z, labels))
    )
    tape, factors = factors_of(net, x, loss_fn)
    like = [list(layer.parameters) for layer in tape.layers]
    jacobian, expected = matrix_of(factors, like), dense(net, x, loss_fn)
    assert torch.allclose(jacobian.T @ jacobian, expected.ggn, rtol=RTOL, atol=1e-14)
    generator = torch.Generator().manual_seed(2)
    for layer, factor, part in zip(tape.layers, factors, expected.slices, strict=True):
        own = jacobian[:, part]
        damping = [0.3, 0.7][: len(layer.parameters)]
        diagonal = flat([[torch.full_like(p, d) for p, d in zip(layer.parameters, damping, strict=True)]])
        assert torch.allclose(factor.gram(damping), own / diagonal @ own.T, rtol=RTOL, atol=1e-14)
        weights = torch.randn(factor.size, generator=generator, dtype=torch.float64)
        assert torch.allclose(flat([factor.vjp(weights)]), own.T @ weights, rtol=RTOL, atol=1e-14)
        assert factor.trace().item() == pytest.approx(own.square().sum().item(), rel=RTOL)
    assert factors[0].size == len(x) * (y.shape[1] - (loss == "cross entropy"))


def test_residuals_need_no_hessian() -> None:
    net, (x, y, _) = chain(), batch()
    tape, _, z = record(net, x, lambda z: (z - y).square().sum() / 2)
    factors = layer_factors(tape.layers, tape.uses, tape.structure.rows, z, residual_roots(z)).factors
    jacobian = matrix_of(factors, [list(layer.parameters) for layer in tape.layers])
    assert torch.allclose(jacobian.T @ jacobian, dense(net, x, lambda z: (z - y).square().sum() / 2).ggn, rtol=RTOL)


def test_layer_that_the_output_does_not_depend_on() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            self.head(x)
            return self.fc(x)

    _, factors = factors_of(Unused(), batch()[0], lambda z: z.square().sum())
    assert factors[0].trace() == 0  # called first
    assert factors[1].trace() > 0


def test_no_curvature_at_all() -> None:
    _, factors = factors_of(chain(), batch()[0], lambda z: z.sum())
    assert factors[0].size == 0
    assert factors[0].gram([1.0, 1.0]).shape == (0, 0)


def test_memory_layout_of_rows() -> None:
    """Row number k·B + b belongs to root row k and sample b."""
    net, (x, y, _) = chain(), batch()
    tape, _, z = record(net, x, lambda z: (z - y).square().sum() / 2)
    (slope,) = torch.autograd.grad(z[4, 1], [net.layers[0].weight], retain_graph=True)
    factor = layer_factors(tape.layers, tape.uses, tape.structure.rows, z, residual_roots(z)).factors[0]
    unit = torch.zeros(factor.size, dtype=torch.float64)
    unit[1 * len(x) + 4] = 1
    assert torch.allclose(factor.vjp(unit)[0], slope, rtol=RTOL)


X = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Net(nn.Module):
    """A network whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = forward
        for name, make in modules.items():
            setattr(self, name, make())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def norm(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.LayerNorm(width)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(*shape))


def fc(a: int, b: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b, bias)


def image(x: Tensor) -> Tensor:
    return torch.cat([x.sin(), x.cos(), x * 2, x + 1], dim=1).reshape(-1, 2, 2, 2)


def tied(n: Any, x: Tensor) -> Tensor:
    h = n.table(torch.arange(10).reshape(5, 2)).sum(1) + n.up(x)
    return functional.linear(torch.tanh(h), n.table.weight, n.head)


# name: (network, layers that need the rows one by one)
LAYERS: dict[str, tuple[Callable[[], Net], set[str]]] = {
    "called twice": (lambda: Net(lambda n, x: n.b(torch.tanh(n.a(torch.tanh(n.a(x))))), a=fc(2, 2), b=fc(2, 3)), set()),
    "sequence": (lambda: Net(lambda n, x: n.b(n.a(x.reshape(5, 2, 1)).tanh()).sum(1), a=fc(1, 3), b=fc(3, 2)), set()),
    "time first": (
        lambda: Net(lambda n, x: n.b(n.a(x.T.reshape(2, 5, 1)).tanh()).sum(0), a=fc(1, 3), b=fc(3, 2)),
        set(),
    ),
    "layer norm": (lambda: Net(lambda n, x: n.b(n.c(n.a(x)).sin()), a=fc(2, 4), c=norm(4), b=fc(4, 2)), set()),
    "convolution": (
        lambda: Net(
            lambda n, x: n.b(n.c(image(x)).tanh().flatten(1)),
            c=lambda: nn.Conv2d(2, 4, 2, stride=1, padding=1, groups=2, dilation=2),
            b=fc(16, 2),
        ),
        set(),
    ),
    "group norm": (
        lambda: Net(
            lambda n, x: n.g(n.c(image(x))).tanh().sum((2, 3)),
            c=lambda: nn.Conv2d(2, 4, 1),
            g=lambda: nn.GroupNorm(2, 4),
        ),
        set(),
    ),
    "tied embedding": (lambda: Net(tied, table=lambda: nn.Embedding(10, 3), up=fc(2, 3), head=parameter(10)), set()),
    "plain parameters": (
        lambda: Net(lambda n, x: n.a(x * n.s).tanh() + n.p, s=parameter(2), p=parameter(1, 3), a=fc(2, 3)),
        set(),
    ),
    "function of a parameter": (lambda: Net(lambda n, x: n.a(x * n.s.exp()).tanh(), s=parameter(2), a=fc(2, 3)), {""}),
    "matrix product": (lambda: Net(lambda n, x: (x @ n.w).tanh() @ n.v.T, w=parameter(2, 3), v=parameter(2, 3)), {""}),
    "attention": (
        lambda: Net(
            lambda n, x: n.m(*[n.a(x.reshape(5, 2, 1))] * 3)[0].sum(1),
            a=fc(1, 4),
            m=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        {"m", "m.out_proj"},
    ),
    "batch norm in training": (
        lambda: Net(lambda n, x: n.b(n.n(n.a(x)).tanh()), a=fc(2, 3), n=lambda: nn.BatchNorm1d(3), b=fc(3, 2)),
        {"a", "n"},
    ),
    "batch norm in evaluation": (
        lambda: Net(lambda n, x: n.b(n.n(n.a(x)).tanh()), a=fc(2, 3), n=lambda: nn.BatchNorm1d(3).eval(), b=fc(3, 2)),
        set(),
    ),
    "permuted samples": (lambda: Net(lambda n, x: n.b(n.a(x).flip(0).tanh()), a=fc(2, 3), b=fc(3, 2)), set()),
    "dead units": (lambda: Net(lambda n, x: n.b((n.a(x) - 3 * x[:, :1].sign()).relu()), a=fc(2, 3), b=fc(3, 2)), set()),
}


def laplace(net: nn.Module, x: Tensor) -> Tensor:
    """Second derivatives of every kind, and a boundary of other size, of which the rows come first."""
    x = x.clone().requires_grad_()
    u = net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curl,) = torch.autograd.grad((slope * slope.new_tensor([1.0, 2.0])).sum(), x, create_graph=True)
    inside = curl[:, 0] * u[:, 0] + slope[:, 1] ** 2 + curl[:, 1]
    return torch.cat([net(x.detach()[:3] + 1).sum(1) - net(x.detach()[1:4]).sum(1), inside])


def third(net: nn.Module, x: Tensor) -> Tensor:
    """A third derivative, and two residuals for every point."""
    x = x.clone().requires_grad_()
    first = u = net(x).sum(1, keepdim=True)
    for _ in range(3):
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        u = g[:, :1]
    return torch.cat([u + g[:, 1:], first.square()], dim=1)


PHYSICS: dict[str, tuple[Callable[[], Net], Any, set[str]]] = {
    "laplace": (lambda: Net(lambda n, x: n.b(n.a(x).tanh()), a=fc(2, 4), b=fc(4, 1)), laplace, set()),
    "laplace, deeper": (
        lambda: Net(lambda n, x: n.c(n.b(n.a(x).tanh()).sin() + x[:, :1]), a=fc(2, 3, False), b=fc(3, 3), c=fc(3, 1)),
        laplace,
        set(),
    ),
    "third": (
        lambda: Net(lambda n, x: n.c(n.b(n.a(x).tanh()).sin()), a=fc(2, 3), b=fc(3, 3), c=fc(3, 1)),
        third,
        set(),
    ),
    "called twice": (
        lambda: Net(lambda n, x: n.b(n.a(n.a(x).tanh()).tanh()), a=fc(2, 2), b=fc(2, 1)),
        laplace,
        set(),
    ),
    "layer norm": (
        lambda: Net(lambda n, x: n.b(n.c(n.a(x)).tanh()), a=fc(2, 4), c=norm(4), b=fc(4, 1)),
        laplace,
        {"c"},
    ),
    "convolution": (
        lambda: Net(lambda n, x: n.b(n.c(image(x)).tanh().flatten(1)), c=lambda: nn.Conv2d(2, 2, 2), b=fc(2, 1)),
        laplace,
        {"c"},
    ),
}


def compare(net: nn.Module, residuals: Callable[[nn.Module, Tensor], Tensor], general: set[str]) -> None:
    exact = ExactCurvature(net, 2**30)
    parameters = list(net.parameters())
    recorder = exact.recorder(parameters)
    with recorder.recording():
        evaluation = ClosureRunner(lambda: LeastSquares(residuals(net, X)), parameters, net).evaluate()
    r = evaluation.output
    layers = exact.layers(recorder.uses)
    rows = exact.structure(evaluation, layers, recorder.uses).rows
    found = layer_factors(layers, recorder.uses, rows, r, residual_roots(r))
    assert {layers[v].name for v in found.general} == general
    reference = residuals(net, X)
    columns = reference.reshape(len(r), -1).T.reshape(-1)  # rows are numbered by column, then sample
    generator = torch.Generator().manual_seed(2)
    for layer, factor in zip(layers, found.factors, strict=True):
        jacobian = torch.stack(
            [
                torch.cat(
                    [
                        g.reshape(-1)
                        for g in torch.autograd.grad(c, layer.parameters, retain_graph=True, materialize_grads=True)
                    ]
                )
                for c in columns
            ]
        )
        scale = float(jacobian.abs().max()) or 1.0
        assert torch.allclose(factor.matrix(), jacobian, rtol=1e-10, atol=1e-12 * scale)
        damping = [0.3, 0.7, 0.2, 0.9][: len(layer.parameters)]
        diagonal = flat([[torch.full_like(p, d) for p, d in zip(layer.parameters, damping, strict=True)]])
        gram = jacobian / diagonal @ jacobian.T
        assert torch.allclose(factor.gram(damping), gram, rtol=1e-10, atol=1e-12 * float(gram.abs().max()))
        y = torch.randn(len(columns), generator=generator, dtype=torch.float64)
        assert torch.allclose(flat([factor.vjp(y)]), jacobian.T @ y, rtol=1e-10, atol=1e-12 * scale)
        step = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in layer.parameters]
        assert torch.allclose(factor.jvp(step), jacobian @ flat([step]), rtol=1e-10, atol=1e-12 * scale)
        assert factor.trace().item() == pytest.approx(jacobian.square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_any_layer_against_the_dense_jacobian(name: str) -> None:
    make, general = LAYERS[name]
    compare(make(), lambda net, x: net(x), general)


@pytest.mark.parametrize("name", PHYSICS)
def test_residuals_of_derivatives_against_the_dense_jacobian(name: str) -> None:
    make, residuals, general = PHYSICS[name]
    compare(make(), residuals, general)


def test_residuals_that_mix_samples() -> None:
    net = Net(lambda n, x: n.b(n.a(x).tanh()), a=fc(2, 4), b=fc(4, 1))
    compare(net, lambda n, x: (n(x) - n(x).mean())[:4], {"a", "b"})


def test_wide_layers_form_no_jacobian() -> None:
    """Both ways to a Gram matrix, by the sizes that make them the cheaper one."""
    generator = torch.Generator().manual_seed(0)
    for width, uses in ((3, 4), (40, 2)):
        left, right = (torch.randn(k, 6, uses, width, generator=generator, dtype=torch.float64) for k in (2, 2))
        factor = OuterFactor(left, right, True, True)
        rows = factor.matrix()
        scale = torch.cat([rows.new_full((width * (width - 1),), 0.5), rows.new_full((width,), 2.0)])
        assert torch.allclose(factor.gram([0.5, 2.0]), rows / scale @ rows.T, rtol=RTOL, atol=1e-11)
        assert (12 * uses**2 * 2 * width > (12 + 2 * uses) * width**2) == (width == 3)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
def test_symmetric_product(count: int) -> None:
    rows = torch.randn(count, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(symmetric_product(rows), rows @ rows.T, rtol=RTOL, atol=1e-13)


def test_rows_one_by_one_equal_the_closed_form() -> None:
    net, (x, y, _) = chain(), batch()
    tape, _, z = record(net, x, lambda z: (z - y).square().sum() / 2)
    roots = residual_roots(z)
    closed = layer_factors(tape.layers, tape.uses, tape.structure.rows, z, roots).factors
    general = general_factors([layer.parameters for layer in tape.layers], z, roots)
    for a, b in zip(closed, general, strict=True):
        assert isinstance(a, OuterFactor)
        assert isinstance(b, DenseFactor)
        assert torch.allclose(a.matrix(), b.matrix(), rtol=RTOL, atol=1e-14)


class Mixed(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(2, 4).double(), mix, nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (lambda h: h, lambda b: list(range(b))),
        (lambda h: h.flip(0), lambda b: list(range(b))[::-1]),
        (lambda h: h.roll(1, 0), lambda b: [*range(1, b), 0]),
        (lambda h: torch.cat([h[:-1], h[-1:] + 1e-6 * h[:1]]), lambda b: None if b > 1 else [0]),
        (lambda h: torch.cat([h[:1] + 1e-6 * h[-1:], h[1:]]), lambda b: None if b > 1 else [0]),
        (lambda h: h - h.mean(dim=0), lambda b: None if b > 1 else [0]),
    ],
)
def test_samples_of_rows(mix: Callable[[Tensor], Tensor], expected: Any, size: int) -> None:
    torch.manual_seed(0)
    net = Mixed(mix)
    tape, _, z = record(net, batch(size)[0], lambda z: z.square().mean())
    first, last = sample_rows(z, [use.result for use in tape.uses], row_dims(tape.uses))
    assert (first if first is None else first.tolist()) == expected(size)
    assert last.tolist() == list(range(size))


@pytest.mark.parametrize("loss_fn", [lambda z: z.square().mean().sqrt(), lambda z: (z @ z.T).square().sum()])
def test_losses_that_couple_samples(loss_fn: Callable[[Tensor], Tensor]) -> None:
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ModelError, match=r"not a sum or mean over samples.*LeastSquares"):
        check_separable(loss_fn(z), z)
    check_separable(z.square().mean(), z)


def test_leaves_of_arguments_are_those_of_the_tree() -> None:
    """Of plain arguments, nested ones, and kinds that only the tree knows."""
    t, p = torch.ones(2), nn.Parameter(torch.ones(2))
    pair = namedtuple("pair", "a b")
    values = (t, [p, (1, None, [t])], {"a": t, "b": (p, 2.0)}, OrderedDict(x=p), pair(t, p), torch.Size([2]), slice(1))
    found, expected = _leaves(values), tree_leaves(values)
    assert len(found) == len(expected)
    assert all(a is b or a == b for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("uses", [1, 3, 9])
def test_operations_of_a_gram_matrix_are_those_of_the_cheaper_way(uses: int) -> None:
    """9 numbers each on the left, 4 on the right, P = 36: products of pairs, or half of Ĵ Ĵᵀ."""
    factor = OuterFactor(torch.ones(1, 5, uses, 9), torch.ones(1, 5, uses, 4), True, True)
    assert factor.gram_operations == min(uses * (uses + 1) / 2 * 13, 18)
    assert DenseFactor(torch.ones(5, 7), (torch.Size([7]),)).gram_operations == 3.5
