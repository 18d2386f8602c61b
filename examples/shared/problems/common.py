"""What problems share: seeds that leave the global random state alone, batches, and supervised tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from examples.shared.task import Task
from hessopt import LeastSquares

Pair: TypeAlias = "tuple[Tensor, Tensor]"
Figures: TypeAlias = "Callable[[Tensor, Tensor], Mapping[str, Tensor]]"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator, and put it back: networks are initialised there and moved, the same on any device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def minibatches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[Pair]:
    """Rows without replacement, in the order of ``seed``; the last, smaller batch of an epoch is left out."""
    if size > len(x):
        raise ValueError(f"a batch of {size} is more than the {len(x)} samples there are.")
    generator = torch.Generator().manual_seed(seed)

    def endless() -> Iterator[Pair]:
        while True:
            order = torch.randperm(len(x), generator=generator)
            for rows in order[: len(x) // size * size].split(size):
                rows = rows.to(x.device)
                yield x[rows], y[rows]

    return endless()


def accuracy(output: Tensor, y: Tensor) -> Mapping[str, Tensor]:
    """The share of rows whose largest output is that of their class."""
    return {"accuracy": (output.argmax(dim=-1) == y).double().mean()}


def means(model: nn.Module, x: Tensor, y: Tensor, figures: Figures, chunk: int = 500) -> dict[str, float]:
    """Means over all rows of figures that are means over the rows they are given."""
    total: dict[str, float] = {}
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        for name, value in figures(model(xs), ys).items():
            total[name] = total.get(name, 0.0) + value.item() * len(xs) / len(x)
    return total


def supervised(
    model: nn.Module,
    loss: nn.Module,
    train: Pair,
    test: Pair,
    *,
    seed: int,
    batch: int | None,
    figures: Figures | None = None,
    measured: int = 2000,
    least_squares: bool = False,
    kfac: bool = True,
    declared: tuple[Any, ...] | None = None,
) -> Task:
    """A network trained on pairs.

    Args:
        model: On the device of the data.
        loss: Of outputs and targets, a mean over rows.
        train: Inputs and targets.
        test: Inputs and targets.
        seed: Of the order of the batches.
        batch: Rows of a batch; None: all of them.
        figures: Further means over the test set, by name.
        measured: How many of the first training rows make up the objective.
        least_squares: The loss is the mean square, and is given as residuals.
        kfac: Offer the loss as a function of the output, in a form that K-FAC knows.
        declared: See :class:`Task`. Default: the module, unless the loss is given as residuals.
    """

    def evaluate_loss(pair: Pair) -> tuple[Tensor, Tensor] | LeastSquares:
        x, y = pair
        output = model(x)
        if least_squares:
            return LeastSquares((output - y) * (2 / y.numel()) ** 0.5)
        return loss(output, y), output

    def residual_rows(rows: Tensor) -> LeastSquares:
        x, y = train
        return LeastSquares((model(x[rows]) - y[rows]) * (2 / y.numel()) ** 0.5)

    def of_test(output: Tensor, y: Tensor) -> Mapping[str, Tensor]:
        return {"loss": loss(output, y), **(figures(output, y) if figures else {})}

    def measure() -> dict[str, float]:
        with measuring(model):
            x, y = train
            objective = means(model, x[:measured], y[:measured], lambda z, t: {"objective": loss(z, t)})
            return objective | {f"test_{name}": value for name, value in means(model, *test, of_test).items()}

    return Task(
        model=model,
        batches=itertools.repeat(train) if batch is None else minibatches(*train, batch, seed),
        evaluate_loss=evaluate_loss,
        measure=measure,
        full_batch=batch is None,
        loss_of_output=loss if kfac else None,
        split=(lambda pair: pair) if kfac else None,
        declared=(loss,) if declared is None and not least_squares else declared,
        residual_rows=residual_rows if least_squares else None,
        strata=(len(train[0]),) if least_squares else (),
    )


def folder_of(data: Path | None, problem: str) -> Path:
    """The folder of data.

    Raises:
        ValueError: there is none.
    """
    if data is None:
        raise ValueError(f"the problem {problem!r} needs real data: pass its folder, `--data DIR`.")
    return data
