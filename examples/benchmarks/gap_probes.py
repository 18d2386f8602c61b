"""How well the Gauss-Newton gap is estimated by 30 probes: independent ones, common ones, and what the library does.

An MLP at initialisation, a projection of random 32×32 images and 8 blocks of width 64, batch 32, cross-entropy; all 36
pairs of blocks. The gap of a pair is ‖H^T‖ / ‖H^GN‖; "ratio of sums" is Σ‖H^T‖ / Σ‖H^GN‖ over all pairs. Estimators:

    independent   plain Hutchinson estimates of numerator and denominator, from different probes
    common        the same from one set of probes
    default       diagnostics.estimate_metrics as it is: deflation, and exact Gauss-Newton norms as control variates

Errors are relative: means of absolute values over seeds (and pairs), and root mean squares.

    python -m examples.benchmarks.gap_probes [--seeds 20] [--probes 30]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import diagnostics
from examples.shared.models import mlp

ACTIVATIONS = {"GELU": nn.GELU, "SiLU": nn.SiLU, "Softplus": nn.Softplus, "Tanh": nn.Tanh}
ESTIMATORS = ("independent", "common", "default")
BLOCKS, WIDTH, BATCH = 8, 64, 32


def network(activation: type[nn.Module]) -> diagnostics.Graph:
    torch.manual_seed(0)
    model = mlp([3072] + [WIDTH] * (BLOCKS + 1) + [10], activation)
    images = F.interpolate(torch.randn(BATCH, 3, 8, 8), 32, mode="bicubic").flatten(1).clamp(-2, 2) / 2
    labels = torch.randint(0, 10, (BATCH,))
    nodes = [str(block) for block in range(1, BLOCKS + 1)]
    return diagnostics.capture(model, images, lambda z: F.cross_entropy(z, labels), nodes)


def gaps(tensor: diagnostics.MetricTable, gn: diagnostics.MetricTable) -> tuple[Tensor, Tensor]:
    """Of the pairs, and of their sums."""
    v, w = torch.triu_indices(len(tensor.nodes), len(tensor.nodes))
    numerators, denominators = tensor.tensor_norm[v, w], gn.gn_norm[v, w]
    return numerators / denominators, numerators.sum() / denominators.sum()


def errors_of(estimates: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean absolute and root mean square relative error, per cent."""
    relative = estimates / exact - 1
    return 100 * relative.abs().mean().item(), 100 * relative.square().mean().sqrt().item()


def measure(
    activation: type[nn.Module], seeds: int, probes: int
) -> tuple[dict[str, tuple[tuple[float, float], tuple[float, float]]], list[int]]:
    """Errors by estimator, per pair and of the ratio of sums; columns multiplied by the plain and the default one."""
    graph = network(activation)
    exact = diagnostics.metrics(diagnostics.hessian_blocks(graph))
    of_pairs, of_sums = gaps(exact, exact)
    bent = of_pairs > 0
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ESTIMATORS}
    for seed in tqdm(range(seeds), desc=activation.__name__, leave=False, disable=None):
        one, other = plain(graph, probes, seed), plain(graph, probes, 1000 + seed)
        full = diagnostics.estimate_metrics(graph, probes, generator=torch.Generator().manual_seed(seed))
        for name, pair in zip(ESTIMATORS, ((one, other), (one, one), (full, full)), strict=True):
            found[name].append(gaps(*pair))
    errors = {
        name: (
            errors_of(torch.stack([pair[bent] for pair, _ in estimates]), of_pairs[bent]),
            errors_of(torch.stack([total for _, total in estimates]), of_sums),
        )
        for name, estimates in found.items()
    }
    columns = [table.standard_errors.products for table in (one, full) if table.standard_errors is not None]
    return errors, columns


def plain(graph: diagnostics.Graph, probes: int, seed: int) -> diagnostics.MetricTable:
    generator = torch.Generator().manual_seed(seed)
    return diagnostics.estimate_metrics(
        graph, probes, generator=generator, deflate=0, exact_gn=False, spectral_rounds=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--probes", type=int, default=30)
    options = parser.parse_args()
    measured = {name: measure(kind, options.seeds, options.probes) for name, kind in ACTIVATIONS.items()}
    print(f"relative error of the gap in %, {options.probes} probes at each of {BLOCKS} nodes, {options.seeds} seeds")
    for which, title in enumerate(("mean absolute error", "root mean square error")):
        print(f"\n{title:24}{'per pair':^39}{'ratio of sums':^39}{'columns':^18}")
        print(f"{'':24}" + "".join(f"{name:>13}" for name in ESTIMATORS * 2) + f"{'plain':>9}{'default':>9}")
        for name, (errors, columns) in measured.items():
            cells = [errors[method][of][which] for of in (0, 1) for method in ESTIMATORS]
            print(f"{name:24}" + "".join(f"{cell:13.2f}" for cell in cells) + "".join(f"{c:9d}" for c in columns))


if __name__ == "__main__":
    main()
