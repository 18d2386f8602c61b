"""Which kernels run while a tape is recorded that is to be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import diagnostics
from diagnostics.autograd.kernels import CompositeKernels, twice_differentiable
from diagnostics.operators.curvature import HessianOperator
from hessopt.newton_cg.optimizer import NewtonCG
from tests.helpers.networks import Recurrent
from tests.helpers.oracle import relative_error

cudnn = torch.backends.cudnn
RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": lambda *n: nn.RNN(*n, nonlinearity="relu")}


class Watch(TorchFunctionMode):
    """Entered around other modes, so that it sees what they let through: which operation ran with cuDNN on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[bool]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.setdefault(getattr(func, "__name__", ""), set()).add(cudnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_is_off_while_recurrent_layers_run_and_only_then(name: str, packed: bool) -> None:
    layer, x = RECURRENT[name](3, 2), torch.randn(4, 2, 3)
    given: Any = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]]) if packed else x
    with Watch() as watch, twice_differentiable(), CompositeKernels():
        assert cudnn.enabled
        layer(given)
        F.conv1d(x, torch.randn(2, 2, 2))
        assert cudnn.enabled
    assert watch.seen[name] == {False}
    assert watch.seen["conv1d"] == {True}
    assert cudnn.enabled


def _capture(model: nn.Module, x: Tensor) -> None:
    diagnostics.hessian_blocks(diagnostics.capture(model, x, lambda z: z.square().mean()))


def _operator(model: nn.Module, x: Tensor) -> None:
    op = HessianOperator(model, (x, None), lambda z, _: z.square().mean())
    op @ torch.ones(op.shape[0])


def _optimizer(model: nn.Module, x: Tensor) -> None:
    NewtonCG(model).step(lambda: model(x).square().mean())


@pytest.mark.parametrize("use", [_capture, _operator, _optimizer], ids=["capture", "operator", "optimizer"])
def test_everything_that_runs_a_model_does_it_that_way(use: Callable[[nn.Module, Tensor], None]) -> None:
    with Watch() as watch:
        use(Recurrent(), torch.randn(2, 3, 3))
    assert watch.seen["lstm"] == {False}
    assert watch.seen["linear"] == {True}
    assert cudnn.enabled


def test_the_users_choices_hold_and_are_restored() -> None:
    with cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=True):
        with twice_differentiable():
            assert cudnn.enabled
            assert cudnn.benchmark
            assert cudnn.deterministic
            assert not cudnn.allow_tf32
            with CompositeKernels():
                nn.GRU(3, 2)(torch.randn(4, 2, 3))
            assert cudnn.enabled
        assert cudnn.allow_tf32
    with cudnn.flags(enabled=False):
        with twice_differentiable():
            assert not cudnn.enabled
        assert not cudnn.enabled


def test_cudnn_is_on_again_after_an_error() -> None:
    with twice_differentiable(), CompositeKernels(), pytest.raises(RuntimeError):
        nn.LSTM(3, 2)(torch.randn(4, 2, 5))
    assert cudnn.enabled


def test_second_derivatives_of_convolutions_and_recurrent_layers(device: torch.device) -> None:
    """On a GPU by cuDNN and not by it, to the rounding of double precision."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3)
            self.lstm, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.norm(self.conv(x)))
            return self.head(self.lstm(h.mT)[0]).sum(1)

    torch.manual_seed(0)
    model, x = Both().double(), torch.randn(3, 2, 5, dtype=torch.float64)

    def hessian(device: torch.device | str) -> Tensor:
        return HessianOperator(model.to(device), (x.to(device), None), lambda z, _: z.sin().square().mean()).to_dense()

    with cudnn.flags(enabled=False):
        expected = hessian("cpu")
    assert relative_error(hessian(device).cpu(), expected) < 1e-10
