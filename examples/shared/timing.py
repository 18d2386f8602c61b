"""How examples and benchmarks measure time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")
Batch = TypeVar("Batch")


def median_seconds(run: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Median wall-clock time of ``repeats`` runs after one that does not count, and the last result."""
    result, seconds = run(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def costs_in_gradients(model: nn.Sequential, x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """What a step of BandedNewton needs besides the gradient, in units of that: a forward and a backward pass.

    Args:
        model: Its children but the last are the nodes.
        x: A batch of inputs.
        loss_of: The loss, a function of the output ``(B, m)``.

    Returns:
        The costs of a forward pass, which evaluates a trial step, and of carrying ``m`` vectors back to the nodes.
    """
    activations: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda *a: activations.append(a[2])) for m in list(model)[:-1]]
    z = model(x)
    for hook in hooks:
        hook.remove()
    vectors = torch.eye(z.shape[1]).unsqueeze(1).expand(-1, len(x), -1)
    parameters = list(model.parameters())
    gradient, _ = median_seconds(lambda: torch.autograd.grad(loss_of(model(x)), parameters), 20)
    with torch.no_grad():
        forward, _ = median_seconds(lambda: loss_of(model(x)), 20)
    back, _ = median_seconds(
        lambda: torch.autograd.grad(z, activations, vectors, retain_graph=True, is_grads_batched=True), 20
    )
    return forward / gradient, back / gradient


@dataclass(frozen=True)
class Training:
    """What became of a training on a budget of time.

    Attributes:
        steps: Steps taken.
        work: Sum of their costs.
        curve: Seconds of training, and what was measured then: about twenty points, the last one at the end.
    """

    steps: int
    work: float
    curve: list[tuple[float, float]]


def train_for(
    seconds: float,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    measure: Callable[[], float],
    cost: Callable[[int], float] = float,
) -> Training:
    """Train until the steps have taken ``seconds``; the time of drawing batches and of measuring does not count.

    Args:
        seconds: Wall-clock time of all steps together; the step that passes it is the last.
        optimizer: Of the parameters that ``loss_of`` depends on; it is given a closure.
        batches: Endless.
        loss_of: The loss on a batch.
        measure: What the curve shows.
        cost: Of the step just taken, in which the closure ran so many times.
    """
    spent, steps, work = 0.0, 0, 0.0
    curve: list[tuple[float, float]] = []
    for batch in batches:
        runs = 0

        def closure(batch: Batch = batch) -> Tensor:
            nonlocal runs
            runs += 1
            optimizer.zero_grad()
            loss = loss_of(batch)
            loss.backward()
            return loss

        begin = time.perf_counter()
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's stub knows closures that return floats only
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        spent += time.perf_counter() - begin
        steps += 1
        work += cost(runs)
        if spent > len(curve) / 20 * seconds:
            curve.append((spent, measure()))
        if spent > seconds:
            break
    return Training(steps, work, curve)
