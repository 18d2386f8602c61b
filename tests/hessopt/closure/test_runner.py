"""What a closure may do and return, and that a trial evaluation repeats it and leaves no trace."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hessopt.closure.backward_calls import gradients_of
from hessopt.closure.protocol import LeastSquares
from hessopt.closure.runner import ClosureRunner
from hessopt.closure.step_curvature import StepCurvature
from hessopt.errors import ClosureError


def network(device: torch.device | str = "cpu", dropout: float = 0.0, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double().to(device)


def batch(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    return x.to(device), y.to(device)


def runner_of(net: nn.Module, closure: Callable[[], Any]) -> ClosureRunner:
    return ClosureRunner(closure, net.parameters(), net)


def test_least_squares() -> None:
    r = torch.tensor([[3.0, 4.0]], requires_grad=True)
    squares = LeastSquares(r)
    assert squares.loss.item() == squares.item() == 12.5
    squares.backward()
    assert torch.equal(r.grad, r.detach())
    assert "(1, 2)" in repr(squares)
    with pytest.raises(TypeError, match="takes a tensor of residuals, got float"):
        LeastSquares(1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["loss", "one element", "pair", "least squares"])
def test_what_a_closure_may_return(how: str) -> None:
    net, (x, y) = network(), batch()

    def closure() -> Any:
        z = net(x)
        loss = (z - y).square().sum() / 2
        return {
            "loss": loss,
            "one element": loss.reshape(1, 1),
            "pair": (loss, z),
            "least squares": LeastSquares(z - y),
        }[how]

    evaluation = runner_of(net, closure).evaluate()
    assert evaluation.loss.shape == ()
    assert evaluation.loss.item() == pytest.approx((net(x) - y).square().sum().item() / 2, rel=1e-15)
    assert evaluation.is_least_squares == (how == "least squares")
    expected = net(x) - y if how == "least squares" else net(x)
    assert torch.equal(evaluation.output, expected)
    # The loss is on the output's tape.
    assert torch.autograd.grad(evaluation.loss, evaluation.output)[0].shape == (7, 2)


def test_in_place_change_of_the_output_keeps_the_recorded_one() -> None:
    net, (x, y) = network(), batch()
    evaluation = runner_of(net, lambda: net(x).sub_(y).square().mean()).evaluate()
    assert torch.equal(evaluation.output, net(x))
    (slope,) = torch.autograd.grad(evaluation.loss, evaluation.output)
    assert torch.allclose(slope, (net(x) - y) / 7, rtol=1e-14)


@pytest.mark.parametrize("style", ["tensor", "function", "least squares", "twice"])
def test_tape_survives_the_closures_backward(style: str) -> None:
    net, (x, y) = network(), batch()

    def closure() -> Any:
        net.zero_grad()
        squares = LeastSquares(net(x) - y)
        if style == "least squares":
            squares.backward()
            return squares
        if style == "function":
            torch.autograd.backward([squares.loss], retain_graph=False)
        else:
            squares.loss.backward(retain_graph=False)
        if style == "twice":
            squares.loss.backward()
        return squares.loss

    evaluation = runner_of(net, closure).evaluate()
    assert evaluation.backward_called
    again = torch.autograd.grad(evaluation.loss, list(net.parameters()))
    for p, g in zip(net.parameters(), again, strict=True):  # called twice, the loss is twice what is returned
        assert torch.allclose(p.grad, g, rtol=1e-14, atol=0)


def test_backward_that_modes_do_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch 2.9 ``torch.autograd.backward`` takes no part in the protocol of modes."""
    original = torch.autograd.backward

    @functools.wraps(original)
    def invisible(*args: Any, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():
            original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", invisible)
    monkeypatch.setattr("hessopt.closure.backward_calls._BACKWARD", (Tensor.backward, invisible))
    monkeypatch.setattr("hessopt.closure.backward_calls._DISPATCHES_BACKWARD", False)
    for style in ("tensor", "function"):
        test_tape_survives_the_closures_backward(style)
    net, (x, y) = network(), batch()

    def closure() -> Tensor:
        loss = (net(x) - y).square().mean()
        torch.autograd.backward(loss)
        return loss

    runner = runner_of(net, closure)
    assert runner.evaluate().loss.item() == runner.trial_loss()
    assert torch.autograd.backward is invisible


def test_gradients_are_left_alone_without_backward() -> None:
    net, (x, y) = network(), batch()
    marks = [torch.full_like(p, 7.0) for p in net.parameters()]
    for p, mark in zip(net.parameters(), marks, strict=True):
        p.grad = mark
    runner = runner_of(net, lambda: (net(x) - y).square().mean())
    assert not runner.evaluate().backward_called
    runner.trial_loss()
    for p, mark in zip(net.parameters(), marks, strict=True):
        assert p.grad is mark
        assert bool((mark == 7).all())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clip", [False, True])
def test_trial_protects_gradients(set_to_none: bool, clip: bool) -> None:
    net, (x, y) = network(), batch()
    net[0].bias.requires_grad_(False)

    def closure() -> Tensor:
        net.zero_grad(set_to_none=set_to_none)
        loss = (net(x) - y).square().mean()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            for p in net.parameters():
                if p.requires_grad:
                    p.grad.clamp_(-0.05, 0.05)
        return loss

    runner = runner_of(net, closure)
    runner.evaluate()
    objects = [p.grad for p in net.parameters()]
    values = [None if g is None else g.clone() for g in objects]
    for _ in range(3):
        runner.trial_loss()
    for p, g, value in zip(net.parameters(), objects, values, strict=True):
        assert p.grad is g
        assert g is None or torch.equal(g, value)
    assert runner.runs == 4


def test_trial_builds_no_tape_unless_the_loss_needs_it() -> None:
    net, (x, y) = network(), batch()
    modes = []

    def plain() -> Tensor:
        modes.append(torch.is_grad_enabled())
        return (net(x) - y).square().mean()

    def physics() -> Tensor:
        modes.append(torch.is_grad_enabled())
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
        return slope.square().mean()

    for closure in (plain, physics):
        runner = runner_of(net, closure)
        loss = runner.evaluate().loss.item()
        assert runner.trial_loss() == loss
    assert modes == [True, False, True, True]


def test_evaluation_enables_gradients() -> None:
    net, (x, y) = network(), batch()
    with torch.no_grad():
        assert runner_of(net, lambda: (net(x) - y).square().mean()).evaluate().loss.requires_grad


@pytest.mark.parametrize("backward", [False, True])
def test_dropout_is_replayed_and_random_state_advances_once(device: torch.device, backward: bool) -> None:
    net, (x, y) = network(device, dropout=0.5), batch(device)

    def closure() -> Tensor:
        loss = (net(x) - y).square().mean()
        if backward:
            loss.backward()
        return loss

    torch.manual_seed(5)
    closure()
    expected = torch.rand(3), torch.rand(3, device=device)
    torch.manual_seed(5)
    runner = runner_of(net, closure)
    loss = runner.evaluate().loss.item()
    assert [runner.trial_loss() for _ in range(3)] == [loss] * 3
    found = torch.rand(3), torch.rand(3, device=device)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert closure().item() != loss


def test_buffers_advance_once(device: torch.device) -> None:
    net, (x, y) = network(device, norm=True), batch(device)
    net.register_buffer("calls", torch.zeros((), dtype=torch.float64, device=device))
    net.register_buffer("empty", None)

    def closure() -> Tensor:
        net.calls = net.calls + 1  # a new tensor in the buffer's place
        return (net(x) - y).square().mean() * net.calls

    runner = runner_of(net, closure)
    loss = runner.evaluate().loss.item()
    after = {name: (b, b.clone()) for name, b in net.named_buffers()}
    assert after["calls"][1].item() == 1
    assert [runner.trial_loss() for _ in range(2)] == [loss, loss]  # with the buffers of the start, too
    for name, b in net.named_buffers():
        assert b is after[name][0]
        assert torch.equal(b, after[name][1])


def test_everything_is_restored_when_a_trial_raises() -> None:
    net, (x, y) = network(dropout=0.5, norm=True), batch()
    fail = False

    def closure() -> Tensor:
        net.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        if fail:
            raise KeyboardInterrupt
        return loss

    runner = runner_of(net, closure)
    runner.evaluate()
    state, grads = torch.get_rng_state(), [p.grad for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    fail = True
    with pytest.raises(KeyboardInterrupt):
        runner.trial_loss()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))


