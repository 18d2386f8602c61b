"""Factors of linear layers against Jacobians by torch.func, and the check that samples do not mix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hessopt.errors import ModelError
from hessopt.linear_factors import check_uncoupled, linear_factors
from hessopt.output_curvature import residual_roots
from tests.hessopt.reference import NETWORKS, batch, chain, dense, factors_of, flat, record, skip, unflat

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
    factors = linear_factors(tape.layers, z, residual_roots(z))
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
    factor = linear_factors(tape.layers, z, residual_roots(z))[0]
    unit = torch.zeros(factor.size, dtype=torch.float64)
    unit[1 * len(x) + 4] = 1
    assert torch.allclose(factor.vjp(unit)[0], slope, rtol=RTOL)


def check(net: nn.Module, x: Tensor, loss_fn: Callable[[Tensor], Tensor], check_loss: bool = True) -> None:
    tape, loss, z = record(net, x, loss_fn)
    check_uncoupled(tape.layers, z, loss if check_loss else None)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_uncoupled_networks_pass(size: int) -> None:
    x, y, labels = batch(size)
    check(chain(), x, lambda z: functional.mse_loss(z, y))
    check(skip(), x, lambda z: functional.cross_entropy(z, labels))
    check(chain(), x, lambda z: z.sum())


class Mixed(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(2, 4).double(), mix, nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)))


def last_on_first(h: Tensor) -> Tensor:
    """Only the last sample depends on another, the first."""
    return torch.cat([h[:-1], h[-1:] + 1e-6 * h[:1]])


def first_on_last(h: Tensor) -> Tensor:
    """Only the first sample depends on another, the last."""
    return torch.cat([h[:1] + 1e-6 * h[-1:], h[1:]])


@pytest.mark.parametrize(
    "mix",
    [
        nn.BatchNorm1d(4, affine=False, dtype=torch.float64),
        lambda h: h - h.mean(dim=0),
        lambda h: h.flip(0),
        lambda h: h.roll(1, 0),
        last_on_first,
        first_on_last,
    ],
)
@pytest.mark.parametrize("size", [2, 5, 8])
def test_coupled_networks_are_found(mix: Callable[[Tensor], Tensor], size: int) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"depends on other samples.*batch-norm.*eval mode"):
        check(Mixed(mix), batch(size)[0], lambda z: z.square().mean())


def test_batch_norm_in_eval_mode_passes() -> None:
    torch.manual_seed(0)
    check(Mixed(nn.BatchNorm1d(4, affine=False, dtype=torch.float64).eval()), batch()[0], lambda z: z.square().mean())


@pytest.mark.parametrize("loss_fn", [lambda z: z.square().mean().sqrt(), lambda z: (z @ z.T).square().sum()])
def test_losses_that_couple_samples(loss_fn: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match=r"not a sum or mean over samples.*LeastSquares"):
        check(chain(), batch()[0], loss_fn)
    check(chain(), batch()[0], loss_fn, check_loss=False)
