"""Starts next to saddle points: deep linear networks, an autoencoder, a factorisation and a symmetric perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from examples.shared.problems.common import measuring, seeded
from examples.shared.saddle_starts import saddle_starts
from examples.shared.task import Problem, Task

NAMES = {
    "saddle-linear-2": "deep linear, depth 2",
    "saddle-linear-4": "deep linear, depth 4",
    "saddle-autoencoder": "deep tanh autoencoder 16-12-8-4-8-12-16",
    "saddle-factorisation": "matrix factorisation 20×15, rank 3",
    "saddle-twins": "MLP 2-8-1 with equal hidden units",
}
"""Ours and those of ``saddle_starts``."""


def _build(title: str) -> Callable[[int, torch.device, Path | None], Task]:
    def build(seed: int, device: torch.device, data: Path | None) -> Task:
        problem = next(p for p in saddle_starts(device) if p.name == title)
        # One of the builders seeds the device's generator as well.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), seeded(seed):
            model = problem.make(seed).to(device)
        model.zero_grad(set_to_none=True)

        def evaluate_loss(batch: None) -> tuple[Tensor, Tensor]:
            output = problem.output(model)
            return problem.loss_of_output(output), output

        def measure() -> dict[str, float]:
            with measuring(model):
                return {"objective": problem.loss(model).item()}

        return Task(model, itertools.repeat(None), evaluate_loss, measure, full_batch=True)

    return build


PROBLEMS = [
    Problem(name, "saddles", f"next to a saddle: {title}", "loss (mean square)", _build(title), seconds=2, size="small")
    for name, title in NAMES.items()
]