def test_hooks_are_gone_afterwards() -> None:
    net, (x, y) = network(), batch()
    runner_of(net, lambda: (net(x) - y).square().mean()).evaluate()
    assert not net._forward_hooks
    with pytest.raises(ZeroDivisionError):
        runner_of(net, lambda: 1 / 0).evaluate()
    assert not net._forward_hooks


def test_trial_may_be_infinite() -> None:
    net, (x, _) = network(), batch()
    scale = 1.0
    runner = runner_of(net, lambda: net(x).sum() * scale)
    runner.evaluate()
    scale = float("inf")
    assert runner.trial_loss() in (float("inf"), float("-inf"))


def test_trial_needs_an_evaluation() -> None:
    with pytest.raises(RuntimeError, match=r"call evaluate\(\) before"):
        runner_of(network(), lambda: torch.zeros(())).trial_loss()


def test_module_must_be_called_once_or_the_output_given() -> None:
    net, (x, y) = network(), batch()
    way_out = r"\(loss, output\).*LeastSquares"
    evaluation = runner_of(net, lambda: (net(x) - net(-x)).square().mean()).evaluate()
    with pytest.raises(ClosureError, match=rf"called the module 2 times.*{way_out}"):
        _ = evaluation.output
    evaluation = runner_of(net, lambda: (net[2:](x @ net[0].weight.T) - y).square().mean()).evaluate()
    with pytest.raises(ClosureError, match=rf"called the module 0 times.*{way_out}"):
        _ = evaluation.output

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), x

    pair = Pair()
    evaluation = runner_of(pair, lambda: pair(x)[0].mean()).evaluate()
    with pytest.raises(ClosureError, match=rf"object of type tuple, neither a tensor nor.*{way_out}"):
        _ = evaluation.output


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss: None, "returned None. End it with `return loss`"),
        (lambda loss: loss.item(), r"returned the number .*not `return loss.item\(\)`"),
        (lambda loss: loss.detach(), r"no autograd tape.*without `.detach\(\)`"),
        (lambda loss: torch.stack([loss, loss]), r"shape \(2,\).*`.mean\(\)`.*LeastSquares"),
        (lambda loss: loss * float("nan"), "loss is nan at the current parameters"),
        (lambda loss: loss / 0, "loss is inf at the current parameters"),
        (lambda loss: (loss,), r"returned a tuple of a tensor of shape \(\).*`\(loss, output\)`"),
        (lambda loss: (loss, None), "a tuple of .*None"),
        (lambda loss: "loss", r"object of type str.*LeastSquares"),
        (lambda loss: LeastSquares(loss.detach()), "no autograd tape"),
        (lambda loss: torch.complex(loss, loss), "complex"),
    ],
)
def test_results_that_are_no_loss(result: Callable[[Tensor], Any], message: str) -> None:
    net, (x, y) = network(), batch()
    runner = runner_of(net, lambda: result((net(x) - y).square().mean()))
    with pytest.raises(ClosureError, match=message):
        runner.evaluate()


