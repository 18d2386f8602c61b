"""A step that is interrupted anywhere leaves everything as before it or as after it, and nothing behind."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import hessopt
from hessopt import (
    BandedNewton,
    Fixed,
    KroneckerNewton,
    LineSearch,
    NewtonCG,
    NullBoost,
    NullProject,
    OnlineExponent,
    PowerLaw,
    SaddleEscape,
    SpectralNewton,
)
from hessopt.search.rules import LevenbergMarquardt

PACKAGE = os.path.dirname(hessopt.__file__)


@contextmanager
def interrupt_at(number: int) -> Iterator[list[str]]:
    """Ctrl-C before the ``number``-th line of this package that is executed; yields the lines up to there."""
    lines: list[str] = []

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and len(lines) <= number:
            lines.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
            if len(lines) == number:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, _: str, __: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def flat_saddle(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()


def sgd(net: nn.Module) -> Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def projection(net: nn.Module) -> NullProject:
    size = sum(p.numel() for p in net.parameters())
    basis = torch.linalg.qr(torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    return NullProject(sgd(net), basis, model=net)


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "exact": lambda net: BandedNewton(net, bandwidth=1, momentum=0.5, weight_decay=0.01),
    "exact, without a trial": lambda net: BandedNewton(net, bandwidth=1, search=Fixed(1.0)),
    "exact, line search": lambda net: BandedNewton(net, bandwidth=1, search=LineSearch()),
    "kronecker": lambda net: KroneckerNewton(net, bandwidth=1, weight_decay=0.01),
    "kronecker, declared": lambda net: KroneckerNewton(net, bandwidth=0, loss="mse", momentum=0.9),
    "newton-cg": lambda net: NewtonCG(net, preconditioner="diagonal", warm_start=True),
    "levenberg-marquardt": lambda net: NewtonCG(net, method=LevenbergMarquardt(), weight_decay=0.01),
    "spectral, kronecker": lambda net: SpectralNewton(net, "mse", weight_decay=0.01),
    "spectral": lambda net: SpectralNewton(net, coordinates=PowerLaw(), weight_decay=0.01),
    "spectral, online": lambda net: SpectralNewton(
        net, coordinates=PowerLaw("online", online=OnlineExponent(every=1, directions=3))
    ),
    "escape": lambda net: SaddleEscape(sgd(net), model=net),
    "escape from a saddle": lambda net: SaddleEscape(sgd(net), model=net),
    "boost": lambda net: NullBoost(sgd(net), model=net, krylov=4, every=1),
    "project": projection,
}


def everything(net: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Parameters, and the tensors and numbers of the optimizer's state."""
    found: list[Tensor] = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        state = optimizer.state.get(p, {})
        for name in sorted(state):
            value = state[name]
            if isinstance(value, Tensor | float | int):
                found.append(torch.as_tensor(value, dtype=torch.float64).clone())
    kronecker = getattr(optimizer, "_kronecker", None)
    momentum = {} if kronecker is None else kronecker.momentum
    return found + [momentum[p].clone() for p in net.parameters() if p in momentum]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(a, b, strict=True)
    )


def leftovers(net: nn.Module) -> tuple[Any, ...]:
    """What a step must not leave behind."""
    sdp = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    return (
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        torch._C._len_torch_function_stack(),
        torch.is_grad_enabled(),
        torch.autograd.backward,
        torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        sdp,
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.allow_tf32,
    )


WRAPPERS = ("escape", "escape from a saddle", "boost", "project")


@pytest.mark.parametrize("kind", list(MAKERS))
def test_an_interrupted_step_is_taken_or_not(kind: str) -> None:
    interrupt(kind, backward=list(MAKERS).index(kind) % 2 == 0, samples=10)


@pytest.mark.parametrize("kind", ["spectral", "newton-cg", "escape"])
def test_an_interrupted_evaluation_leaves_nothing_behind(kind: str) -> None:
    """At every line of it, those at which contexts are left among them."""
    interrupt(kind, backward=True, files=("runner.py", "backward_calls.py"))


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_an_interrupted_step_is_taken_or_not_at_many_lines(kind: str, backward: bool) -> None:
    interrupt(kind, backward=backward, samples=400)


def interrupt(kind: str, *, backward: bool, samples: int = 2, files: tuple[str, ...] = ()) -> None:
    """At lines spread over the whole second step, in which state is there already, at its last twelve, and in files."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 2, generator=generator, dtype=torch.float64)

    def prepared() -> tuple[nn.Module, Optimizer, Callable[[], Tensor]]:
        net = network()
        optimizer = MAKERS[kind](net)

        def closure() -> Tensor:
            if backward:
                optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            if backward:
                loss.backward()
            return loss

        if kind == "escape from a saddle":
            flat_saddle(net)  # a check is due at the first step alone
        else:
            optimizer.step(closure)
        return net, optimizer, closure

    net, optimizer, closure = prepared()
    before = everything(net, optimizer)
    clean = leftovers(net)
    with interrupt_at(sys.maxsize) as lines:
        optimizer.step(closure)
    after, total = everything(net, optimizer), len(lines)
    assert not same(before, after)

    numbers = {1 + round(i * (total - 1) / (samples - 1)) for i in range(samples)} | set(range(total - 11, total + 1))
    numbers |= {i for i, line in enumerate(lines, 1) if line.startswith(files)} if files else set()
    taken = []
    again = True
    for number in sorted(n for n in numbers if n > 0):
        if again:
            net, optimizer, closure = prepared()
        gradients = [p.grad for p in net.parameters()]
        with interrupt_at(number) as reached, suppress(KeyboardInterrupt):
            optimizer.step(closure)
        where = f"interrupted at {reached[-1]}, line {number} of {total}"
        now = everything(net, optimizer)
        assert same(now, before) or same(now, after), where
        assert leftovers(net) == clean, where
        if not backward and kind not in WRAPPERS:
            assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True)), where
        taken.append(same(now, after))
        # Else the same optimizer goes on, as if nothing had been; but running averages may have seen the batch.
        again = taken[-1] or "kronecker" in kind
    assert not all(taken)
