"""The search for a damping, on a problem in one variable where every number is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hessopt.banded.damped_step import DampedStep, line_step, search_step, take_step
from hessopt.banded.quadratic_model import QuadraticModel
from hessopt.errors import SolveError
from hessopt.search.damping import NielsenDamping


class Curvature:
    """Factor of the 1×1 matrix c²."""

    size = 1

    def __init__(self, root: float) -> None:
        self.root = root

    def jvp(self, step: list[Tensor]) -> Tensor:
        return self.root * step[0]


class Line:
    """Minimize f over one parameter, from the model f'(θ) d + ½ c² d²."""

    def __init__(self, f: Callable[[Tensor], Tensor], start: float, root: float, lr: float = 1.0) -> None:
        self.f = f
        self.theta = torch.tensor([start], dtype=torch.float64, requires_grad=True)
        self.loss = f(self.theta).sum()
        (self.slope,) = torch.autograd.grad(self.loss, self.theta)
        self.model = QuadraticModel([[self.theta]], [Curvature(root)], [[self.slope]], [[lr]], [[0.0]])  # type: ignore[list-item]
        self.curvature, self.lr = root**2, lr
        self.solves: list[float] = []

    def solve(self, damping: float) -> list[list[Tensor]]:
        self.solves.append(damping)
        return [[-self.lr * self.slope / (self.curvature + damping)]]

    def search(self, damping: NielsenDamping, rejections: int = 5, **options: bool) -> DampedStep:
        def evaluate() -> float:
            return float(self.f(self.theta).sum())

        return search_step(
            self.model, self.solve, evaluate, self.loss.detach(), damping, max_rejections=rejections, **options
        )

    def line(self, damping: NielsenDamping, **options: bool) -> DampedStep:
        def evaluate() -> float:
            return float(self.f(self.theta).sum())

        return line_step(self.model, self.solve, evaluate, self.loss.detach(), damping, **options)


def test_exact_model_is_accepted_at_once() -> None:
    line, damping = Line(lambda t: t.square(), 3.0, 2**0.5), NielsenDamping(2.0)
    result = line.search(damping)
    assert line.theta.item() == 1.5
    assert result.accepted
    assert (result.loss, result.trial_loss, result.gradient_norm) == (9.0, 2.25, 6.0)
    assert result.predicted_reduction == pytest.approx(6.75, rel=1e-14)
    assert result.actual_reduction == 6.75
    assert result.ratio == pytest.approx(1.0, rel=1e-14)
    assert (result.damping, result.solves, result.closure_runs) == (2.0, 1, 2)
    assert damping.value == pytest.approx(2 / 3, rel=1e-14)


def test_damping_rises_until_the_loss_falls() -> None:
    line, damping = Line(lambda t: t.pow(4), 1.0, 0.1), NielsenDamping(0.1)
    result = line.search(damping)
    assert result.accepted
    assert line.solves == [0.1, 0.2, 0.8, 6.4]
    assert result.damping == 6.4
    assert result.solves == 4
    assert result.closure_runs == 5
    assert abs(line.theta.item()) < 1


def test_giving_up_restores_every_bit() -> None:
    line, damping = Line(lambda t: t.pow(4), 0.1 + 0.2, 1e-3), NielsenDamping(1e-9)
    result = line.search(damping, rejections=2)
    assert not result.accepted
    assert line.theta.item() == 0.1 + 0.2
    assert (result.solves, result.closure_runs) == (2, 3)
    assert damping.value == pytest.approx(8e-9)
    assert damping.growth == 8


def test_a_step_that_the_model_itself_predicts_to_fail_costs_no_evaluation() -> None:
    line, damping = Line(lambda t: t.square(), 3.0, 2**0.5, lr=3.0), NielsenDamping(0.5)
    result = line.search(damping)
    assert result.accepted
    assert line.solves == [0.5, 1.0, 4.0]
    assert result.closure_runs == 2


