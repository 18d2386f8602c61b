"""Two tasks on scikit-learn's 8×8 digits, 1437 to train on and 360 to test: one output, and ten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared.models import mlp
from examples.shared.problems.classification import digits


@dataclass(frozen=True)
class DigitTask:
    """A task on handwritten digits.

    Attributes:
        name: What is asked.
        outputs: Of the network.
        batch: Rows of a batch.
        loss: Of outputs and targets.
        hits: Whether rows are answered rightly, of outputs and targets.
        data: Centred inputs ``(N, 64)`` and targets of the training set, and both of the test set.
    """

    name: str
    outputs: int
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor]
    hits: Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor, Tensor, Tensor]


def digit_tasks() -> list[DigitTask]:
    """Is the digit odd, and which is it."""
    x, y, x_test, y_test = digits()
    x, x_test = x - x.mean(0), x_test - x.mean(0)
    odd, odd_test = ((labels % 2).float().unsqueeze(1) for labels in (y, y_test))
    return [
        DigitTask(
            "odd or even", 1, 256, F.binary_cross_entropy_with_logits, lambda z, t: (z > 0) == (t > 0),
            (x, odd, x_test, odd_test),
        ),
        DigitTask("which digit", 10, 64, F.cross_entropy, lambda z, t: z.argmax(1) == t, (x, y, x_test, y_test)),
    ]  # fmt: skip


def network(task: DigitTask, seed: int) -> nn.Sequential:
    """Six tanh layers of width 20, initialised from the seed."""
    torch.manual_seed(seed)
    return mlp([64, 20, 20, 20, 20, 20, 20, task.outputs], nn.Tanh)
