"""What the paper measures at one checkpoint, as rows ``{"quantity", "distance", "value"}``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import diagnostics
from diagnostics.bounds.lyapunov import lyapunov_norm, lyapunov_qr
from diagnostics.graph.local import local_derivatives
from examples.studies.paper.networks import Chain, Network

Rows: TypeAlias = list[dict[str, Any]]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    x: Tensor
    y: Tensor


def row(quantity: str, value: float | Tensor, distance: int | None = None) -> dict[str, Any]:
    return {"quantity": quantity, "distance": distance, "value": float(value)}


def capture(network: Network, batch: Batch, loss: Loss) -> diagnostics.Graph:
    return diagnostics.capture(network, batch.x, lambda z: loss(z, batch.y), nodes=list(network.nodes))


def exact_table(graph: diagnostics.Graph) -> tuple[diagnostics.MetricTable, float]:
    """Metrics of the batch-mean blocks, and the seconds of processor time they took."""
    start = time.process_time()
    table = diagnostics.metrics(diagnostics.hessian_blocks(graph))
    return table, time.process_time() - start


def estimated_table(graph: diagnostics.Graph, probes: int, seed: int) -> tuple[diagnostics.MetricTable, float]:
    start = time.process_time()
    table = diagnostics.estimate_metrics(graph, probes=probes, generator=torch.Generator().manual_seed(seed))
    return table, time.process_time() - start


def by_index(table: diagnostics.MetricTable, nodes: Sequence[str]) -> Rows:
    """R, C, D averaged over the pairs ``i ≤ j`` at ``j − i``; the gap as a ratio of sums, of all pairs and of these."""
    order = torch.tensor([table.nodes.index(name) for name in nodes])
    pick = {
        name: getattr(table, name)[order][:, order]
        for name in ("resonance", "coupling", "stable_rank", "gn_norm", "tensor_norm", "gn_gap")
    }
    rows = []
    i, j = torch.triu_indices(len(order), len(order))
    for d in range(len(order)):
        here = (i[j - i == d], j[j - i == d])
        rows += [
            row("R", pick["resonance"][here].nanmean(), d),
            row("C", pick["coupling"][here].nanmean(), d),
            row("D", pick["stable_rank"][here].nanmean(), d),
            row("sum_frob_tensor", pick["tensor_norm"][here].sum(), d),
            row("sum_frob_gn", pick["gn_norm"][here].sum(), d),
            row("gap", pick["tensor_norm"][here].sum() / pick["gn_norm"][here].sum(), d),
        ]
    rows.append(row("gap_global", pick["tensor_norm"][i, j].sum() / pick["gn_norm"][i, j].sum()))
    rows.append(row("gap_mean_of_pairs", pick["gn_gap"][i, j].nanmean()))
    return rows


def jacobians(network: Network, batch: Batch, loss: Loss) -> Rows:
    """ρ: spectral norms of the blocks' Jacobians, batch mean, then maximum and mean over blocks; λ₁ by QR and by Eq. 8.

    Blocks whose input is no node (the first of a chain) need the projection's output as a node too.
    """
    if not network.blocks_on_path:
        return []
    chain = isinstance(network, Chain)
    before = ["projection"] if chain else ["stem"]
    graph = diagnostics.capture(network, batch.x, lambda z: loss(z, batch.y), nodes=[*before, *network.nodes])
    local = local_derivatives(graph)
    norms = [
        torch.linalg.matrix_norm(next(iter(local.jacobians[name].values())), 2).mean()
        for name in network.blocks_on_path
    ]
    rows = [row("rho_max", max(norms)), row("rho_mean", sum(norms) / len(norms))]
    if chain:
        path = [*before, *network.nodes]
        rows.append(row("lyapunov1", lyapunov_qr(graph, path).value))
        rows.append(row("lyapunov_eq8", lyapunov_norm(graph, path).value))
    return rows


def squared_second_derivative(network: nn.Module, x: Tensor) -> float:
    """E[σ''²] over the pre-activations (after the layer norm) of the projection and the blocks."""
    seen: list[tuple[nn.Module, Tensor]] = []
    activations = [module for name, module in network.named_modules() if name.endswith("activation")]
    hooks = [m.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0]))) for m in activations]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.cat([_second_derivative(module, z).square().flatten() for module, z in seen]).mean())


def _second_derivative(activation: nn.Module, z: Tensor) -> Tensor:
    z = z.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(activation(z).sum(), z, create_graph=True)
    if not slope.requires_grad:
        return torch.zeros_like(z)
    (second,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
    return torch.zeros_like(z) if second is None else second


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> Rows:
    """Test accuracy and loss (for targets that are classes), else the loss alone."""
    network.eval()
    outputs = torch.cat([network(part) for part in x.split(1000)])
    if y.is_floating_point():
        return [row("test_loss", (outputs - y).square().mean())]
    correct = (outputs.argmax(dim=1) == y).double().mean()
    return [row("test_acc", correct), row("test_loss", cross_entropy(outputs, y))]


def log_linear(values: Iterable[float]) -> tuple[float, float]:
    """Slope and R² of ``log values`` against their index."""
    logs = torch.tensor([math.log(v) for v in values], dtype=torch.float64)
    at = torch.arange(len(logs), dtype=torch.float64)
    x, y = at - at.mean(), logs - logs.mean()
    slope = (x @ y) / (x @ x)
    return slope.item(), (slope.square() * (x @ x) / (y @ y)).item()