def test_failed_solves_count_as_rejected() -> None:
    line, damping = Line(lambda t: t.square(), 3.0, 2**0.5), NielsenDamping(1.0)

    def fail_below_eight(value: float) -> list[list[Tensor]]:
        if value < 8:
            raise SolveError
        return line.solve(value)

    result = search_step(line.model, fail_below_eight, lambda: 0.0, line.loss.detach(), damping, max_rejections=5)
    assert result.accepted
    assert (result.solves, result.closure_runs, result.damping) == (3, 2, 8.0)
    line = Line(lambda t: t.square(), 3.0, 2**0.5)
    result = search_step(
        line.model, fail_below_eight, lambda: 0.0, line.loss.detach(), NielsenDamping(1.0), max_rejections=2
    )
    assert not result.accepted
    assert result.predicted_reduction is None
    assert result.ratio is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_trial_that_is_not_finite_is_rejected(value: float) -> None:
    line = Line(lambda t: t.square() if t.item() == 3.0 else t * value, 3.0, 2**0.5)
    result = line.search(NielsenDamping(1.0))
    assert not result.accepted
    assert line.theta.item() == 3.0


def test_zero_step_is_no_step() -> None:
    line, damping = Line(lambda t: t.square(), 0.0, 1.0), NielsenDamping(1.0)
    result = line.search(damping)
    assert (result.accepted, result.solves, result.closure_runs) == (False, 1, 1)
    assert result.predicted_reduction == 0
    assert damping == NielsenDamping(1.0)


def test_maximize() -> None:
    line, damping = Line(lambda t: -t.square(), 3.0, 2**0.5), NielsenDamping(2.0)
    line.slope.neg_()
    result = line.search(damping, maximize=True)
    assert result.accepted
    assert line.theta.item() == 1.5
    assert result.actual_reduction == 6.75


def test_rounding_at_a_minimum_is_not_a_failure() -> None:
    line, damping = Line(lambda t: 1 + t.square(), 1e-9, 2**0.5), NielsenDamping(1e-3)
    result = line.search(damping)
    assert result.actual_reduction == 0
    assert result.accepted


def test_parameters_are_restored_when_the_closure_raises() -> None:
    line = Line(lambda t: t.square(), 0.1 + 0.2, 1.0)

    def fail() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_step(line.model, line.solve, fail, line.loss.detach(), NielsenDamping(1.0), max_rejections=5)
    assert line.theta.item() == 0.1 + 0.2


def test_step_without_trial() -> None:
    line = Line(lambda t: t.square(), 3.0, 2**0.5)
    result = take_step(line.model, line.solve, line.loss.detach(), 2.0)
    assert line.theta.item() == 1.5
    assert result.accepted
    assert result.predicted_reduction == pytest.approx(6.75, rel=1e-14)
    assert (result.trial_loss, result.actual_reduction, result.ratio) == (None, None, None)


@pytest.mark.parametrize(
    ("lr", "taken", "factor"), [(1.0, 1.0, 0.1), (8.0, 0.125, 1 / 3), (16.0, 0.0625, 1.0), (128.0, 0.0078125, 4.0)]
)
@pytest.mark.parametrize("adapt", [True, False])
def test_line_search_finds_the_length_and_damping_follows(lr: float, taken: float, factor: float, adapt: bool) -> None:
    """The solve's step is ``lr`` times the way to the minimum of a parabola, but for the damping."""
    line, damping = Line(lambda t: t.square(), 3.0, 2**0.5, lr), NielsenDamping(1e-9)
    result = line.line(damping, adapt=adapt)
    assert result.accepted
    assert result.length == taken
    assert result.damping == 1e-9
    assert abs(line.theta.item()) < 1e-8
    assert damping.value == pytest.approx(1e-9 * (factor if adapt else 1.0), rel=1e-12)


@pytest.mark.parametrize("adapt", [True, False])
def test_line_search_raises_the_damping_of_failed_solves(adapt: bool) -> None:
    line, damping = Line(lambda t: t.square(), 3.0, 2**0.5), NielsenDamping(1e-3)
    solve = line.solve

    def fails(value: float) -> list[list[Tensor]]:
        if value < 0.05:
            raise SolveError("singular")
        return solve(value)

    line.solve = fails  # type: ignore[method-assign]
    result = line.line(damping, adapt=adapt)
    assert (result.solves, result.accepted) == (3, True)
    assert result.damping == pytest.approx(0.1)
    assert damping.value == pytest.approx(0.01 if adapt else 1e-3)  # the full length was taken


def test_line_search_without_a_success_raises_the_damping() -> None:
    line, damping = Line(lambda t: t.square(), 3.0, 2**0.5, lr=-1.0), NielsenDamping(1e-3)
    result = line.line(damping)
    assert (result.accepted, result.length, line.theta.item()) == (False, 0.0, 3.0)
    assert damping.value == pytest.approx(4e-3)
