"""The bound on parameter blocks against the Hessian of the parameters themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diagnostics
from diagnostics.bounds.bridge import bridge_bound


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z + z.square()).sum() / len(z)


class Net(nn.Module):
    """Two branches, a skip and a product, all from linear layers on (B, d)."""

    def __init__(self, widths: tuple[int, ...] = (3, 4, 2)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem, self.left, self.right = nn.Linear(3, a), nn.Linear(a, b), nn.Linear(a, b, bias=False)
        self.merge, self.head = nn.Linear(b, c), nn.Linear(c + a, 2)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.tanh(self.stem(x))
        merged = torch.tanh(self.merge(torch.tanh(self.left(stem)) * self.right(stem)))
        return self.head(torch.cat([merged, stem], -1))


LAYERS = ("stem", "left", "right", "merge", "head")


def _parameter_block(model: nn.Module, x: Tensor, v: str, w: str) -> Tensor:
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in LAYERS}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return _wavy(torch.func.functional_call(model, values, (x,)))

    hessian = torch.func.jacrev(torch.func.grad(loss))(weights)
    return hessian[f"{v}.weight"][f"{w}.weight"].detach()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    widths=st.tuples(*[st.integers(1, 4)] * 3),
    batch=st.integers(1, 4),
)
def test_parameter_blocks_stay_below_the_bound(seed: int, widths: tuple[int, ...], batch: int) -> None:
    torch.manual_seed(seed)
    model = Net(widths).double()
    x = torch.randn(batch, 3, dtype=torch.float64)
    graph = diagnostics.capture(model, x, _wavy, LAYERS)
    blocks = diagnostics.hessian_blocks(graph)
    for i, v in enumerate(LAYERS):
        for w in LAYERS[: i + 1]:
            bound = bridge_bound(graph, v, w, blocks)
            assert _parameter_block(model, x, v, w).norm().item() <= bound.bound * (1 + 1e-10) + 1e-15
            assert bridge_bound(graph, w, v, blocks) == bound


def test_one_sample_and_unrelated_layers_attain_the_bound_and_the_cross_term_is_needed() -> None:
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(1, 3, dtype=torch.float64)
    graph = diagnostics.capture(model, x, _wavy, LAYERS)
    for v, w in [("left", "right"), ("right", "right"), ("merge", "merge")]:
        bound = bridge_bound(graph, v, w)
        assert bound.cross == 0
        assert bound.bound == pytest.approx(_parameter_block(model, x, v, w).norm().item(), rel=1e-10)
    # a linear layer on a linear layer and a linear loss: no activation curvature at all, but ∂²L/∂W∂W' = δ ⊗ W ⊗ x
    pair = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    flat = diagnostics.capture(pair, x, lambda z: z.sum(), ["0", "1"])
    bound = bridge_bound(flat, "1", "0")
    assert bound.activation == 0
    assert bound.cross == pytest.approx((2**0.5) * x.norm().item() * 2**0.5, rel=1e-12)


def test_what_is_no_linear_layer_called_once_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    graph = diagnostics.capture(model, x, _wavy)
    with pytest.raises(diagnostics.DiagnosticsError, match=r"node '1' is not the output of an nn.Linear.*but of Tanh"):
        bridge_bound(graph, "1", "2")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.step(torch.tanh(self.step(x)))

    twice = diagnostics.capture(Twice().double(), x, _wavy, ["step"])
    with pytest.raises(diagnostics.DiagnosticsError, match="called several times"):
        bridge_bound(twice, "step", "step@1")
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    coupled = diagnostics.capture(norm, x, _wavy, ["0", "2"])
    with pytest.raises(diagnostics.DiagnosticsError, match="coupled"):
        bridge_bound(coupled, "0", "2")
    single = diagnostics.capture(model, x, _wavy, ["0", "2"])
    with pytest.raises(diagnostics.DiagnosticsError, match="not batch means"):
        bridge_bound(single, "0", "2", diagnostics.hessian_blocks(single).mean())
