"""Batches without samples, activations and parameters without entries: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics import CaptureError
from diagnostics.operators.curvature import HessianOperator
from tests.helpers.oracle import relative_error

X, Y = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4).sin(), torch.arange(6) % 3


class _Branch(nn.Module):
    """A branch of no width beside one of some."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 0), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(torch.cat([h, self.b(h)], 1))


class _EmptyParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.none, self.c = nn.Linear(4, 5), nn.Parameter(torch.zeros(0)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x)) + self.none.sum())


class _Conv(nn.Module):
    """A grouping that leaves one branch without channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.none, self.head = nn.Conv2d(1, 2, 1), nn.Linear(2, 0), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x.view(-1, 1, 2, 2)))
        return self.head(torch.cat([h.flatten(1), self.none(h.mean((2, 3)))], 1))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "hidden layer": lambda: nn.Sequential(nn.Linear(4, 0), nn.Tanh(), nn.Linear(0, 3)),
    "between layers": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 0), nn.Tanh(), nn.Linear(0, 3)),
    "branch": _Branch,
    "parameter": _EmptyParameter,
    "beside a convolution": _Conv,
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", BUILDS)
def test_layers_without_width_are_left_uncut_and_the_rest_is_right(name: str) -> None:
    torch.manual_seed(0)
    model = BUILDS[name]().double()

    def graph() -> diagnostics.Graph:
        return diagnostics.capture(model, X, lambda z: F.cross_entropy(z, Y))

    assert all(node.value.numel() for node in graph())
    expected = _dense_hessian(model)
    assert relative_error(diagnostics.parameter_hessian(graph()), expected) < 1e-12
    assert relative_error(HessianOperator(model, (X, Y), F.cross_entropy).to_dense(), expected) < 1e-12
    diagnostics.metrics(diagnostics.hessian_blocks(graph()))
    diagnostics.estimate_metrics(graph(), probes=3)
    diagnostics.diagnose(model, (X, Y), F.cross_entropy, progress=False)


def _dense_hessian(model: nn.Module) -> Tensor:
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [v.numel() for v in values]

    def loss(flat: Tensor) -> Tensor:
        parts = {n: p.view_as(v) for n, p, v in zip(names, flat.split(sizes), values, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (X,)), Y)

    return torch.autograd.functional.hessian(loss, torch.cat([v.detach().flatten() for v in values]))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_node_that_was_asked_for_must_have_entries() -> None:
    with pytest.raises(CaptureError, match=r"output of module 'b' has no entries, \(6, 0\).*leave it out"):
        diagnostics.capture(_Branch().double(), X, lambda z: F.cross_entropy(z, Y), ["a", "b"])
    with pytest.raises(CaptureError, match=r"the model's output has no entries"):
        diagnostics.capture(nn.Linear(4, 0).double(), X, lambda z: z.sum())


NOTHING = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
USES: dict[str, Callable[[nn.Module], Any]] = {
    "capture": lambda m: diagnostics.capture(m, NOTHING[0], lambda z: F.cross_entropy(z, NOTHING[1])),
    "operator": lambda m: HessianOperator(m, NOTHING, F.cross_entropy),
    "operator, later batch": lambda m: (
        HessianOperator(m, [(X.float(), Y), NOTHING], F.cross_entropy, progress=False) @ torch.ones(15)
    ),
    "monitor": lambda m: diagnostics.Monitor(m, F.cross_entropy, every=1).step(NOTHING),
    "diagnose": lambda m: diagnostics.diagnose(m, NOTHING, F.cross_entropy, progress=False),
}


@pytest.mark.parametrize("use", USES)
def test_a_batch_without_samples_is_refused(use: str) -> None:
    with pytest.raises(CaptureError, match=r"the batch is empty: the first input has shape \(0, 4\)"):
        USES[use](nn.Linear(4, 3))
