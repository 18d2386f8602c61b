"""At kinks, blocks are those of PyTorch's own derivatives: σ″ = 0 there (Def. 47)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from tests.helpers.oracle import check_against_double_backprop

KINKS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    # function, where it is not smooth, the slope that PyTorch takes there
    "relu": (F.relu, 0.0, 0.0),
    "leaky_relu": (F.leaky_relu, 0.0, 0.01),
    "relu6": (F.relu6, 6.0, 0.0),
    "hardtanh": (F.hardtanh, 1.0, 0.0),
    "abs": (torch.abs, 0.0, 0.0),
    "clamp at its bound": (lambda x: x.clamp(-0.5, 0.5), 0.5, 1.0),
    "clamp_min": (lambda x: x.clamp_min(0.25), 0.25, 1.0),
    "maximum of equals": (lambda x: torch.maximum(x, 2 - x), 1.0, 0.0),
    "threshold": (lambda x: F.threshold(x, 0.5, 0.0), 0.5, 0.0),
    "hardshrink": (F.hardshrink, 0.5, 0.0),
    "softshrink": (F.softshrink, 0.5, 0.0),
    "rounding": (torch.round, 0.5, 0.0),
}


class AtValue(nn.Module):
    """A layer whose entries all have a given value, ahead of a function with a kink there."""

    def __init__(self, function: Callable[[Tensor], Tensor], value: float) -> None:
        super().__init__()
        self.function = function
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        nn.init.zeros_(self.layer.weight)
        nn.init.constant_(self.layer.bias, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.layer(x)))


def _loss(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).sum()


@pytest.mark.parametrize("name", KINKS)
def test_blocks_at_a_kink_are_those_of_pytorchs_derivatives(name: str) -> None:
    function, value, slope = KINKS[name]
    torch.manual_seed(0)
    model = AtValue(function, value).double()
    graph = check_against_double_backprop(model, torch.randn(2, 3, dtype=torch.float64), _loss)
    blocks = diagnostics.hessian_blocks(graph)
    weight = model.head.weight.detach()
    carried = slope**2 * weight.T @ blocks.total["head", "head"] @ weight
    assert not blocks.tensor["layer", "layer"].any()  # σ″ = 0
    assert torch.allclose(blocks.gn["layer", "layer"], carried, atol=1e-14)


@pytest.mark.parametrize("name", KINKS)
def test_blocks_inside_one_node_agree_with_those_between_two(name: str) -> None:
    """The closed form of an activation of a linear map takes the same derivatives as the tape."""
    function, value, _ = KINKS[name]

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.layer = nn.Linear(3, 3), AtValue(function, value)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.enter(x)))

    torch.manual_seed(0)
    check_against_double_backprop(Inside().double(), torch.randn(2, 3, dtype=torch.float64), _loss, ["enter", "layer"])


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.AdaptiveMaxPool1d(2), nn.AvgPool1d(2)])
def test_a_tie_in_a_pool_goes_where_pytorch_sends_it(pool: nn.Module) -> None:
    model = AtValue(lambda h: pool(h.unsqueeze(1)).flatten(1).repeat(1, 2), 0.3).double()
    torch.manual_seed(0)
    graph = check_against_double_backprop(model, torch.randn(2, 3, dtype=torch.float64), _loss)
    diagonal = diagnostics.hessian_blocks(graph).total["layer", "layer"].diagonal(dim1=1, dim2=2)
    assert ((diagonal != 0) == torch.tensor([True, "Avg" in type(pool).__name__]).repeat(2)).all()  # max: the first


def test_a_function_that_is_flat_almost_everywhere_cuts_the_network() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sign(self.a(x)) * torch.tanh(self.b(x)))

    torch.manual_seed(0)
    graph = check_against_double_backprop(Net().double(), torch.randn(2, 3, dtype=torch.float64), _loss)
    blocks = diagnostics.hessian_blocks(graph).total
    assert not any(blocks["a", name].any() for name in ("a", "b", "head"))
    assert blocks["b", "b"].any()


def test_an_infinite_derivative_is_refused_with_the_node() -> None:
    model = AtValue(torch.sqrt, 0.0).double()
    graph = diagnostics.capture(model, torch.randn(2, 3, dtype=torch.float64), _loss)
    with pytest.raises(diagnostics.DiagnosticsError, match="a derivative is not finite"):
        diagnostics.hessian_blocks(graph)
