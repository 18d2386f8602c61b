"""Conserved quantities are found by what the network does, and their gradients vanish in the direction of S θ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnostics.conservation.channel_slices import incoming, outgoing
from diagnostics.conservation.homogeneous_pairs import homogeneous_pairs
from diagnostics.conservation.quantity import ConservedQuantity
from tests.helpers.networks import Attention, CalledTwice, Chain, DeadEnd

_X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _found(model: nn.Module, x: Tensor = _X) -> dict[str, ConservedQuantity]:
    return {q.name: q for q in homogeneous_pairs(model, x)}


def _slope_along_symmetry(model: nn.Module, quantity: ConservedQuantity, x: Tensor) -> Tensor:
    """θᵀ S ∇L of each channel, for a loss of the output that has no symmetry."""
    model.zero_grad()
    model(x).sin().sum().backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return quantity.form(parameters, gradients)


class _Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], 1).relu())


class _Tied(nn.Module):
    """The second layer is the transposed first: no scaling keeps the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Chain(6, 8, 7, 3, activation=nn.ReLU), {"0.0 → 1.0": 8, "1.0 → 2": 7}),
        (Chain(6, 8, 3, activation=nn.PReLU), {"0.0 → 1": 8}),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)), {"0 → 3": 8}),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), {"1 → 3": 8}),
        (_Cat(), {"a + b → head": 1}),
    ],
)
def test_exact_quantities(model: nn.Module, expected: dict[str, int]) -> None:
    model = model.double()
    found = {name: q for name, q in _found(model).items() if q.exact}
    assert {name: q.channels for name, q in found.items()} == expected
    for quantity in found.values():
        assert quantity.defect == 0.0  # factors are powers of two: not even rounding
        model.eval()  # no dropout: the law holds for any mask, and this one loss
        assert _slope_along_symmetry(model, quantity, _X).abs().max() <= 1e-13


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid])
def test_smooth_activations_are_refused_with_the_operation(activation: type[nn.Module]) -> None:
    model = Chain(6, 8, 3, activation=activation).double()
    quantity = _found(model)["0.0 → 1"]
    assert not quantity.exact
    assert activation.__name__.lower() in quantity.reason.lower()
    assert f"{quantity.defect:.1e}" in quantity.reason
    assert _slope_along_symmetry(model, quantity, _X).abs().max() > 1e-3


def test_gate_is_conserved_on_its_linear_side_only() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.out = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.nn.functional.silu(self.gate(x)) * self.value(x))

    found = _found(Gate().double())
    assert found["value → out"].exact
    assert not found["gate → out"].exact
    assert "Silu" in found["gate → out"].reason


def test_weights_that_are_used_twice_or_tied_are_refused() -> None:
    assert not any(q.exact for q in homogeneous_pairs(CalledTwice().double(), _X[:, :5]))
    assert not any(q.exact for q in homogeneous_pairs(_Tied().double(), _X))


def test_what_feeds_the_output_beside_its_reader_is_refused() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return h + self.second(h.relu())

    quantity = _found(Beside().double())["first → second"]
    assert not quantity.exact
    assert "feeds the output directly" in quantity.reason


def test_unread_layers_have_none() -> None:
    found = _found(DeadEnd().double(), _X[:, :5])
    assert not any("head" in q.sources for q in found.values())
    assert not any(q.exact and q.consumers for q in _found(Attention().double(), _X.reshape(16, 2, 3)).values())


def test_evaluation_mode_is_another_network() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, eps=1e-30), nn.ReLU(), nn.Linear(8, 3)).double()
    assert _found(model)["0"].exact
    model.eval()  # now the batch-norm is an affine map with fixed statistics
    assert not _found(model)["0"].exact


def test_channels_are_the_entries_that_carry_them() -> None:
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    for module in (nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2)):
        module = module.double()
        weight, bias = outgoing("", module)
        reads = incoming("", module, 4)
        assert reads is not None
        factors = torch.arange(1, 7, dtype=torch.float64)
        scaled = {"weight": weight.scaled(module.weight, factors), "bias": bias.scaled(module.bias, factors)}
        expected = module(x) * factors[:, None]
        torch.testing.assert_close(torch.func.functional_call(module, scaled, (x,)), expected)
        factors = torch.arange(1, 5, dtype=torch.float64)
        scaled = {"weight": reads.scaled(module.weight, 1 / factors)}
        torch.testing.assert_close(torch.func.functional_call(module, scaled, (x * factors[:, None],)), module(x))
        squares = reads.dot(module.weight, module.weight)
        torch.testing.assert_close(reads.dot(module.weight, module.weight.clone()), squares)
        alone = torch.stack([reads.scaled(module.weight, row).square().sum() for row in torch.eye(4).double()])
        torch.testing.assert_close(squares, alone)
