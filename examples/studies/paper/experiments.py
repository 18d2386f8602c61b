"""The paper's experiments: which networks, what data, which training, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

import diagnostics
from examples.studies.paper.images import Data, generated, standardised_cifar10
from examples.studies.paper.measurement import (
    Batch,
    Rows,
    by_index,
    capture,
    estimated_table,
    exact_table,
    jacobians,
    row,
    squared_second_derivative,
)
from examples.studies.paper.networks import (
    ConvolutionalNetwork,
    Diamond,
    Network,
    ToyAttention,
    ToyPerceptron,
    plain_mlp,
    residual_mlp,
)
from examples.studies.paper.training import Schedule

Variant: TypeAlias = dict[str, Any]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Attributes:
        name: Of its script.
        variants: What is varied, in the names of the columns of the published tables.
        build: Makes the network of a variant.
        measure: What is measured of a network on a batch: ``measure(network, batch, variant, seed)``.
        batch: How many of the first test items are measured on.
        schedule: Training; :attr:`alone` for networks that cannot be trained together with those of other seeds.
        data: ``"cifar10"``, ``"cifar100"`` or ``"toy"``.
        classes: Number of classes, for generated images.
        augmented: Random crops and flips.
        loss: Of outputs and targets.
        load: ``load(folder, seed)`` instead of :attr:`data`; without a folder, data that is generated.
        phases: When to measure.
        quick_seeds: How many seeds are measured without data.
    """

    name: str
    variants: Sequence[Variant]
    build: Callable[[Variant], Network]
    measure: Callable[[Network, Batch, Variant, int], Rows]
    batch: int
    schedule: Schedule = field(default_factory=Schedule)
    alone: bool = False
    data: str = "cifar10"
    classes: int = 10
    augmented: bool = False
    loss: Loss = cross_entropy
    load: Callable[[Path | None, int], Data] | None = None
    phases: frozenset[str] = frozenset(("init", "mid", "final"))
    quick_seeds: int = 3


def _whole(network: Network, batch: Batch, variant: Variant, seed: int) -> Rows:
    graph = capture(network, batch, cross_entropy)
    table, seconds = exact_table(graph)
    return [
        *by_index(table, network.nodes),
        *jacobians(network, batch, cross_entropy),
        row("sigma_pp_sq", squared_second_derivative(network, batch.x)),
        row("seconds", seconds),
    ]


def _estimated(probes: int) -> Callable[[Network, Batch, Variant, int], Rows]:
    def measure(network: Network, batch: Batch, variant: Variant, seed: int) -> Rows:
        table, seconds = estimated_table(capture(network, batch, cross_entropy), probes, seed)
        rows = by_index(table, network.nodes)
        if network.blocks_on_path:
            rows += jacobians(network, batch, cross_entropy)
        return [*rows, row("seconds", seconds)]

    return measure


def _exact_and_estimated(network: Network, batch: Batch, variant: Variant, seed: int) -> Rows:
    graph = capture(network, batch, cross_entropy)
    exact = next(r["value"] for r in by_index(exact_table(graph)[0], network.nodes) if r["quantity"] == "gap_global")
    rows = [row("gap_exact", exact)]
    for probes in (10, 30, 100):
        table, seconds = estimated_table(graph, probes, seed)
        estimate = next(r["value"] for r in by_index(table, network.nodes) if r["quantity"] == "gap_global")
        rows += [row(f"gap_{probes}_probes", estimate), row(f"seconds_{probes}_probes", seconds)]
    return rows


def _far(network: Network, batch: Batch, variant: Variant, seed: int) -> Rows:
    """D, C and R averaged over the pairs on either side of the bottleneck; exact, where the paper estimates."""
    table, seconds = exact_table(capture(network, batch, cross_entropy))
    middle = variant["L"] // 2
    far = [(i, j) for i in range(middle) for j in range(middle + 1, variant["L"])]
    i, j = (torch.tensor(part) for part in zip(*far, strict=True))
    return [
        row("D_far", table.stable_rank[i, j].nanmean()),
        row("C_far", table.coupling[i, j].nanmean()),
        row("R_far", table.resonance[i, j].nanmean()),
        row("seconds", seconds),
    ]


