"""Which parameters make up a vector, and in which order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnostics import DiagnosticsError, StaleGraphError
from diagnostics.operators.parameter_space import ParameterSpace
from tests.helpers.curvature import TiedLanguageModel
from tests.helpers.networks import ResidualCat


def names(model: nn.Module, selection: object = None) -> list[str]:
    return list(ParameterSpace(model, selection).parameters)


def test_order_is_that_of_the_model_whatever_the_selection() -> None:
    model = ResidualCat()
    everything = [name for name, _ in model.named_parameters()]
    assert names(model) == everything
    assert names(model, ["head.*", "stem.weight"]) == ["stem.weight", "head.weight", "head.bias"]
    assert names(model, "block?.bias") == ["block1.bias", "block2.bias"]
    assert names(model, (name for name in ("head.bias", "head.bias"))) == ["head.bias"]
    assert names(model, lambda name, p: p.ndim == 1) == [name for name in everything if name.endswith("bias")]


def test_frozen_parameters_are_no_part_of_it() -> None:
    model = ResidualCat()
    model.stem.requires_grad_(False)
    assert "stem.weight" not in names(model)
    assert names(model, ["*.bias"]) == ["block1.bias", "block2.bias", "merge.0.bias", "head.bias"]
    assert "stem.bias" not in names(model, lambda name, p: True)


def test_a_tied_parameter_is_there_once_under_any_of_its_names() -> None:
    model = TiedLanguageModel()
    assert names(model) == ["embed.weight", "hidden.weight", "hidden.bias"]
    assert names(model, ["head.weight"]) == ["embed.weight"]
    assert names(model, ["head.weight", "embed.weight"]) == ["embed.weight"]


def test_vectors_and_tensors() -> None:
    torch.manual_seed(0)
    model = ResidualCat()
    space = ParameterSpace(model, ["block1.*"])
    assert (space.size, len(space), space.dtype, space.device.type) == (20, 20, torch.float32, "cpu")
    vector = torch.arange(20.0)
    parts = space.unflatten(vector)
    assert {name: part.shape for name, part in parts.items()} == {"block1.weight": (4, 4), "block1.bias": (4,)}
    assert parts["block1.weight"][1, 0] == 4
    assert torch.equal(vector[space.slices["block1.bias"]], parts["block1.bias"])
    assert torch.equal(space.flatten(parts), vector)
    assert torch.equal(space.flatten(dict(reversed(parts.items()))), vector)
    assert torch.equal(space.flatten(parts.values()), vector)
    columns = torch.randn(20, 3)
    split = space.split(columns)
    assert [part.shape for part in split] == [(3, 4, 4), (3, 4)]
    assert torch.equal(split[0][2], space.unflatten(columns[:, 2])["block1.weight"])
    assert torch.equal(space.join(split), columns)


def test_a_vector_agrees_with_parameters_to_vector() -> None:
    model = ResidualCat()
    space = ParameterSpace(model)
    assert torch.equal(space.flatten(model.parameters()), nn.utils.parameters_to_vector(model.parameters()))


def test_refused_selections() -> None:
    model = ResidualCat()
    model.stem.requires_grad_(False)
    for selection, message in (
        (["block1.wieght"], r"called or matches 'block1.wieght'. Did you mean 'block1.weight'"),
        (["conv*"], r"matches 'conv\*'. There are 'block1.weight', .*'head.bias'\."),
        (["stem.*"], r"'stem\.\*' matches only parameters that do not require grad \('stem.weight', 'stem.bias'\)"),
        ([], "parameters is empty: name some"),
        (lambda name, p: False, "the predicate chose none of the parameters that require grad, which are 'block1"),
    ):
        with pytest.raises(DiagnosticsError, match=message):
            ParameterSpace(model, selection)
    with pytest.raises(TypeError, match="an entry of type int"):
        ParameterSpace(model, [3])
    with pytest.raises(DiagnosticsError, match="no parameter of ResidualCat requires grad"):
        ParameterSpace(model.requires_grad_(False))
    with pytest.raises(DiagnosticsError, match="no parameter of Tanh requires grad"):
        ParameterSpace(nn.Tanh())


def test_parameters_of_two_kinds_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(DiagnosticsError, match=r"several dtypes .*'0.weight' \(torch.float32, cpu\).*'1.weight'"):
        ParameterSpace(model)
    assert ParameterSpace(model, ["1.*"]).dtype == torch.float64


def test_refused_tensors() -> None:
    space = ParameterSpace(ResidualCat(), ["block1.*"])
    for values, message in (
        ({"block1.weight": torch.ones(4, 4), "bias": torch.ones(4)}, r"missing are \['block1.bias'\], unknown are"),
        ([torch.ones(4, 4)], "flatten takes 2 tensors.*got 1"),
        ([torch.ones(4, 4), torch.ones(1, 4)], r"'block1.bias' has shape \(1, 4\) instead of \(4,\)"),
    ):
        with pytest.raises(DiagnosticsError, match=message):
            space.flatten(values)
    with pytest.raises(DiagnosticsError, match=r"a vector \(20,\), got shape \(20, 1\)"):
        space.unflatten(torch.ones(20, 1))


def test_freezing_is_noticed() -> None:
    model = ResidualCat()
    space = ParameterSpace(model)
    space.check_trained()
    model.head.bias.requires_grad_(False)
    with pytest.raises(StaleGraphError, match=r"'head\.bias' was frozen"):
        space.check_trained()


def test_repr() -> None:
    tensor: Tensor = next(iter(ParameterSpace(ResidualCat(), ["head.bias"]).parameters.values()))
    assert tensor.shape == (3,)
    assert repr(ParameterSpace(ResidualCat(), ["head.*"])) == "ParameterSpace of 2 parameters, 18 entries"
