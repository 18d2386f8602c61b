"""Two products that differ, and the reason given."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diagnostics.operators.curvature import GaussNewtonOperator, HessianOperator
from diagnostics.operators.determinism import NonDeterministicError
from tests.helpers.networks import Chain


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 3, (9,))


def shuffled(generator: torch.Generator | None, size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=size, shuffle=True, generator=generator)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()


class Scaled(nn.Module):
    """Multiplies by a number that something else decides."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw()


def network(draw: Callable[[], float]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), Scaled(draw), nn.Tanh(), nn.Linear(4, 3)).double()


def check(model: nn.Module, batches: Any, loss: Callable[[Any, Any], Tensor] = F.cross_entropy) -> tuple[str, ...]:
    result = HessianOperator(model, batches, loss).check_deterministic()
    assert result.difference < 1e-12
    return result.held_fixed


class TestWhatIsHeldFixed:
    def test_nothing_of_a_plain_model(self) -> None:
        assert check(Chain(5, 4, 3).double(), data()) == ()

    def test_dropout(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
        (reason,) = check(model, data())
        assert reason.startswith("the random state: '1' (Dropout) draws random numbers")
        (reason,) = check(model, DataLoader(TensorDataset(*data()), batch_size=4))
        assert "'1' (Dropout)" in reason
        assert check(model.eval(), data()) == ()

    def test_buffers(self) -> None:
        (reason,) = check(normed(), data())
        assert reason.startswith("buffers: a forward pass changes '1.running_mean', '1.running_var'")
        assert check(normed().eval(), data()) == ()

    def test_the_order_of_a_loader_that_uses_the_global_random_state(self) -> None:
        (reason,) = check(Chain(5, 4, 3).double(), shuffled(None))
        assert reason.startswith("the data: their order or values depend on the global random state")
        held = check(normed(), shuffled(None, size=3))
        assert [line.split(":")[0] for line in held] == ["buffers", "the data"]

    def test_another_order_that_changes_nothing_but_rounding(self) -> None:
        (reason,) = check(Chain(5, 4, 3).double(), shuffled(torch.Generator()))
        assert reason.startswith("not the data: the data come in another order")
        assert reason.endswith("changes products by no more than rounding")

    def test_a_model_that_works_in_place_on_its_input(self) -> None:
        class Doubling(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.mul_(2)

        assert check(nn.Sequential(Doubling(), Chain(5, 4, 3).double()), data()) == ()

    def test_random_loss(self) -> None:
        (reason,) = check(Chain(5, 4, 3).double(), data(), lambda z, y: F.cross_entropy(z * torch.rand(()), y))
        assert reason.startswith("the random state: the loss function draws random numbers")

    def test_state_is_as_before(self) -> None:
        model = normed()
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        op = HessianOperator(model, data_ := data(), F.cross_entropy)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        before = op @ torch.ones(op.shape[1], dtype=op.dtype)
        op.check_deterministic()
        assert torch.equal(op @ torch.ones(op.shape[1], dtype=op.dtype), before)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
        assert random.getstate() == states[2]
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
        assert not any(m._forward_hooks for m in model.modules())
        assert torch.equal(data_[0], data()[0])


class TestReasons:
    @staticmethod
    def reason(model: nn.Module, batches: Any, loss: Callable[[Any, Any], Tensor] = F.cross_entropy) -> str:
        with pytest.raises(NonDeterministicError, match="two products with the same vector differ by") as caught:
            GaussNewtonOperator(model, batches, loss).check_deterministic()
        return str(caught.value)

    def test_order_of_the_data_where_samples_influence_each_other(self) -> None:
        reason = self.reason(normed(), shuffled(torch.Generator(), size=3))
        assert "the data come in another order at every pass" in reason
        assert "batch-norm" in reason
        assert "list(batches)" in reason

    def test_random_augmentation(self) -> None:
        class Noisy:
            generator = torch.Generator()

            def __iter__(self) -> Iterator[Any]:
                x, y = data()
                yield x[:4] + 0.1 * torch.randn(4, 5, generator=self.generator, dtype=x.dtype), y[:4]
                yield x[4:], y[4:]

        reason = self.reason(Chain(5, 4, 3).double(), Noisy())
        assert "the data are others at every pass (4 of 9 samples): random augmentation" in reason

    def test_numpys_random_numbers(self) -> None:
        reason = self.reason(network(lambda: float(np.random.rand())), data())  # noqa: NPY002
        assert "'1' (Scaled) draws random numbers of NumPy" in reason

    def test_pythons_random_numbers(self) -> None:
        assert "'1' (Scaled) draws random numbers of Python" in self.reason(network(random.random), data())

    def test_state_outside_of_buffers(self) -> None:
        calls = iter(range(1, 1000))
        reason = self.reason(network(lambda: 1 / next(calls)), data())
        assert "'1' (Scaled) gives another result at every call" in reason
        assert "state outside of buffers" in reason

    def test_a_generator_of_its_own(self) -> None:
        generator = torch.Generator()
        reason = self.reason(network(lambda: torch.rand((), generator=generator).item()), data())
        assert "'1' (Scaled) gives another result at every call" in reason

    def test_a_loss_with_state(self) -> None:
        calls = iter(range(1, 1000))
        reason = self.reason(Chain(5, 4, 3).double(), data(), lambda z, y: F.cross_entropy(z / next(calls), y))
        assert "the loss function gives another result at every call" in reason

    def test_nondeterministic_kernels_of_the_forward_pass(self) -> None:
        """Stands in for a CUDA kernel that obeys ``use_deterministic_algorithms``."""
        calls = iter(range(1, 1000))
        draw = lambda: 1.0 if torch.are_deterministic_algorithms_enabled() else 1 / next(calls)  # noqa: E731
        reason = self.reason(network(draw), data())
        assert "'1' (Scaled) runs nondeterministic kernels" in reason
        assert not torch.are_deterministic_algorithms_enabled()

    def test_nondeterministic_kernels_of_the_backward_pass(self) -> None:
        calls = iter(range(1, 1000))

        class Unstable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad * (1 + 1e-3 / next(calls))

        model = Chain(5, 4, 3).double()
        reason = self.reason(model, data(), lambda z, y: F.cross_entropy(Unstable.apply(z), y))
        assert "kernels of the backward pass are nondeterministic" in reason

    def test_str(self) -> None:
        text = str(HessianOperator(normed(), data(), F.cross_entropy).check_deterministic())
        assert text.startswith("two products differ by 0.0e+00 of their norm\n  held fixed: buffers")