def _branches(network: Network, batch: Batch, variant: Variant, seed: int) -> Rows:
    graph = capture(network, batch, cross_entropy)
    table, seconds = exact_table(graph)
    k = variant["k"]
    at = {name: i for i, name in enumerate(table.nodes)}
    last = (at[f"a.{k - 1}"], at[f"b.{k - 1}"])
    rows = [
        row("frob_tensor", table.tensor_norm[last]),
        row("frob_gn", table.gn_norm[last]),
        row("gap", table.gn_gap[last]),
        row("seconds", seconds),
    ]
    found: dict[tuple[str, int], list[float]] = {}
    for i in range(k):
        for j in range(k):
            found.setdefault(("R_cross_AB", 2 * k - i - j), []).append(
                table.resonance[at[f"a.{i}"], at[f"b.{j}"]].item()
            )
            if i <= j:
                for branch in "ab":
                    pair = at[f"{branch}.{i}"], at[f"{branch}.{j}"]
                    found.setdefault((f"R_within_{branch.upper()}", j - i), []).append(table.resonance[pair].item())
    rows += [row(quantity, sum(values) / len(values), d) for (quantity, d), values in found.items()]
    return [*rows, *jacobians(network, batch, cross_entropy)]


def _attention(network: Network, batch: Batch, variant: Variant, seed: int) -> Rows:
    start = capture(network, batch, mse_loss)
    blocks = diagnostics.hessian_blocks(start, by_source=True)
    table = diagnostics.metrics(blocks)
    v, w = (table.nodes.index(name) for name in network.nodes[:2])
    rows = [
        row("frob_full", table.resonance[v, w]),
        row("frob_gn", table.gn_norm[v, w]),
        row("frob_tensor", table.tensor_norm[v, w]),
        row("gap", table.gn_gap[v, w]),
    ]
    for source, share in blocks.mean().tensor_by_source.items():
        norm = torch.linalg.matrix_norm(share[network.nodes[0], network.nodes[1]])
        if norm > 0:
            rows.append(row(f"tensor_by_{source}", norm))
    return rows


def grid(**choices: Sequence[Any]) -> list[Variant]:
    grid: list[Variant] = [{}]
    for name, values in choices.items():
        grid = [{**variant, name: value} for variant in grid for value in values]
    return grid


def _depth(variant: Variant) -> Network:
    if variant["arch"].startswith("residual"):
        return residual_mlp(variant["L"])
    spectral = variant["arch"].endswith("SN")
    return plain_mlp(variant["L"], spectral=spectral, norm=not spectral)


def _activation(norm: bool) -> Callable[[Variant], Network]:
    return lambda variant: plain_mlp(6, activation=variant["activation"], norm=norm)


SMOOTH = ("softplus", "silu", "gelu")
ACTIVATIONS = ("relu", "leaky_relu", *SMOOTH)
SHORT = Schedule(epochs=20)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment("exp1", grid(L=(8, 10, 12), arch=("plain", "residual")), _depth, _whole, 32),
        Experiment("exp1_deep", grid(L=(16, 32), arch=("plain", "residual")), _depth, _whole, 32),
        Experiment("exp1b", grid(L=(8, 12, 16), arch=("plain_SN", "residual")), _depth, _whole, 32, alone=True),
        Experiment(
            "exp2",
            grid(L=(6, 8), d_u=(4, 8, 16, 32, 64, 128, 256, 512)),
            lambda v: plain_mlp(v["L"], width=512, classes=100, bottleneck=v["d_u"]),
            _far,
            64,
            data="cifar100",
            classes=100,
            quick_seeds=1,
        ),
        Experiment("exp3", grid(activation=ACTIVATIONS), _activation(norm=False), _whole, 16, SHORT),
        Experiment("exp3_norm", grid(activation=ACTIVATIONS), _activation(norm=True), _whole, 16, SHORT),
        Experiment(
            "exp4",
            grid(k=(2, 1, 3), merge=("sum", "cat"), activation=("relu", "silu")),
            lambda v: Diamond(v["k"], v["merge"], v["activation"]),
            _branches,
            32,
        ),
        Experiment(
            "exp5",
            grid(model=("attention", "relu_mlp")),
            lambda v: ToyAttention() if v["model"] == "attention" else ToyPerceptron(),
            _attention,
            64,
            Schedule(epochs=30, lr=1e-3, adam=True),
            data="toy",
            loss=mse_loss,
        ),
        Experiment(
            "exp6",
            grid(activation=("relu", "silu"), arch=("resnet18", "plain_resnet18")),
            lambda v: ConvolutionalNetwork(v["activation"], skips=v["arch"] == "resnet18"),
            _estimated(30),
            32,
            Schedule(epochs=100, lr=0.1, weight_decay=5e-4),
            alone=True,
            augmented=True,
            load=lambda folder, seed: generated() if folder is None else standardised_cifar10(folder),
            quick_seeds=1,
        ),
        Experiment(
            "ablation_probes", grid(activation=SMOOTH), _activation(norm=False), _exact_and_estimated, 16, SHORT
        ),
    )
}
