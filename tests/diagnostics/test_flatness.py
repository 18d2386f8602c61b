"""What is called flat has no local curvature, and what bends is not called flat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.flatness import cannot_bend
from diagnostics.local import differentiate


class _Between(nn.Module):
    """Two activations on images, joined by a function."""

    def __init__(self, join: Callable[[_Between, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3)
        self.weight, self.join, self.out = nn.Parameter(torch.randn(4, 4)), join, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.join(self, self.a(x), self.b(x))).flatten(1)


FLAT: dict[str, Callable[[_Between, Tensor, Tensor], Tensor]] = {
    "sum": lambda m, a, b: a + 2 * b - a.mean(1, keepdim=True),
    "cat and relu": lambda m, a, b: F.leaky_relu(torch.cat([a, b.relu()], 1)),
    "convolution": lambda m, a, b: m.conv(a.relu()) + m.conv(b),
    "product with a parameter": lambda m, a, b: (a @ m.weight) * 3 + m.weight * b,
    "division by a parameter": lambda m, a, b: a / (1 + m.weight.square()),
    "pooling": lambda m, a, b: F.max_pool2d(a, 2) - F.avg_pool2d(b, 2),
    "views": lambda m, a, b: (
        a.transpose(2, 3).reshape(len(a), 2, 2, 8)[:, :1] + b.flatten(1).view(len(b), 2, 2, 8)[:, 1:]
    ),
}
BENT: dict[str, Callable[[_Between, Tensor, Tensor], Tensor]] = {
    "product": lambda m, a, b: a * b,
    "square": lambda m, a, b: a * a,
    "matrix product": lambda m, a, b: a @ b.mT,
    "division": lambda m, a, b: m.weight / (5 + a),
    "tanh": lambda m, a, b: a.tanh() + b,
    "softmax": lambda m, a, b: a.softmax(1),
    "a convolution with a computed weight": lambda m, a, b: F.conv2d(a, m.conv.weight * b.mean()),
}


@pytest.mark.parametrize("name", [*FLAT, *BENT])
def test_flatness_is_that_of_the_local_curvature(name: str) -> None:
    torch.manual_seed(0)
    model = _Between({**FLAT, **BENT}[name]).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    graph = diagnostics.capture(model, x, lambda z: (torch.sin(z) * z).sum(), ["a", "b", "out"])
    node = graph["out"]
    curvatures = differentiate(graph).curvatures["out"].values()
    assert any(bool(block.any()) for block in curvatures) == (name in BENT)
    assert cannot_bend(node, [graph[p].value for p in node.parents]) == (name in FLAT)
