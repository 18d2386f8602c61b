"""Local derivatives: the closed form of dense layers against vector-Jacobian products, and where it must not apply."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import diagnostics
from diagnostics.graph.dense_layer import DenseLayer
from diagnostics.graph.local import differentiate
from tests.helpers.networks import ResidualCat
from tests.helpers.oracle import relative_error

ACTIVATIONS = [
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Tanh, nn.Tanhshrink,
]  # fmt: skip


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


def _assert_both_ways_agree(graph: diagnostics.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = differentiate(graph)
    with monkeypatch.context() as patch:
        patch.setattr(DenseLayer, "recognise", staticmethod(lambda _node, _parents: None))
        generic = differentiate(graph)
    for name, signal in generic.signals.items():
        assert relative_error(closed.signals[name], signal) < 1e-14
    for name, jacobians in generic.jacobians.items():
        assert jacobians.keys() == closed.jacobians[name].keys()
        for parent, jacobian in jacobians.items():
            assert relative_error(closed.jacobians[name][parent], jacobian) < 1e-14
        curvature = closed.curvatures.get(name, {})
        for pair, block in generic.curvatures.get(name, {}).items():
            assert relative_error(curvature.get(pair, torch.zeros_like(block)), block) < 1e-13


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_layers_in_closed_form_equal_vector_jacobian_products(
    activation: type[nn.Module], bias: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(4, 5, bias=bias), activation())
    model = nn.Sequential(nn.Linear(3, 4), hidden, nn.Linear(5, 2)).double().to(device)
    x = torch.randn(6, 3, dtype=torch.float64, device=device)
    graph = diagnostics.capture(model, x, _wavy, ["0", "1", "2"])
    # Identity: the linear map; Softsign and Tanhshrink are several operations and take the generic way
    known = DenseLayer.recognise(graph["1"], [graph["0"]])
    assert (known is None) == (activation in (nn.Softsign, nn.Tanhshrink, nn.Softshrink))
    _assert_both_ways_agree(graph, monkeypatch)


def test_an_activation_without_a_second_derivative_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid()), nn.Linear(4, 2))
    graph = diagnostics.capture(model, torch.randn(6, 3), _wavy)
    with pytest.raises(diagnostics.DiagnosticsError, match=r"node '1' cannot be differentiated twice: .*hardsigmoid"):
        diagnostics.hessian_blocks(graph)


class _Node(nn.Module):
    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear, x)


LOOKALIKES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "weight from the parent": lambda f, x: torch.tanh(x @ f(x).T @ x),
    "parent times itself": lambda f, x: torch.tanh(torch.mm(x[:4], x[:4].T)).repeat(2, 1)[:6],
    "bias from the parent": lambda f, x: torch.tanh(torch.addmm(x, x, f.weight)),
    "scaled": lambda f, x: torch.tanh(torch.addmm(f.bias, x, f.weight, alpha=2)),
    "masked weight": lambda f, x: torch.tanh(x @ (f.weight * torch.eye(4, dtype=x.dtype))),
    "shifted parent": lambda f, x: torch.tanh(f(x.sin())),
    "skip": lambda f, x: torch.tanh(f(x)) + x,
    "two activations": lambda f, x: torch.tanh(f(x).exp()),
    "sequence": lambda f, x: torch.tanh(f(x.view(6, 2, 2).repeat(1, 1, 2))).flatten(1)[:, :4],
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_of_a_dense_layer_take_the_generic_way(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), _Node(LOOKALIKES[name]), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    graph = diagnostics.capture(model, x, _wavy, ["0", "1", "2"])
    assert DenseLayer.recognise(graph["1"], [graph["0"]]) is None


def test_frozen_and_normalised_weights_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh())
    model = nn.Sequential(nn.Linear(3, 4), frozen, normed, nn.Linear(4, 2)).double()
    graph = diagnostics.capture(model, torch.randn(6, 3, dtype=torch.float64), _wavy, ["0", "1", "2", "3"])
    _assert_both_ways_agree(graph, monkeypatch)


def test_local_jacobians_and_curvatures_equal_torch_func() -> None:
    torch.manual_seed(0)
    model = ResidualCat().double()
    graph = diagnostics.capture(model, torch.randn(3, 5, dtype=torch.float64), _wavy)
    local = differentiate(graph)
    early, late = graph["stem"].value.detach(), graph["block1"].value.detach()

    def block2(stem: Tensor, block1: Tensor) -> Tensor:
        late = torch.tanh(stem) + torch.tanh(block1)
        return model.block2(late)

    jacobian = torch.vmap(torch.func.jacrev(block2, argnums=(0, 1)))(early, late)
    assert relative_error(local.jacobians["block2"]["stem"], jacobian[0]) < 1e-14
    assert relative_error(local.jacobians["block2"]["block1"], jacobian[1]) < 1e-14

    signal = local.signals["block2"]
    (slope,) = torch.autograd.grad(graph.loss, [graph["head"].value], retain_graph=True)
    assert relative_error(local.signals["head"], slope) < 1e-14

    def weighted(stem: Tensor, block1: Tensor, weights: Tensor) -> Tensor:
        return (weights * block2(stem, block1)).sum()

    hessian = torch.vmap(torch.func.jacrev(torch.func.jacrev(weighted, argnums=(0, 1)), argnums=(0, 1)))(
        early, late, signal
    )
    curvature = local.curvatures["block2"]
    for (p, i), (q, j) in [(("stem", 0), ("stem", 0)), (("block1", 1), ("stem", 0)), (("block1", 1), ("block1", 1))]:
        expected = hessian[i][j]
        actual = curvature.get((p, q), torch.zeros_like(expected))
        assert (actual - expected).norm() < 1e-14
