"""What cannot be captured is refused by name and with a way out; all else passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics.autograd.refusals import at_most_positional, check_inputs, check_loss_fn, check_model, check_tensor
from diagnostics.errors import CaptureError


def _compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[0].compile()
    return model


def _traced() -> nn.Module:
    return torch.jit.trace(nn.Linear(5, 3), torch.ones(3, 5))


def _made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex": (lambda: nn.Linear(5, 3, dtype=torch.complex64), r"parameter 'weight' is complex"),
    "half precision": (
        lambda: nn.Sequential(nn.Linear(5, 3)).half(),
        r"parameter '0\.weight' has dtype torch.float16, too coarse",
    ),
    "traced": (_traced, r"the model is scripted or traced .* original nn.Module"),
    "traced inside": (lambda: nn.Sequential(nn.Linear(5, 5), _traced()), r"module '1' is scripted"),
    "compiled": (lambda: torch.compile(nn.Linear(5, 3)), r"the model is compiled .* original nn.Module"),
    "compiled in place": (_compiled_in_place, r"module '0' is compiled"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"module '0' is a LazyLinear that has not seen an input"),
    "rescaled embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)),
        r"module '0' scales its weight down in place at every call \(max_norm=1\.0\)",
    ),
    "rescaled bag": (lambda: nn.EmbeddingBag(5, 3, max_norm=2.0), r"the model scales its weight down"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), r"spread over processes or devices by DataParallel"),
    "inference mode": (_made_in_inference_mode, r"parameter 'weight' was made in inference mode"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("case", MODELS)
def test_models(case: str) -> None:
    build, message = MODELS[case]
    with pytest.raises(CaptureError, match=message):
        check_model(build())


def test_ordinary_models_pass() -> None:
    for dtype in (torch.float32, torch.float64):
        check_model(nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.LSTM(3, 2), nn.Linear(2, 2)).to(dtype))
    lazy = nn.LazyLinear(3)
    lazy(torch.ones(1, 2))
    check_model(lazy)


def _squared(z: Tensor, scale: float = 1.0) -> Tensor:
    return scale * z.square().mean()


class _Loss(nn.Module):
    def forward(self, z: Tensor, targets: Tensor) -> Tensor:
        return (z - targets).square().mean()


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (_squared, ("z",)),
        (_squared, ("z", "targets")),  # another optional argument takes them
        (F.cross_entropy, ("z", "targets")),
        (nn.CrossEntropyLoss(), ("z", "targets")),
        (_Loss(), ("z", "targets")),
        (lambda *everything: everything[0].sum(), ("z", "targets")),
        (torch.sum, ("z",)),  # a built-in function without a signature
    ],
)
def test_loss_functions_that_can_be_called_pass(loss: Any, arguments: tuple[str, ...]) -> None:
    check_loss_fn(loss, *arguments)


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        (torch.zeros(3), ("z",), r"loss_fn must be callable, loss_fn\(z\) -> scalar; got Tensor\. Targets go into it"),
        (None, ("z", "targets"), r"loss_fn\(z, targets\) -> scalar; got NoneType\. A batch is one argument"),
        (F.cross_entropy, ("z",), r"must be loss_fn\(z\) -> scalar, but cross_entropy.*'target'.*Targets go into it"),
        (_Loss(), ("z",), r"but _Loss\(z.*missing a required argument: 'targets'"),
        (lambda z: z.sum(), ("z", "targets"), r"too many positional arguments.*lambda z, _:"),
    ],
)
def test_loss_functions(loss: Any, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_loss_fn(loss, *arguments)


def test_the_batch_size_is_that_of_the_first_tensor() -> None:
    assert check_inputs(torch.ones(3, 5)) == 3
    assert check_inputs((torch.zeros(4, 2, dtype=torch.long), torch.ones(7))) == 4
    assert check_inputs({"a": "text", "b": [torch.ones(2, 1)]}) == 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([1.0], r"inputs hold no tensor but list"),
        (torch.tensor(1.0), r"need a batch dimension"),
        (torch.ones(0, 5), r"batch is empty: .*\(0, 5\)"),
        ((torch.ones(3), torch.ones(3, dtype=torch.complex64)), r"an input is complex \(torch\.complex64\)"),
        (torch.ones(3, dtype=torch.bfloat16), r"an input has dtype torch\.bfloat16, too coarse"),
        (torch.ones(3, 3).to_sparse(), r"an input is not a dense tensor \(torch\.sparse_coo\)"),
    ],
)
def test_inputs(inputs: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        check_inputs(inputs)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_tensors_are_called_what_they_were_said_to_be() -> None:
    check_tensor(torch.zeros(2, dtype=torch.long), "labels")
    with pytest.raises(CaptureError, match=r"^the ends is not a dense tensor \(nested\): make it dense first\.$"):
        check_tensor(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "the ends")


def test_more_positional_arguments_are_refused_with_what_to_pass() -> None:
    @at_most_positional(2, "the third goes by name")
    def power(base: float, exponent: float = 2.0, shift: float = 0.0) -> float:
        """Doc."""
        return base**exponent + shift

    assert power(3.0) == 9.0
    assert power(3.0, 1.0, shift=2.0) == 5.0
    assert (power.__name__, power.__doc__) == ("power", "Doc.")
    with pytest.raises(TypeError, match="power takes 2 positional arguments, got 3: the third goes by name"):
        power(3.0, 1.0, 2.0)
