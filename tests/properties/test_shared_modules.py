"""Modules registered under several names: nothing is left behind in them, and each is one layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.graph.layer_rule import layers
from diagnostics.operators.replay import run_model
from hessopt.memories import ogd_memory
from tests.helpers.oracle import check_against_double_backprop


class _Penalty(nn.Module):
    """Holds the network that it is about, as gpytorch's marginal likelihoods do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> Tensor:
        return z


class _Held(nn.Module):
    """A body with buffers, registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.penalty = _Penalty(self.body)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.penalty(self.body(x)))


class _Listed(nn.Module):
    """Layers under names of their own and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList([self.first, self.mid, self.head])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


X, Y = torch.linspace(-1, 1, 18).view(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])


def _graph(model: nn.Module) -> diagnostics.Graph:
    return diagnostics.capture(model, X, lambda z: F.cross_entropy(z, Y))


USES: dict[str, Callable[[nn.Module], object]] = {
    "capture": _graph,
    "parameter_hessian": lambda model: diagnostics.parameter_hessian(_graph(model)),
    "estimate_metrics": lambda model: diagnostics.estimate_metrics(_graph(model), probes=3),
    "operator": lambda model: diagnostics.HessianOperator(model, (X, Y), F.cross_entropy).to_dense(),
    "monitor": lambda model: diagnostics.Monitor(model, F.cross_entropy, every=1, probes=3).step((X, Y)),
    "diagnose": lambda model: diagnostics.diagnose(model, (X, Y), F.cross_entropy, progress=False),
    "memory": lambda model: ogd_memory(model, X, Y),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("build", [_Held, _Listed])
def test_parameters_and_buffers_stay_the_very_objects(use: str, build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values = [tensor.detach().clone() for _, tensor in own]
    USES[use](model)
    after = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert [name for name, _ in after] == [name for name, _ in own]
    assert all(a is b for (_, a), (_, b) in zip(after, own, strict=True))
    assert all(torch.equal(tensor, value) for (_, tensor), value in zip(own, values, strict=True))


def test_parameters_are_back_after_an_error() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    model = _Held()
    model.head = Fails()
    own = [*model.parameters(), *model.buffers()]
    constants = {name: p.detach().clone() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    with pytest.raises(RuntimeError, match="on purpose"):
        run_model(model, X, constants)
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], own, strict=True))


def test_substitutes_stand_in_every_place_of_a_tied_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    weight, first, second = doubled["0.weight"], doubled["0.bias"], doubled["2.bias"]
    expected = F.linear(torch.tanh(F.linear(X, weight, first)), weight, second)
    torch.testing.assert_close(run_model(model, X, doubled), expected)
    with pytest.raises(KeyError, match=r"Sequential has no parameter or buffer '3\.weight'"):
        run_model(model, X, {"3.weight": weight})


def test_what_the_run_puts_in_the_place_of_a_buffer_is_returned() -> None:
    class Counts(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return x * self.count

    model = Counts()
    own, replaced = model.count, {"count": torch.ones(())}
    assert torch.equal(run_model(model, X, replaced), 2 * X)
    assert replaced["count"] == 2
    assert model.count is own


def test_a_module_under_two_names_is_one_layer() -> None:
    assert layers(_Listed()) == ["first", "mid", "head"]
    assert layers(_Held()) == ["body.2", "body.4", "head"]
    torch.manual_seed(0)
    model = _Listed().double()
    check_against_double_backprop(model, X.double(), lambda z: F.cross_entropy(z, Y), None)


def test_either_name_chooses_the_module() -> None:
    model, loss = _Listed(), lambda z: z.square().mean()
    assert [n.name for n in diagnostics.capture(model, X, loss, ["layers.0", "layers.1"])] == [
        "layers.0", "layers.1", "output",
    ]  # fmt: skip
    assert [n.name for n in diagnostics.capture(model, X, loss, ["layers.*", "first"])] == [
        "first", "layers.1", "layers.2",
    ]  # fmt: skip
