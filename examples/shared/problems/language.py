"""A small character GPT on the works of Shakespeare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.shared.models import gpt
from examples.shared.problems import data as datasets
from examples.shared.problems.common import Pair, folder_of, means, measuring, seeded
from examples.shared.task import Problem, Task

CONTEXT, BATCH, MEASURED = 64, 32, 64


def windows(text: Tensor, starts: Tensor) -> Pair:
    """The ``CONTEXT`` characters from each start, and the ones that follow each: ``(B, T)`` both."""
    positions = starts.unsqueeze(1) + torch.arange(CONTEXT)
    return text[positions], text[positions + 1]


def random_windows(text: Tensor, seed: int, device: torch.device) -> Iterator[Pair]:
    """Endless batches of windows at random."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x, y = windows(text, torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator))
        yield x.to(device), y.to(device)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over characters, in nats: logits ``(B, T, V)``, targets ``(B, T)``."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _shakespeare(seed: int, device: torch.device, data: Path | None) -> Task:
    text, vocabulary = datasets.characters(folder_of(data, "shakespeare"))
    train, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    with seeded(seed):
        model = gpt(vocabulary, CONTEXT, depth=2, width=96, heads=4).to(device)
    measured = {
        name: tuple(part.to(device) for part in windows(of, torch.linspace(0, len(of) - CONTEXT - 1, MEASURED).long()))
        for name, of in (("objective", train), ("test_loss", test))
    }

    def evaluate_loss(batch: Pair) -> tuple[Tensor, Tensor]:
        logits = model(batch[0])
        return cross_entropy(logits, batch[1]), logits

    def measure() -> dict[str, float]:
        with measuring(model):
            figures: dict[str, float] = {}
            for name, (x, y) in measured.items():
                figures |= means(model, x, y, lambda z, t, name=name: {name: cross_entropy(z, t)})  # type: ignore[misc]
            return figures

    return Task(
        model,
        random_windows(train, seed, device),
        evaluate_loss,
        measure,
        full_batch=False,
        declared=("cross_entropy", "mean", -1),
    )


PROBLEMS = [
    Problem(
        "shakespeare", "language", "tinyshakespeare, GPT of 2 layers, width 96, context 64",
        "training cross entropy of a character", _shakespeare, seconds=20, needs_data=True,
    ),
]  # fmt: skip
