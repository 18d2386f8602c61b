"""Several threads at once: process-wide switches are left as they were, and each thread gets its own network."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.autograd.kernels import (
    VMAP_WITHOUT_WARNING,
    CompositeKernels,
    full_precision_cudnn,
    twice_differentiable,
)

X, Y = torch.linspace(-1, 1, 24).view(8, 3), torch.arange(8) % 3


@pytest.fixture(autouse=True)
def _switch_threads_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def _together(*works: Callable[[], Any]) -> list[Any]:
    """What the functions return, run in a thread each, all started at one moment."""
    barrier = threading.Barrier(len(works))

    def started(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(started, works))


def _switches() -> tuple[object, ...]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, list(warnings.filters),
    )  # fmt: skip


@pytest.mark.parametrize(
    "context",
    [twice_differentiable, full_precision_cudnn, lambda: VMAP_WITHOUT_WARNING],
    ids=["attention", "cudnn", "warnings"],
)
def test_who_comes_in_second_and_leaves_last_restores_the_first_ones_choice(context: Callable[[], Any]) -> None:
    before = _switches()
    inside, left = threading.Event(), threading.Event()

    def second() -> tuple[object, ...]:
        with context():
            inside.set()
            assert left.wait(10)
            return _switches()

    with ThreadPoolExecutor(1) as pool:
        with context():
            on = _switches()
            assert on != before
            result = pool.submit(second)
            assert inside.wait(10)
        left.set()
        assert result.result() == on  # still on for the second, after the first has gone
    assert _switches() == before


def test_recurrent_layers_of_two_threads_leave_cudnn_on() -> None:
    before, inside, left = _switches(), threading.Event(), threading.Event()

    class Waits(nn.LSTM):
        def forward(self, *args: Any) -> Any:
            with CompositeKernels():
                return super().forward(*args)

    def second() -> None:
        with twice_differentiable():
            inside.set()
            assert left.wait(10)
            Waits(3, 2)(torch.zeros(2, 1, 3))

    with ThreadPoolExecutor(1) as pool:
        with twice_differentiable():
            result = pool.submit(second)
            assert inside.wait(10)
            Waits(3, 2)(torch.zeros(2, 1, 3))
        left.set()
        result.result()
    assert _switches() == before


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()  # fmt: skip


def _blocks(model: nn.Module, x: Tensor) -> Tensor:
    graph = diagnostics.capture(model, x, lambda z: F.cross_entropy(z, Y))
    blocks = diagnostics.hessian_blocks(graph).total
    return torch.cat([blocks[v, v].flatten() for v in graph.chosen] + [diagnostics.parameter_hessian(graph).flatten()])


def _products(model: nn.Module, x: Tensor) -> Tensor:
    op = diagnostics.HessianOperator(model, [(x[:5], Y[:5]), (x[5:], Y[5:])], F.cross_entropy, progress=False)
    return op @ torch.ones(op.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("use", [_blocks, _products], ids=["blocks", "products"])
@pytest.mark.parametrize("same", [True, False], ids=["one network", "two networks"])
def test_two_threads_find_what_one_finds_alone(use: Callable[[nn.Module, Tensor], Tensor], same: bool) -> None:
    """With dropout and batch statistics: both are seen by all of a process."""
    first = _network(0)
    second = first if same else _network(1)
    x, other = X.double(), X.flip(0).double() + 0.5
    torch.manual_seed(2)
    expected = use(first, x), use(second, other)
    before = _switches(), torch.get_rng_state(), [t.clone() for t in (*first.state_dict().values(),)]

    def repeated(model: nn.Module, x: Tensor) -> list[Tensor]:
        return [use(model, x) for _ in range(4)]

    found = _together(lambda: repeated(first, x), lambda: repeated(second, other))
    for results, value in zip(found, expected, strict=True):
        for result in results:
            torch.testing.assert_close(result, value, rtol=1e-9, atol=1e-12)
    assert _switches() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), before[2], strict=True))


def test_products_of_one_operator_in_two_threads() -> None:
    for batches in ([(X.double(), Y)], [(X[:5].double(), Y[:5]), (X[5:].double(), Y[5:])]):
        op = diagnostics.HessianOperator(_network(0), batches, F.cross_entropy, progress=False)
        eye = torch.eye(op.shape[0], dtype=torch.float64)
        dense = op @ eye
        halves = eye.chunk(2, 1)
        for _ in range(2):
            found = torch.cat(_together(*(partial(op.matmat, half) for half in halves)), 1)
            torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-12)


def test_another_threads_forward_pass_is_not_cut() -> None:
    """A capture's hooks see the passes of its own thread only."""
    captured, ran = threading.Event(), threading.Event()

    class Pauses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is threading.main_thread():
                captured.set()
                assert ran.wait(10)
            return x

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Pauses(), nn.Linear(4, 3))

    def other() -> Tensor:
        assert captured.wait(10)
        z = model(X)
        ran.set()
        return z

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(other)
        graph = diagnostics.capture(model, X, lambda z: F.cross_entropy(z, Y), ["0", "3"])
        z = result.result()
    assert [node.name for node in graph] == ["0", "3"]
    (gradient,) = torch.autograd.grad(z.sum(), model[0].weight)  # its tape reaches the first layer
    assert gradient.any()