def test_backward_without_gradient_left() -> None:
    net, (x, y) = network(), batch()

    def closure() -> Tensor:
        loss = (net(x) - y).square().mean()
        loss.backward()
        net.zero_grad()
        return loss

    with pytest.raises(ClosureError, match=r"called backward\(\), but left every .grad.*before backward"):
        runner_of(net, closure).evaluate()


def numbers(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).square().mean()


@pytest.mark.parametrize(
    "returns",
    [
        lambda loss: None,
        lambda loss: loss.item(),
        lambda loss: loss.detach().clone(),
        lambda loss: {"loss": loss.detach()},
        lambda loss: (loss.item(), 3),
        lambda loss: (loss, torch.tensor(0.5)),
        lambda loss: 100 * loss,
        lambda loss: "done",
    ],
)
@pytest.mark.parametrize("tape", [True, False])
def test_the_loss_is_what_backward_was_called_on(returns: Callable[[Tensor], Any], tape: bool) -> None:
    net, (x, y) = network(), batch()

    def closure() -> Any:
        net.zero_grad()
        loss = numbers(net, x, y)
        (loss / 4).backward()
        loss += 1  # in place, afterwards
        return returns(loss)

    expected = numbers(net, x, y) / 4
    runner = ClosureRunner(closure, net.parameters(), net, tape=tape)
    evaluation = runner.evaluate()
    assert evaluation.loss.item() == expected.item()
    assert runner.trial_loss() == expected.item()
    assert torch.equal(evaluation.output, net(x))
    for p, g in zip(net.parameters(), torch.autograd.grad(expected, list(net.parameters())), strict=True):
        assert torch.equal(p.grad, g)
    if tape:
        again = torch.autograd.grad(evaluation.loss, list(net.parameters()))
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), again, strict=True))
    assert evaluation.loss.requires_grad == tape


