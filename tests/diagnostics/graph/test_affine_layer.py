"""The closed form of ``W σ(f) + b``: against vector-Jacobian products, and where it must not apply."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import diagnostics
from diagnostics.graph.affine_layer import AffineLayer
from diagnostics.graph.local import differentiate
from tests.helpers.oracle import relative_error


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


LAYERS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), (5,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), (2, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 2, stride=2, padding=1)), (2, 5, 5)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 2, groups=2, bias=False)), (2, 5, 5)),
    "reflected": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect")),
        (2, 5, 5),
    ),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)), (2, 5, 5)),
}


@pytest.mark.parametrize("activation", [nn.Identity, nn.GELU, nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_vector_jacobian_products(
    name: str, activation: type[nn.Module], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    first, *rest = make()
    model = nn.Sequential(first, activation(), *rest).double().to(device)
    last = str(len(model) - 1)
    x = torch.randn(3, *shape, dtype=torch.float64, device=device)
    graph = diagnostics.capture(model, x, _wavy, ["0", last])
    assert AffineLayer.recognise(graph[last], [graph["0"]]) is not None
    closed = differentiate(graph)
    monkeypatch.setattr(AffineLayer, "recognise", staticmethod(lambda _node, _parents: None))
    monkeypatch.setattr("diagnostics.graph.local.DenseLayer.recognise", staticmethod(lambda _node, _parents: None))
    generic = differentiate(graph)
    assert relative_error(closed.jacobians[last]["0"], generic.jacobians[last]["0"]) < 1e-14
    assert relative_error(closed.signals["0"], generic.signals["0"]) < 1e-14
    bends = activation in (nn.GELU, nn.Tanh)
    assert bool(closed.curvatures[last]) == bends
    if bends:
        assert relative_error(closed.curvatures[last]["0", "0"], generic.curvatures[last]["0", "0"]) < 1e-13


class _Between(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between, self.first, self.second = between, nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


LOOKALIKES: dict[str, Callable[[Tensor], Tensor]] = {
    "two activations": lambda f: f.tanh().exp(),
    "transposed": lambda f: f.tanh().transpose(2, 3),
    "flipped": lambda f: f.flip(1),
    "scaled": lambda f: 2 * f,
    "normalised": lambda f: nn.functional.layer_norm(f, f.shape[1:]),
    "skip": lambda f: f.tanh() + f,
    "pooled": lambda f: nn.functional.avg_pool2d(f, 1),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_take_the_generic_way(name: str) -> None:
    torch.manual_seed(0)
    model = _Between(LOOKALIKES[name]).double()
    graph = diagnostics.capture(model, torch.randn(2, 1, 4, 4, dtype=torch.float64), _wavy, ["first", "second"])
    assert AffineLayer.recognise(graph["second"], [graph["first"]]) is None


def test_layers_with_hooks_or_computed_weights_take_the_generic_way() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    hooked, pre_hooked, normed = (_Between(torch.tanh).double() for _ in range(3))
    hooked.second.register_forward_hook(lambda _module, _args, output: output.sin())
    pre_hooked.second.register_forward_pre_hook(lambda _module, args: (args[0].sin(),))
    nn.utils.parametrizations.weight_norm(normed.second)
    for model in (hooked, pre_hooked, normed):
        graph = diagnostics.capture(model, x, _wavy, ["first", "second"])
        assert AffineLayer.recognise(graph["second"], [graph["first"]]) is None
