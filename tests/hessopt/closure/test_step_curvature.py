"""Products on the kept tape beside dense matrices by torch.func, and what goes around the output."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hessopt.closure.step_curvature import COST, StepCurvature, bypassed
from hessopt.errors import ClosureError
from tests.helpers.networks import Attention, CalledTwice, Chain, Diamond, Normalised, ResidualCat

RTOL = 1e-10


class Tied(nn.Module):
    """One weight in two places, and one that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) @ self.inner.weight[:, :3]


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def attention() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 3), Attention())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: Chain(5, 4, 4, 3),
    "residual": ResidualCat,
    "diamond": Diamond,
    "called twice": CalledTwice,
    "normalised": Normalised,
    "tied": Tied,
    "batch norm": batch_norm,
    "attention": attention,
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda z: (z - 0.3).square().mean(),
    "cross entropy": lambda z: functional.cross_entropy(z, torch.arange(len(z), device=z.device) % 3),
    "quartic": lambda z: (z**4).sum() + z.prod(),
    "linear": lambda z: z.sum(),
}


def network(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    return net.to(device), torch.randn(6, 5, dtype=torch.float64).to(device)


def dense(net: nn.Module, x: Tensor, loss_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, Hessian and Gauss-Newton matrix by torch.func over one flat vector."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]
    theta = torch.cat([p.detach().reshape(-1) for p in parameters])

    def output(theta: Tensor) -> Tensor:
        parts = [piece.reshape(p.shape) for piece, p in zip(theta.split(sizes), parameters, strict=True)]
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        return torch.func.functional_call(net, {**dict(zip(names, parts, strict=True)), **buffers}, (x,))

    z = output(theta).detach()
    jacobian = torch.autograd.functional.jacobian(output, theta).reshape(z.numel(), -1)
    bent = torch.autograd.functional.hessian(loss_fn, z).reshape(z.numel(), z.numel())
    hessian = torch.autograd.functional.hessian(lambda t: loss_fn(output(t)), theta)
    gradient = torch.autograd.functional.jacobian(lambda t: loss_fn(output(t)), theta)
    return gradient, hessian, jacobian.T @ bent @ jacobian


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_products_equal_dense_matrices(name: str, loss: str) -> None:
    check_products(name, loss, "cpu")


def test_products_on_a_device(device: torch.device) -> None:
    check_products("residual", "cross entropy", device)


def check_products(name: str, loss: str, device: torch.device | str) -> None:
    net, x = network(name, device)
    gradient, hessian, ggn = dense(net, x, LOSSES[loss])
    z = net(x)
    tape = StepCurvature(LOSSES[loss](z), list(net.parameters()), z, verify=True)
    scale = float(hessian.norm() + ggn.norm())

    def close(found: Tensor, expected: Tensor) -> bool:
        return bool((found - expected).norm() <= RTOL * scale * expected.shape[-1] ** 0.5)

    for kind in ("hessian", "ggn"):
        assert torch.allclose(tape.gradient(kind), gradient, rtol=RTOL, atol=1e-12)
    vectors = torch.randn(5, len(gradient), dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    for v in (vectors[0], vectors):
        assert close(tape.hessian(v), v @ hessian)
        assert close(tape.ggn(v), v @ ggn)
        assert close(tape.tensor(v), v @ (hessian - ggn))
        t, g = tape.split(v)
        assert close(t, v @ (hessian - ggn))
        assert close(g, v @ ggn)
    assert tape.products == {"hessian": 6, "ggn": 12, "tensor": 12}
    work = 6 * (COST["hessian"] + COST["ggn"] + COST["tensor"] + COST["split"]) + COST["second gradient"]
    assert tape.work == pytest.approx(work)


def test_least_squares_output() -> None:
    net, x = network("chain")
    gradient, _, ggn = dense(net, x, lambda z: (z - 1).square().sum() / 2)
    r = net(x) - 1
    tape = StepCurvature(r.square().sum() / 2, list(net.parameters()), r)
    assert torch.allclose(tape.ggn(gradient), ggn @ gradient, rtol=1e-10, atol=1e-12)


def test_some_parameters_in_another_order() -> None:
    net, x = network("chain")
    _, hessian, ggn = dense(net, x, LOSSES["mse"])
    chosen = [net[2].bias, net[0][0].weight]
    index = torch.cat([torch.arange(len(hessian))[-3:], torch.arange(20)])
    z = net(x)
    tape = StepCurvature(LOSSES["mse"](z), chosen, z)
    unit = torch.eye(23, dtype=torch.float64)
    assert torch.allclose(tape.hessian(unit), hessian[index][:, index], atol=1e-12)
    assert torch.allclose(tape.ggn(unit), ggn[index][:, index], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    net, x = network("chain")
    gradient, hessian, _ = dense(net, x, LOSSES["mse"])
    net.to(dtype)
    z = net(x.to(dtype))
    tape = StepCurvature(LOSSES["mse"](z), list(net.parameters()), z)
    found = tape.hessian(gradient.to(tape.dtype))
    assert found.dtype == tape.dtype == torch.float32
    expected = hessian @ gradient
    assert float((found.double() - expected).norm() / expected.norm()) < 20 * torch.finfo(dtype).eps


def test_no_output() -> None:
    net, x = network("chain")
    tape = StepCurvature(LOSSES["mse"](net(x)), list(net.parameters()))
    with pytest.raises(ClosureError, match="needs the network's output"):
        tape.ggn(tape.gradient())


def test_gradient_off_the_tape_is_refused() -> None:
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return (2 * ctx.saved_tensors[0].detach() * g.detach()).data

    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    z = Off.apply(p)
    for kind in ("hessian", "ggn"):
        with pytest.raises(RuntimeError, match="computed off the tape"):
            StepCurvature(z.sum() * 1.0, [p], z, verify=True).gradient(kind)


def test_what_goes_around_the_output() -> None:
    net, x = network("chain")
    parameters = list(net.parameters())
    z = net(x)
    assert bypassed(z.square().mean(), z, parameters) == []
    assert bypassed(z.square().mean() + parameters[2].norm(), z, parameters) == [2]
    assert bypassed(z.sum(), z, parameters) == []
    total = z.sum()
    assert bypassed(total, total, parameters) == []
    hidden = net[0](x)
    z = net[2](net[1](hidden))
    assert bypassed(z.sum() + hidden.sum(), z, parameters) == [0, 1]
    first, second = net(x).unbind(1)[:2]  # one function with several outputs
    assert bypassed(first.sum(), first, parameters) == []
    assert bypassed((first * second).sum(), first, parameters) == list(range(6))
