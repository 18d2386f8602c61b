"""What the report says of each node: the loss's gradient there, and the share of its units that are dead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics


def _nodes(model: nn.Module, batch: Any, loss: Any, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    report = diagnostics.diagnose(model, batch, loss, nodes=names, sections=["network"], progress=False)
    return {node["name"]: node for node in report.sections["network"]["nodes"]}


class _Branches(nn.Module):
    """A sum of two branches of one layer, and an output of a third that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.head, self.aside = nn.Linear(4, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.stem(x))
        return self.head(self.left(h) * torch.sigmoid(self.right(h))), self.aside(h)


def test_the_gradient_is_that_of_back_propagation() -> None:
    torch.manual_seed(0)
    model = _Branches().double()
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    names = ["stem", "left", "right", "aside"]
    nodes = _nodes(model, (x, y), lambda z, t: F.cross_entropy(z[0], t), names)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            kept[name] = output

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    F.cross_entropy(model(x)[0], y).backward()
    for name in ("stem", "left", "right"):
        gradient = kept[name].grad
        assert gradient is not None
        assert nodes[name]["gradient"] == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert kept["aside"].grad is None
    assert nodes["aside"]["gradient"] is None
    assert nodes["aside"]["dead_units"] is None


def test_dead_units_of_vectors_and_images() -> None:
    torch.manual_seed(0)
    convolution, head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 16, 5)
    model = nn.Sequential(nn.Sequential(convolution, nn.ReLU()), nn.Flatten(), head, nn.Linear(5, 2)).double()
    with torch.no_grad():
        convolution.bias.copy_(torch.tensor([-100.0, 1.0, -100.0, -100.0]))  # three channels never switch on
        model[3].weight[:, :2] = 0.0  # two units of the layer before are read by nobody
    batch = torch.randn(9, 1, 6, 6, dtype=torch.float64), torch.randint(2, (9,))
    nodes = _nodes(model, batch, F.cross_entropy, ["0", "2", "3"])
    assert nodes["0"]["dead_units"] == pytest.approx(3 / 4)
    assert nodes["2"]["dead_units"] == pytest.approx(2 / 5)
    assert nodes["3"]["dead_units"] == 0


def test_units_of_sequences_are_not_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = torch.randn(9, 5, 3, dtype=torch.float64), torch.randn(9, 5, 2, dtype=torch.float64)
    assert all(node["dead_units"] is None for node in _nodes(model, batch, F.mse_loss).values())
