"""What one evaluation of a closure shows: factors, their layers and graph, against torch.func; and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.errors import MemoryBudgetError
from hessopt import LeastSquares
from hessopt.closure.protocol import Evaluation
from hessopt.closure.runner import ClosureRunner
from hessopt.errors import ModelError, NotConvexError
from hessopt.factors.exact_curvature import ExactCurvature, Structure
from hessopt.factors.sample_factors import Factor
from hessopt.network.layers import Layer
from hessopt.network.parameter_uses import Use
from tests.helpers.kronecker_reference import NETWORKS, batch, chain, dense, losses, record

F64 = torch.float64
CURVED = {
    "mse": lambda z: functional.mse_loss(z, torch.ones_like(z)),
    "cross entropy": lambda z: functional.cross_entropy(z, torch.arange(len(z)) % z.shape[1]),
}


def mse(z: Tensor) -> Tensor:
    return z.square().mean()


class Two(nn.Module):
    """Two layers with a tanh between them, and a third that is called last or not at all."""

    def __init__(self, uses_spare: bool = False) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2).double()
        self.first, self.second = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.uses_spare = uses_spare

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(torch.tanh(self.first(x)))
        return self.spare(z) if self.uses_spare else z


def evaluate(exact: ExactCurvature, closure: Callable[[], Any]) -> tuple[Evaluation, tuple[Layer, ...], list[Use]]:
    parameters = list(exact.module.parameters())
    recorder = exact.recorder(parameters)
    with recorder.recording():
        evaluation = ClosureRunner(closure, parameters, exact.module).evaluate()
    return evaluation, exact.layers(recorder.uses), recorder.uses


def factors(
    exact: ExactCurvature, closure: Callable[[], Any], sign: int = 1
) -> tuple[Sequence[Factor], Structure, tuple[Layer, ...]]:
    evaluation, layers, uses = evaluate(exact, closure)
    structure = exact.structure(evaluation, layers, uses)
    return exact.factors(evaluation, layers, uses, structure.rows, sign, F64), structure, layers


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("loss", [*CURVED, "residuals"])
@pytest.mark.parametrize("name", NETWORKS)
def test_factors_are_a_root_of_the_gauss_newton_matrix(name: str, loss: str, sign: int) -> None:
    """Of −f, where f is maximized; residuals cannot be."""
    net, x = NETWORKS[name](), batch()[0]
    if loss == "residuals":
        if sign < 0:
            with pytest.raises(NotConvexError, match="cannot be maximized"):
                factors(ExactCurvature(net, 2**30), lambda: LeastSquares(net(x)), sign)
            return
        found, _, layers = factors(ExactCurvature(net, 2**30), lambda: LeastSquares(net(x)))
        objective = lambda z: z.square().sum() / 2  # noqa: E731
    else:
        objective = CURVED[loss]
        found, _, layers = factors(ExactCurvature(net, 2**30), lambda: sign * objective(net(x)), sign)
    owners = [dict(net.named_modules())[layer.name] for layer in layers]
    root = torch.cat([factor.matrix() for factor in found], 1)
    assert torch.allclose(root.mT @ root, dense(net, x, objective, owners).ggn, rtol=1e-9, atol=1e-12)


def test_layers_come_in_the_order_of_use_and_those_not_used_last() -> None:
    for uses_spare in (True, False):
        net = Two(uses_spare)
        _, layers, _ = evaluate(ExactCurvature(net, 2**30), lambda net=net: mse(net(batch()[0])))
        assert [layer.name for layer in layers] == ["first", "second", "spare"]


def test_what_is_known_of_a_network_is_kept_until_it_changes() -> None:
    net = chain()
    exact = ExactCurvature(net, 2**30)
    x, y, _ = batch()
    shown = [factors(exact, closure)[1] for closure in (
        lambda: functional.mse_loss(net(x), y),
        lambda: functional.mse_loss(net(x + 1), y),
        lambda: functional.mse_loss(net(x[:4]), y[:4]),  # another batch size
        lambda: LeastSquares(net(x[:4])),
    )]  # fmt: skip
    net.eval()
    shown.append(factors(exact, lambda: LeastSquares(net(x[:4])))[1])
    assert shown[0] is shown[1]
    assert len({id(structure) for structure in shown}) == 4
    assert len({structure.edges for structure in shown}) == 1


def test_layers_without_a_closed_form_are_told_of_when_they_change(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    exact, x = ExactCurvature(net, 2**30), batch()[0]
    with caplog.at_level(logging.WARNING, logger="hessopt.factors.exact_curvature"):
        for train in (True, True, False, True):
            net.train(train)
            factors(exact, lambda: mse(net(x)))
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == ["no closed form for layers '0', '1'"] * 2


def test_a_loss_that_is_not_convex_in_the_output_is_refused() -> None:
    net, x = chain(), batch()[0]
    with pytest.raises(NotConvexError):
        factors(ExactCurvature(net, 2**30), lambda: -mse(net(x)))
    with pytest.raises(NotConvexError):
        factors(ExactCurvature(net, 2**30), lambda: losses(2)["mse"](net(x)), -1)


def test_second_derivatives_of_the_loss_that_do_not_fit_are_refused() -> None:
    net, x = chain(outputs=3), batch(5)[0]
    limit = 3 * 5 * 3**2 * 8
    factors(ExactCurvature(net, limit), lambda: mse(net(x)))
    with pytest.raises(MemoryBudgetError, match="5 samples with 3 outputs each"):
        factors(ExactCurvature(net, limit - 1), lambda: mse(net(x)))
    factors(ExactCurvature(net, limit - 1), lambda: LeastSquares(net(x)))  # which has none


def test_recording_changes_nothing() -> None:
    net, x = chain(in_place=True), batch()[0]
    before = net(x)
    recorder = ExactCurvature(net, 2**30).recorder(list(net.parameters()))
    with recorder.recording():
        during = net(x)
    assert torch.equal(before, during)
    for a, b in zip(*(torch.autograd.grad(z.sum(), list(net.parameters())) for z in (before, during)), strict=True):
        assert torch.allclose(a, b, rtol=1e-14)
    assert not any(module._forward_hooks for module in net.modules())


def test_derivatives_leave_the_graph_as_it_is() -> None:
    net, x = chain(), batch()[0].requires_grad_()

    def closure() -> LeastSquares:
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return LeastSquares(slope)

    assert factors(ExactCurvature(net, 2**30), closure)[1].edges == ((0, 1), (1, 2), (2, 3), (3, 4))


def penalized(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net(x)
    return mse(z) + net.first.weight.square().sum(), z


def physics(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    z = net(x)
    (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    return mse(slope), z


def unrelated(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net(x)
    return mse(x.clone().requires_grad_()), z


def detached(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net(x)
    return mse(z), z.detach()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (penalized, "'first.weight' reaches the loss otherwise than through the network's output.*weight_decay"),
        (physics, r"otherwise than through the network's output.*LeastSquares"),
        (unrelated, "does not depend on the output"),
        (detached, r"output .* no autograd tape.*without `.detach\(\)`"),
    ],
)
def test_refused_losses(loss_fn: Any, message: str) -> None:
    net, x = Two(), batch()[0]
    with pytest.raises(ModelError, match=message):
        factors(ExactCurvature(net, 2**30), lambda: loss_fn(net, x))


def test_empty_batch() -> None:
    with pytest.raises(ModelError, match="empty batch"):
        record(chain(), batch(0)[0], lambda z: z.sum())