@pytest.mark.parametrize("together", [False, True])
def test_accumulation_is_the_sum_of_the_calls(together: bool) -> None:
    """Each as it is weighted by backward; the tapes of all calls remain where one is needed."""
    net, (x, y) = network(), batch()
    parts = list(zip(x.split(2), y.split(2), strict=True))

    def closure() -> float:
        net.zero_grad()
        losses = [numbers(net, a, b) / len(parts) for a, b in parts]
        if together:
            torch.autograd.backward(losses, [torch.tensor(0.5, dtype=x.dtype)] * len(parts))
        else:
            for loss in losses:
                loss.backward(gradient=torch.tensor(0.5, dtype=x.dtype))
        return sum(loss.item() for loss in losses)

    expected = sum((numbers(net, a, b) for a, b in parts), torch.zeros((), dtype=x.dtype)) / (2 * len(parts))
    runner = runner_of(net, closure)
    evaluation = runner.evaluate()
    assert evaluation.loss.item() == pytest.approx(expected.item(), rel=1e-14)
    assert runner.trial_loss() == pytest.approx(expected.item(), rel=1e-14)
    for p, g in zip(net.parameters(), torch.autograd.grad(evaluation.loss, list(net.parameters())), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-13, atol=1e-15)
    with pytest.raises(ClosureError, match="called the module 4 times"):
        _ = evaluation.output


def test_without_a_tape_backward_frees_its_own() -> None:
    """Gradient accumulation is there to save memory: optimizers that need the gradient alone leave it that."""
    net, (x, y) = network(), batch()
    kept: list[Tensor] = []

    def closure() -> float:
        loss = numbers(net, x, y)
        loss.backward()
        kept.append(loss)
        return loss.item()

    ClosureRunner(closure, net.parameters(), net, tape=False).evaluate()
    with pytest.raises(RuntimeError, match="second time"):
        kept[0].backward()
    runner_of(net, closure).evaluate()
    kept[1].backward()


def test_backward_only_where_gradients_are_enabled() -> None:
    """``if loss.requires_grad: loss.backward()``, as in torch.optim's documentation; trials have no tape."""
    net, (x, y) = network(), batch()

    def closure(returns: float) -> Any:
        net.zero_grad()
        loss = numbers(net, x, y)
        if loss.requires_grad:
            loss.backward()
        return loss.detach() * returns

    runner = runner_of(net, functools.partial(closure, 1.0))
    assert runner.evaluate().loss.item() == runner.trial_loss()
    runner = runner_of(net, functools.partial(closure, 4.0))
    runner.evaluate()
    with pytest.raises(ClosureError, match=r"not in a trial.*Call backward\(\) in every run"):
        runner.trial_loss()


