"""Regression on tables by tanh perceptrons: scikit-learn's diabetes, California housing and UCI sets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from examples.shared.problems import data as datasets
from examples.shared.problems.classification import perceptron
from examples.shared.problems.common import folder_of, seeded, supervised
from examples.shared.task import Problem, Task


def standardised(
    x: NDArray[np.float64], y: NDArray[np.float64], test: NDArray[np.bool_] | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], float]:
    """Training and test rows by mean and deviation of the training rows, and the deviation of their targets.

    Args:
        x: Inputs, ``(N, d)``.
        y: Targets, ``(N,)``.
        test: Marks the test rows, ``(N,)``; None: a fifth of the rows, at random and always the same.
    """
    if test is None:
        test = np.zeros(len(x), bool)
        test[np.random.default_rng(0).permutation(len(x))[: len(x) // 5]] = True
    test = np.asarray(test, bool)
    spread = x[~test].std(axis=0)
    spread[spread == 0] = 1
    inputs = torch.from_numpy((x - x[~test].mean(axis=0)) / spread)
    scale = float(y[~test].std())
    targets = torch.from_numpy((y - y[~test].mean()) / scale).unsqueeze(1)
    train = torch.from_numpy(~test)
    return (inputs[train], targets[train]), (inputs[~train], targets[~train]), scale


def _task(
    x: NDArray[np.float64], y: NDArray[np.float64], test_rows: NDArray[np.bool_] | None, widths: list[int],
    dtype: torch.dtype, seed: int, device: torch.device, batch: int | None = None,
) -> Task:  # fmt: skip
    train, test, scale = standardised(x, y, test_rows)
    with seeded(seed):
        model = perceptron([x.shape[1], *widths, 1], nn.Tanh).to(device, dtype)
    train, test = ((a.to(device, dtype), b.to(device, dtype)) for a, b in (train, test))

    def squared(output: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {"squared": (output - targets).square().mean()}

    task = supervised(
        model, nn.MSELoss(), train, test, seed=seed, batch=batch, figures=squared, measured=len(train[0]),
        least_squares=True,
    )  # fmt: skip
    inner = task.measure

    def measure() -> dict[str, float]:
        figures = inner()
        return figures | {"test_rmse": scale * figures.pop("test_squared") ** 0.5}

    task.measure = measure
    return task


@lru_cache(maxsize=1)
def _diabetes_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = load_diabetes(return_X_y=True)
    return x, y


def _diabetes(seed: int, device: torch.device, data: Path | None) -> Task:
    return _task(*_diabetes_table(), None, [20, 20], torch.float64, seed, device)


def _problem(
    name: str, title: str, seconds: float, dtype: torch.dtype = torch.float64, *, table: str = "",
    batch: int | None = None,
) -> Problem:  # fmt: skip
    def build(seed: int, device: torch.device, data: Path | None) -> Task:
        found = datasets.tabular(folder_of(data, name), table or name)
        return _task(*found, [50, 50], dtype, seed, device, batch)

    rows = "full batch" if batch is None else f"batches of {batch}"
    return Problem(name, "tabular", f"{title}, {rows}", "training mean square", build, seconds, needs_data=True)


PROBLEMS = [
    Problem(
        "diabetes", "tabular", "diabetes, tanh 10-20-20-1, full batch", "training mean square", _diabetes,
        seconds=2, size="small",
    ),
    *(
        _problem(
            name, "California housing, 16,512 rows, tanh 8-50-50-1", 20, torch.float32, table="california_housing",
            batch=batch,
        )
        for name, batch in (("california", None), ("california-256", 256))
    ),
    _problem("concrete", "UCI concrete, tanh 8-50-50-1", 10),
    _problem("energy", "UCI energy, tanh 8-50-50-1", 10),
    _problem("yacht", "UCI yacht, tanh 6-50-50-1", 10),
]  # fmt: skip
