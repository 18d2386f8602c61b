"""The adding problem (Hochreiter and Schmidhuber 1997): a sum over a long sequence, by recurrent networks.

Each time step has a random number in [0, 1] and a mark; two steps are marked, one in each half, and the target is the
sum of their numbers. Answering with the mean of the targets has the mean square 1/6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.shared.problems.common import Pair, means, measuring, seeded
from examples.shared.task import Problem, Task

BATCH, MEASURED = 50, 500


def sequences(count: int, length: int, generator: torch.Generator) -> Pair:
    """Inputs ``(B, T, 2)`` and targets ``(B, 1)``."""
    numbers = torch.rand(count, length, generator=generator)
    half = length // 2
    first = torch.randint(half, (count, 1), generator=generator)
    second = torch.randint(half, length, (count, 1), generator=generator)
    marks = torch.zeros(count, length).scatter_(1, torch.cat([first, second], dim=1), 1.0)
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(dim=1, keepdim=True)


def batches(length: int, seed: int, device: torch.device) -> Iterator[Pair]:
    """Endless new sequences."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x, y = sequences(BATCH, length, generator)
        yield x.to(device), y.to(device)


class Recurrent(nn.Module):
    """``h ← tanh(U x_t + W h)`` from zero, W orthogonal at first; the output is linear in the last h."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.input, self.recurrent = nn.Linear(inputs, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 1)
        nn.init.orthogonal_(self.recurrent.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.width)
        for driven in self.input(x).unbind(dim=1):
            h = torch.tanh(driven + self.recurrent(h))
        output: Tensor = self.head(h)
        return output


class LongShortTerm(nn.Module):
    """An LSTM in plain operations, which can be differentiated twice on every device; forget bias 1."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.input, self.recurrent = nn.Linear(inputs, 4 * width), nn.Linear(width, 4 * width, bias=False)
        self.head = nn.Linear(width, 1)
        with torch.no_grad():
            self.input.bias[width : 2 * width] += 1

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.width)
        for driven in self.input(x).unbind(dim=1):
            take, forget, give, new = (driven + self.recurrent(h)).chunk(4, dim=1)
            c = torch.sigmoid(forget) * c + torch.sigmoid(take) * torch.tanh(new)
            h = torch.sigmoid(give) * torch.tanh(c)
        output: Tensor = self.head(h)
        return output


def _adding(length: int, make: Callable[[], nn.Module]) -> Callable[[int, torch.device, Path | None], Task]:
    def build(seed: int, device: torch.device, data: Path | None) -> Task:
        with seeded(seed):
            model = make().to(device)
        loss = nn.MSELoss()
        # The same for all seeds, and no seed of batches.
        fixed = torch.Generator().manual_seed(2**40)
        measured = {
            name: tuple(part.to(device) for part in sequences(MEASURED, length, fixed))
            for name in ("objective", "test_loss")
        }

        def evaluate_loss(batch: Pair) -> tuple[Tensor, Tensor]:
            output = model(batch[0])
            return loss(output, batch[1]), output

        def measure() -> dict[str, float]:
            with measuring(model):
                figures: dict[str, float] = {}
                for name, (x, y) in measured.items():
                    figures |= means(model, x, y, lambda z, t, name=name: {name: loss(z, t)})  # type: ignore[misc]
                return figures

        return Task(
            model, batches(length, seed, device), evaluate_loss, measure, full_batch=False,
            loss_of_output=loss, split=lambda pair: pair, declared=(loss,),
        )  # fmt: skip

    return build


OBJECTIVE = "mean square on fresh sequences"
PROBLEMS = [
    Problem(
        "adding-20", "recurrent", "adding problem, length 20, tanh RNN of width 32", OBJECTIVE,
        _adding(20, lambda: Recurrent(2, 32)), seconds=3, size="small",
    ),
    Problem(
        "adding-rnn", "recurrent", "adding problem, length 60, tanh RNN of width 64", OBJECTIVE,
        _adding(60, lambda: Recurrent(2, 64)), seconds=20,
    ),
    Problem(
        "adding-lstm", "recurrent", "adding problem, length 60, LSTM of width 32", OBJECTIVE,
        _adding(60, lambda: LongShortTerm(2, 32)), seconds=20,
    ),
]  # fmt: skip
