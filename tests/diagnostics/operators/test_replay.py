"""Every run of a model is the same function of its parameters, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics.errors import StaleGraphError
from diagnostics.operators.data import Batch
from diagnostics.operators.replay import Replay, along_the_tape

F64 = torch.float64


class _Drawing(nn.Module):
    """A linear layer, batch norm with running statistics, and dropout: all that a second run could change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(torch.tanh(self.norm(self.fc(x))), 0.4, self.training))


def _setting(loss: Any = F.mse_loss) -> tuple[nn.Module, Replay, Batch]:
    torch.manual_seed(0)
    model = _Drawing().double()
    x, y = torch.randn(6, 4, dtype=F64), torch.randn(6, 2, dtype=F64)
    return model, Replay(model, loss, torch.device("cpu")), Batch(x, y, 6)


def _by_hand(model: Any, batch: Batch, state: Tensor) -> Tensor:
    """The loss with the dropout mask that the random state gives, by formulas."""
    torch.set_rng_state(state)
    z = batch.inputs @ model.fc.weight.T + model.fc.bias
    z = (z - z.mean(0)) / (z.var(0, unbiased=False) + model.norm.eps).sqrt() * model.norm.weight + model.norm.bias
    mask = F.dropout(torch.ones_like(z), 0.4, True)
    z = (torch.tanh(z) * mask) @ model.head.weight.T + model.head.bias
    return (z - batch.targets).square().mean()


def test_runs_repeat_the_loss_and_its_gradient_whatever_is_drawn_between() -> None:
    model, replay, batch = _setting()
    state = torch.get_rng_state()
    expected = _by_hand(model, batch, state)
    slopes = torch.autograd.grad(expected, list(model.parameters()))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for _ in range(2):
        torch.randn(7)
        drawn = torch.get_rng_state()
        with replay.replayed(), replay.recording():
            loss = replay.loss(replay.output(batch), batch)
            found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
        for a, b in zip(found, slopes, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)
        with replay.replayed():
            assert replay.value(batch) == pytest.approx(expected.item(), rel=1e-13)
        assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_recording_can_be_differentiated_twice_under_no_grad_and_autocast() -> None:
    """The second derivative of the loss in the bias of the last layer is 2/B·outputs times the identity."""
    model, replay, batch = _setting()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), replay.replayed(), replay.recording():
        loss = replay.loss(replay.output(batch), batch)
        (slope,) = torch.autograd.grad(loss, model.head.bias, create_graph=True)
        rows = [torch.autograd.grad(s, model.head.bias, retain_graph=True)[0] for s in slope]
    assert loss.dtype == F64
    assert torch.allclose(torch.stack(rows), torch.eye(2, dtype=F64) * 2 / 2, rtol=1e-13)


def test_values_at_other_parameters() -> None:
    model, replay, batch = _setting()
    state = torch.get_rng_state()
    moved = model.fc.weight.detach() + 0.1
    with replay.replayed():
        found = replay.value(batch, {"fc.weight": moved})
        assert found != replay.value(batch)
    with torch.no_grad():
        model.fc.weight.copy_(moved)
    assert found == pytest.approx(_by_hand(model, batch, state).item(), rel=1e-13)


def test_buffers_that_a_run_changes_are_named_and_keep_their_values() -> None:
    model, replay, batch = _setting()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert replay.changed_buffers(batch) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.eval()
    replay.refresh()
    assert replay.changed_buffers(batch) == []


def test_bytes_are_those_of_the_tensors_that_carry_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    replay = Replay(model, F.mse_loss, torch.device("cpu"))
    batch = Batch(torch.randn(6, 4, dtype=F64), torch.zeros(6, 2, dtype=F64), 6)
    with replay.recording():
        replay.output(batch)
    assert replay.made_bytes == 8 * 6 * (5 + 5 + 2)


def test_what_is_no_longer_there_is_stale_until_refreshed() -> None:
    model, replay, batch = _setting()
    replay.check_fresh()
    with torch.no_grad():
        model.fc.bias.add_(1)
    with pytest.raises(StaleGraphError, match=r"parameter 'fc\.bias' was changed"):
        replay.check_fresh()
    replay.refresh()
    model.norm.eval()
    with pytest.raises(StaleGraphError, match="module 'norm' was switched"):
        replay.check_fresh()
    model.norm.train()
    replay.check_fresh()
    model.fc.weight.data = model.fc.weight.data.clone()  # another piece of memory, the same version
    with pytest.raises(StaleGraphError, match=r"parameter 'fc\.weight' was changed"):
        replay.check_fresh()
    model.fc = nn.Linear(4, 5).double()
    with replay.recording(), pytest.raises(StaleGraphError, match=r"'fc\.weight' was replaced by another tensor"):
        replay.output(batch)


@pytest.mark.parametrize("inference", [False, True])
def test_passes_over_a_tape_are_in_the_dtype_of_its_tensors(inference: bool) -> None:
    a, b = torch.full((2, 2), 1 / 3), torch.full((2, 2), 3.0)
    with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        with along_the_tape(torch.device("cpu")):
            assert (a @ b).dtype == torch.float32
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled() == inference
    with along_the_tape(torch.device("cpu")):
        assert not torch.is_inference_mode_enabled()
