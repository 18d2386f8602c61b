"""The quadratic model of the objective against dense matrices."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hessopt.banded.quadratic_model import QuadraticModel
from hessopt.banded.systems import SampleSystem
from hessopt.network.cliques import band_cliques
from tests.helpers.kronecker_reference import batch, dense, factors_of, flat, skip, unflat

RTOL = 1e-11


def test_step_reduction_and_penalty() -> None:
    net, (x, y, _) = skip(), batch()

    def loss_fn(z: Tensor) -> Tensor:
        return functional.mse_loss(z, y)

    tape, factors = factors_of(net, x, loss_fn)
    expected = dense(net, x, loss_fn)
    parameters = [[p.detach() for p in layer.parameters] for layer in tape.layers]
    lr = [[0.5, 1.0]] * 4
    decay = [[0.1 * v, 0.02] for v in range(4)]
    theta = flat(parameters)

    def spread(values: list[list[float]]) -> Tensor:
        return flat(
            [
                [torch.full_like(p, c) for p, c in zip(*pair, strict=True)]
                for pair in zip(parameters, values, strict=True)
            ]
        )

    omega = spread(decay)
    gradient = expected.gradient + omega * theta
    model = QuadraticModel(parameters, factors, unflat(gradient, parameters), lr, decay)
    assert model.gradient_norm() == pytest.approx(float(gradient.norm()), rel=RTOL)

    system = SampleSystem(factors, [[p.shape for p in own] for own in parameters], 2**30)
    step = model.step(0.03, band_cliques(tape.distances(), "full"), system)
    solution = torch.linalg.solve(expected.ggn + torch.diag(omega + 0.03), gradient)
    assert torch.allclose(flat(step), -spread(lr) * solution, rtol=1e-8, atol=1e-12)

    d = flat(step)
    reduction = -(gradient @ d) - d @ expected.ggn @ d / 2 - omega @ d.square() / 2
    assert model.predicted_reduction(step) == pytest.approx(float(reduction), rel=RTOL)
    change = omega @ ((theta + d).square() - theta.square()) / 2
    assert model.penalty_change(step) == pytest.approx(float(change), rel=RTOL)


def test_no_weight_decay_no_penalty() -> None:
    one = [[torch.ones(2)]]
    assert QuadraticModel(one, [], one, [[1.0]], [[0.0]]).penalty_change(one) == 0
