"""Predicted imbalance against gradient descent: on the linearised network to rounding, on the real one nearly."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics.conservation.imbalance import geometric_sum, predict_imbalance
from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.graph.capture import capture
from diagnostics.parametric.hessian import parameter_hessian


def _net(width: int, activation: type[nn.Module] = nn.ReLU, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width, bias=bias), activation(), nn.Linear(width, 3, bias=bias)).double()


def _data(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (24,), generator=generator)
    return (centers[y] + torch.randn(24, 5, generator=generator, dtype=torch.float64)).to(device), y.to(device)


def _mse(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, F.one_hot(y, 3).to(z.dtype))


def _simulate(model: nn.Sequential, loss_fn: Any, eta: float, steps: int, *, linearised: bool) -> float:
    """S of gradient descent on the network, or on its linearisation in the parameters."""
    x, y = _data(next(model.parameters()).device)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    now = {name: p.clone() for name, p in start.items()}

    def output(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    value, jacobian = output(start), torch.func.jacrev(output)(start)
    total = 0.0
    for _ in range(steps):
        leaves = {name: p.detach().requires_grad_() for name, p in now.items()}
        if linearised:
            away = {name: leaves[name] - start[name] for name in start}
            z = value + sum(torch.tensordot(jacobian[name], away[name], away[name].ndim) for name in start)
        else:
            z = output(leaves)
        gradients = dict(zip(leaves, torch.autograd.grad(loss_fn(z, y), list(leaves.values())), strict=True))
        total += (gradients["2.weight"].square().sum() - gradients["0.weight"].square().sum()).item()
        if "0.bias" in gradients:
            total -= gradients["0.bias"].square().sum().item()
        now = {name: now[name] - eta * gradients[name] for name in now}
    return total


@pytest.mark.parametrize("bias", [False, True])
def test_kernel_form_is_the_linearised_network_exactly(bias: bool, device: torch.device) -> None:
    model = _net(8, bias=bias).to(device)
    etas = [1e-3, 0.05, 0.3]
    found = predict_imbalance(model, _data(device), _mse, etas, 150)
    assert found.closed_form
    for i, eta in enumerate(etas):
        expected = _simulate(model, _mse, eta, 150, linearised=True)
        assert found.gradient_sum[0, i].item() == pytest.approx(expected, rel=1e-10)
        assert found.drift[0, i].item() == pytest.approx(eta**2 * expected, rel=1e-10)


def test_roll_out_is_the_linearised_network_exactly_for_cross_entropy(device: torch.device) -> None:
    model = _net(8).to(device)
    found = predict_imbalance(model, _data(device), F.cross_entropy, [0.05, 0.5], 100)
    assert not found.closed_form
    for i, eta in enumerate((0.05, 0.5)):
        expected = _simulate(model, F.cross_entropy, eta, 100, linearised=True)
        assert found.gradient_sum[0, i].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Identity])
@pytest.mark.parametrize("loss_fn", [_mse, F.cross_entropy])
def test_wide_networks_do_what_the_kernel_says(activation: type[nn.Module], loss_fn: Any) -> None:
    """Within 10 % at width 512; the linearisation is exact in the limit."""
    model = _net(512, activation)
    found = predict_imbalance(model, _data(), loss_fn, [0.01], 100)
    assert found.gradient_sum[0, 0].item() == pytest.approx(
        _simulate(model, loss_fn, 0.01, 100, linearised=False), rel=0.1
    )


def test_hessian_form_is_the_sum_over_eigenpairs() -> None:
    model, (x, y) = _net(6), _data()
    found = predict_imbalance(model, (x, y), _mse, [0.02, 0.1], 50, method="hessian")
    hessian = parameter_hessian(capture(model, x, lambda z: _mse(z, y)))
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(_mse(model(x), y), list(model.parameters()))])
    values, vectors = torch.linalg.eigh(hessian)
    first = model[0].weight.numel()
    balance = (gradient[first:] @ gradient[first:] - gradient[:first] @ gradient[:first]) / (gradient @ gradient)
    for i, eta in enumerate((0.02, 0.1)):
        total = 0.0
        for value, v in zip(values, vectors.mT, strict=True):
            if value > 0:
                c = (v @ gradient) ** 2 * balance
                total += sum((c * (1 - eta * value) ** (2 * t)).item() for t in range(50))
        assert found.gradient_sum[0, i].item() == pytest.approx(total, rel=1e-8)
    torch.testing.assert_close(found.stability, torch.tensor([0.02, 0.1], dtype=torch.float64) * values[-1])


def test_deeper_networks_have_one_row_a_pair() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    (x, y), eta = _data(), 1e-3
    found = predict_imbalance(model, (x, y), _mse, eta, 1)
    assert [q.name for q in found.quantities] == ["0 → 2", "2 → 4"]
    _mse(model(x), y).backward()
    squares = [(m.weight.grad.square().sum(), m.bias.grad.square().sum()) for m in model if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    expected = torch.stack([b[0] - a[0] - a[1] for a, b in pairwise(squares)])
    torch.testing.assert_close(found.gradient_sum[:, 0], expected)  # one step: no approximation is left


def test_geometric_sum() -> None:
    x = torch.tensor([1.0, 1 - 1e-14, 0.999, 0.5, 0.1, 0.0, -0.4, -0.99, 1.01], dtype=torch.float64)
    found = geometric_sum(1 - x, 300)
    expected = torch.stack([x**t for t in range(300)]).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for method in ("ntk", "hessian"):
        predict_imbalance(model, _data(), _mse, 1e-3, 10, method=method)  # type: ignore[arg-type]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("method", ["ntk", "hessian"])
def test_refused_near_the_edge_of_stability(method: Any) -> None:
    model, batch = _net(8), _data()
    top = predict_imbalance(model, batch, _mse, 1e-3, 10, method=method).stability[0].item() / 1e-3
    predict_imbalance(model, batch, _mse, 1.79 / top, 10, method=method)
    with pytest.raises(DiagnosticsError, match=r"ηλ_max = 1\.950 .* near 2"):
        predict_imbalance(model, batch, _mse, [1e-3, 1.95 / top], 10, method=method)


def test_bad_arguments_are_refused() -> None:
    model, batch = _net(8), _data()
    with pytest.raises(ValueError, match="method is"):
        predict_imbalance(model, batch, _mse, 0.1, 10, method="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be"):
        predict_imbalance(model, batch, _mse, 0.1, 0)
    with pytest.raises(ValueError, match="must be positive"):
        predict_imbalance(model, batch, _mse, [], 10)
    with pytest.raises(DiagnosticsError, match="not 1-homogeneous"):
        predict_imbalance(_net(8, nn.Tanh), batch, _mse, 0.1, 10)
    with pytest.raises(MemoryBudgetError, match="tangent kernels of 72 outputs"):
        predict_imbalance(model, batch, _mse, 0.1, 10, memory_limit=1000)
    with pytest.raises(MemoryBudgetError, match="Hessian of 64 parameters"):
        predict_imbalance(model, batch, _mse, 0.1, 10, method="hessian", memory_limit=1000)
    with pytest.raises(DiagnosticsError, match="diverges"):
        predict_imbalance(model, batch, lambda z, y: z.pow(4).mean(), 1e3, 100)
