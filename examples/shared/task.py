"""What an optimizer is run on: one task is one problem, freshly initialised from one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hessopt import LeastSquares

Batch: TypeAlias = Any
Evaluated: TypeAlias = "tuple[Tensor, Tensor] | LeastSquares"


@dataclass
class Task:
    """One run's worth of a problem.

    Attributes:
        model: Initialised from the seed; the same for every optimizer.
        batches: Endless; the same sequence for every optimizer. A full-batch problem yields one batch for ever.
        evaluate_loss: ``(loss, output)``, or the residuals of a least-squares problem, on one batch; it calls the
            model, and does not call ``backward``.
        measure: Figures to report, by name, outside of every budget. ``"objective"`` is the one that curves show and
            targets are stated in: lower is better.
        full_batch: Every batch is the same, so that line searches and LBFGS make sense.
        loss_of_output: ``loss(output, targets)`` and :attr:`split`, for methods that need the loss apart from the
            network (K-FAC). None where the loss is no function of one output.
        split: Inputs and targets of a batch.
        declared: The loss module that :attr:`evaluate_loss` calls; or the loss's name, reduction and perhaps the
            dimension of the classes, for methods that know a few losses by name. None for another loss.
        residual_rows: Where the problem is one of least squares: the residuals of these of all its rows, whose numbers
            are an ascending int64 tensor on the model's device, each scaled as in the whole problem, ½ Σ r² over all
            rows. None where rows cannot be told apart.
        strata: Numbers of rows of the conditions that the rows are made up of, in their order.
    """

    model: nn.Module
    batches: Iterator[Batch]
    evaluate_loss: Callable[[Batch], Evaluated]
    measure: Callable[[], dict[str, float]]
    full_batch: bool
    loss_of_output: nn.Module | None = None
    split: Callable[[Batch], tuple[Tensor, Tensor]] | None = None
    declared: tuple[Any, ...] | None = None
    residual_rows: Callable[[Tensor], LeastSquares] | None = None
    strata: tuple[int, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A recipe for tasks.

    Attributes:
        name: Unique; what users type.
        family: Problems of one family count once in summaries.
        title: A line for tables and figures.
        objective: What ``measure()["objective"]`` is, e.g. "relative L2 error".
        build: ``build(seed, device, data)``, with the folder of real data or None where it is not needed.
        seconds: Budget of a full run on two cores of a CPU.
        needs_data: Whether the folder is needed.
        size: ``"small"`` problems make up the quick study, which needs no data.
    """

    name: str
    family: str
    title: str
    objective: str
    build: Callable[[int, torch.device, Path | None], Task]
    seconds: float
    needs_data: bool = False
    size: str = "full"
