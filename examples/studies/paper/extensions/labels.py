"""How much of the gap at initialisation is the labels of the few measured samples (a control the paper lacks)."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, one_hot

from examples.studies.paper.experiments import SMOOTH, Experiment, Variant, grid
from examples.studies.paper.measurement import Batch, Rows, by_index, capture, exact_table, row
from examples.studies.paper.networks import Network, plain_mlp
from examples.studies.paper.training import Schedule

DRAWN = 10
"""Random labellings of the paper's batch, of more and more classes."""


def _gap(network: Network, batch: Batch) -> tuple[float, float]:
    """The ratio of sums, and ‖mean of the error signals at the output‖."""
    table, _ = exact_table(capture(network, batch, cross_entropy))
    gap = next(r["value"] for r in by_index(table, network.nodes) if r["quantity"] == "gap_global")
    with torch.no_grad():
        probabilities = network(batch.x).softmax(dim=-1)
    return gap, (probabilities - one_hot(batch.y, probabilities.shape[-1])).mean(dim=0).norm().item()


def _labellings(network: Network, batch: Batch, variant: Variant, seed: int) -> Rows:
    """Rows of the paper's batch, the first 16 test images, with other labels; the images stay."""
    count = len(batch.y)
    given = {
        "published": batch.y,
        "balanced": torch.arange(count) % 10,
        "one class": torch.zeros_like(batch.y),
    }
    rows: Rows = []
    for name, y in given.items():
        gap, error = _gap(network, Batch(batch.x, y))
        rows += [row(f"gap {name}", gap), row(f"error {name}", error)]
    generator = torch.Generator().manual_seed(0)
    for i in range(DRAWN):
        gap, error = _gap(network, Batch(batch.x, torch.randint(i + 1, (count,), generator=generator)))
        rows += [row("gap drawn", gap, i), row("error drawn", error, i)]
    return rows


LABELS = Experiment(
    "labels",
    grid(activation=SMOOTH),
    lambda v: plain_mlp(6, activation=v["activation"], norm=False),
    _labellings,
    16,
    Schedule(epochs=0),
    phases=frozenset(("init",)),
)
