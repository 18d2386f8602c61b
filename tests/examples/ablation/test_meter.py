"""Gradient-equivalents are the passes through the network, whoever makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hessopt
from examples.shared.task import Task
from examples.studies.ablation import runner
from examples.studies.ablation.contender import ClosureStep, Finished
from examples.studies.ablation.meter import Meter, Work, loss_of
from tests.examples.ablation.toys import BATCHES, FULL, LONG, contender, steps


def test_gradient_equivalents_of_sgd_are_its_steps() -> None:
    for problem in (FULL, BATCHES):
        result = runner.run(problem, contender("sgd", steps(25)), {}, 0, LONG)
        assert (result.status, result.reason, result.steps) == ("finished", "enough", 25)
        assert result.gradient_equivalents == pytest.approx(25, rel=1e-12)


def test_gradient_equivalents_of_newton_cg_are_its_products() -> None:
    reported: list[Any] = []

    class Step(ClosureStep):
        def step(self, batch: Any) -> float:
            if len(reported) == 15:
                raise Finished("enough")
            loss = super().step(batch)
            reported.append(self.optimizer.last_step)
            return loss

    def make(task: Task) -> Step:
        return Step(task, hessopt.NewtonCG(task.model, curvature="hessian"))

    result = runner.run(FULL, contender("newton", make), {}, 0, LONG)
    products = sum(step.products["hessian"] for step in reported)
    trials = sum(step.trials for step in reported)

    # The same passes by hand, each counted by itself.
    task = runner.fresh_task(FULL, 0, torch.device("cpu"), None)
    batch, parameters = next(task.batches), list(task.model.parameters())
    with Work() as forward:
        loss = loss_of(task.evaluate_loss(batch))
    with Work() as backward:
        slopes = torch.autograd.grad(loss, parameters, retain_graph=True)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    with Work() as product:
        torch.autograd.grad(slopes, parameters, [torch.ones_like(p) for p in parameters], retain_graph=True)
    unit = forward.operations + backward.operations
    expected = len(reported) + (trials * forward.operations + products * product.operations) / unit
    # Beside these there is the check of the first step that gradients are on the tape: one more backward pass.
    extra = result.gradient_equivalents - expected
    assert products > 20
    assert extra == pytest.approx(backward.operations / unit, abs=0.02 * expected)
    assert product.operations / unit == pytest.approx(2, rel=0.2)  # of a linear layer's matrix products


def test_work_is_that_of_matrix_products() -> None:
    x, w = torch.randn(5, 7), torch.randn(7, 3)
    with Work() as work:
        (x @ w).tanh()
    assert work.operations == 2 * 5 * 7 * 3 + 5 * 3


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_work_of_recurrent_networks(kind: type[nn.RNNBase]) -> None:
    """Also where the whole layer is one operation: at least its matrix products, and twice that backward."""
    gates = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}[kind]
    net, x = kind(6, 20), torch.randn(9, 4, 6)
    products = 2 * 9 * 4 * gates * 20 * (6 + 20)
    with Work() as forward:
        out, _ = net(x)
    with Work() as backward:
        out.sum().backward()
    assert products <= forward.operations <= 1.4 * products
    assert 1.5 * products <= backward.operations <= 2.8 * products


def metered() -> tuple[Meter, Task]:
    meter = Meter(1.0)
    return meter, meter.attach(runner.fresh_task(FULL, 0, torch.device("cpu"), None))


def test_batched_products_count_each() -> None:
    meter, task = metered()
    parameters = list(task.model.parameters())
    with meter.watching(task):
        _, z = task.evaluate_loss(next(task.batches))  # type: ignore[misc]
        spent = []
        for k in (1, 2, 6, 3):
            before = meter.spent
            torch.autograd.grad(z, parameters, torch.randn(k, *z.shape), retain_graph=True, is_grads_batched=True)
            spent.append(meter.spent - before)
    assert spent[1:] == pytest.approx([2 * spent[0], 6 * spent[0], 3 * spent[0]], rel=0.05)


def test_forward_passes_outside_of_the_loss_count() -> None:
    meter, task = metered()
    x, _ = next(task.batches)
    with meter.watching(task):
        task.model(x)
        one = meter.spent
        task.evaluate_loss((x, x[:, :2]))
    assert one >= 2 * 32 * (3 * 8 + 8 * 2)
    assert one < meter.spent - one < 1.3 * one
    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    task.model(x)
    task.evaluate_loss((x, x[:, :2]))[0].backward()  # type: ignore[index]
    assert "counted" not in engine.__qualname__


def test_a_pass_from_an_edge_of_the_tape_counts_as_one_from_its_tensor() -> None:
    meter, task = metered()
    parameters = list(task.model.parameters())
    with meter.watching(task):
        _, z = task.evaluate_loss(next(task.batches))  # type: ignore[misc]
        spent = []
        for output in (z, torch.autograd.graph.get_gradient_edge(z)):
            before = meter.spent
            torch.autograd.grad(output, parameters, torch.ones_like(z), retain_graph=True)
            spent.append(meter.spent - before)
    assert spent[0] == spent[1] > 0