def test_weights_of_backward_hide_the_loss() -> None:
    net, (x, y) = network(), batch()

    def closure(returns: Callable[[Tensor], Any]) -> Any:
        net.zero_grad()
        z = net(x)
        loss = (z - y).square().mean()
        z.backward(gradient=(z - y).detach() * (2 / y.numel()))
        return returns(loss)

    for tape in (True, False):
        runner = ClosureRunner(functools.partial(closure, lambda loss: loss), net.parameters(), net, tape=tape)
        evaluation = runner.evaluate()
        assert evaluation.loss.item() == runner.trial_loss() == numbers(net, x, y).item()
    for p, g in zip(net.parameters(), torch.autograd.grad(numbers(net, x, y), list(net.parameters())), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-13, atol=1e-15)
    with pytest.raises(ClosureError, match=r"shape \(7, 2\) with weights.*return that loss, on its tape"):
        runner_of(net, functools.partial(closure, lambda loss: loss.item())).evaluate()
    runner = ClosureRunner(functools.partial(closure, lambda loss: loss.item()), net.parameters(), net, tape=False)
    assert runner.evaluate().loss.item() == pytest.approx(numbers(net, x, y).item(), rel=1e-6)
    with pytest.raises(ClosureError, match="on its tape"):
        ClosureRunner(functools.partial(closure, str), net.parameters(), net, tape=False).evaluate()


def test_backward_into_some_of_the_parameters() -> None:
    net, (x, y) = network(), batch()
    inputs: list[Tensor] = [net[0].weight]

    def closure() -> Tensor:
        net.zero_grad()
        loss = numbers(net, x, y)
        loss.backward(inputs=inputs)
        return loss

    with pytest.raises(ClosureError, match=r"backward\(inputs=…\) without parameter 1, of shape \(5,\)"):
        runner_of(net, closure).evaluate()
    ClosureRunner(closure, net.parameters(), net, tape=False).evaluate()  # as in torch.optim
    assert net[0].bias.grad is None
    ClosureRunner(closure, [net[0].weight], net).evaluate()
    inputs[:] = net.parameters()
    runner_of(net, closure).evaluate()


def test_least_squares_and_another_backward() -> None:
    net, (x, y) = network(), batch()
    divisor = 1.0

    def closure() -> LeastSquares:
        net.zero_grad()
        squares = LeastSquares(net(x) - y)
        (squares.loss / divisor).backward()
        return squares

    evaluation = runner_of(net, closure).evaluate()
    assert evaluation.is_least_squares
    assert evaluation.loss is evaluation.result.loss
    divisor = 7.0
    with pytest.raises(ClosureError, match=r"returned LeastSquares of value .* on something else"):
        runner_of(net, closure).evaluate()


def test_scaled_loss() -> None:
    """With a GradScaler the loss is what ``.grad`` is the gradient of, before and after ``unscale_``."""
    net, (x, y) = network(), batch()
    optimizer = torch.optim.SGD(net.parameters())
    loss = numbers(net, x, y)
    for unscale in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

        def closure(scaler: torch.amp.GradScaler = scaler, unscale: bool = unscale) -> Tensor:
            net.zero_grad()
            loss = numbers(net, x, y)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            return loss

        evaluation = runner_of(net, closure).evaluate()
        assert evaluation.loss.item() == loss.item() * (1.0 if unscale else 64.0)
        for p, g in zip(net.parameters(), torch.autograd.grad(evaluation.loss, list(net.parameters())), strict=True):
            assert torch.equal(p.grad, g)


def test_empty_batch_is_named() -> None:
    net = network()
    with pytest.raises(ClosureError, match=r"loss is nan .*The batch is empty: .*shape \(0, 2\)"):
        runner_of(net, lambda: net(torch.zeros(0, 3, dtype=torch.float64)).square().mean()).evaluate()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_refused_where_the_loss_is_differentiated_twice(reentrant: bool) -> None:
    net, (x, y) = network(), batch()

    def closure() -> Tensor:
        z = checkpoint(net, x.clone().requires_grad_(), use_reentrant=reentrant)
        return (z - y).square().mean()

    runner = ClosureRunner(closure, net.parameters(), net, twice_differentiable=True)
    if reentrant:
        evaluation = runner.evaluate()
        with pytest.raises(ClosureError, match="reentrant checkpointing"):
            gradients_of(evaluation.loss, list(net.parameters()), retain_graph=True)
        with pytest.raises(ClosureError, match="reentrant checkpointing"):
            StepCurvature(evaluation.loss, list(net.parameters()), verify=True).gradient()
    else:
        with pytest.raises(ClosureError, match=r"uses torch.utils.checkpoint.*checkpointing_disable"):
            runner.evaluate()
        runner_of(net, closure).evaluate()  # for a gradient it is no obstacle
