"""Exact Hessian blocks of all pairs of layers: seconds, beside column-by-column double back-propagation.

The network is a GELU MLP (input 3072, 8 blocks of width 64, 10 classes, cross-entropy, 32 samples); every method gives,
for all 36 pairs of blocks, the batch means of H and of its Gauss-Newton part, their norms and the GN-Gap.

    python examples/benchmark_blocks.py --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import mlp
from timing import median_seconds
from torch import Tensor, nn

import diagnostics
from diagnostics.metrics import gn_gap, resonance

Norms = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""By pair: ‖H‖_F and the GN-Gap of the batch means."""


def by_recursion(model: nn.Sequential, x: Tensor, labels: Tensor, nodes: list[str]) -> Norms:
    graph = diagnostics.capture(model, x, lambda z: F.cross_entropy(z, labels), nodes)
    blocks = diagnostics.hessian_blocks(graph).mean()
    pairs = [(i, j) for i in range(len(nodes)) for j in range(i + 1)]
    total, gn, tensor = (
        resonance(torch.stack([part[nodes[i], nodes[j]] for i, j in pairs]))
        for part in (blocks.total, blocks.gn, blocks.tensor)
    )
    return dict(zip(pairs, zip(total, gn_gap(tensor, gn), strict=True), strict=True))


def by_columns(model: nn.Sequential, x: Tensor, labels: Tensor, nodes: list[str], shared: bool) -> Norms:
    """Double back-propagation, one column of a block at a time (all samples at once, as samples do not mix).

    With ``shared``, one backward pass gives that column for all earlier nodes; without, every pair is computed by
    itself.
    """
    activations, z = [], x
    for name, layer in model.named_children():
        z = layer(z)
        if name in nodes:
            activations.append(z)
    slopes = torch.autograd.grad(F.cross_entropy(z, labels), activations, create_graph=True)

    free = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(free, labels), [free], create_graph=True)
    outputs = range(z.shape[1])
    curvature = torch.stack([_column(slope, k, [free])[0] for k in outputs], 1)
    columns = [_column(z, k, activations) for k in outputs]
    jacobians = [torch.stack(rows, 1) for rows in zip(*columns, strict=True)]

    norms: Norms = {}
    for i, slope in enumerate(slopes):
        earlier = activations[: i + 1]
        if shared:
            rows = [_column(slope, k, earlier) for k in range(slope.shape[1])]
            blocks = [torch.stack(row, 1) for row in zip(*rows, strict=True)]
        else:
            blocks = [torch.stack([_column(slope, k, [a])[0] for k in range(slope.shape[1])], 1) for a in earlier]
        for j, block in enumerate(blocks):
            gn = (jacobians[i].mT @ curvature @ jacobians[j]).sum(0)
            total = block.sum(0)
            norms[i, j] = resonance(total), gn_gap(resonance(total - gn), resonance(gn))
    return norms


def _column(value: Tensor, k: int, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value[:, k].sum(), inputs, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="of the slow methods; ours is run ten times as often")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = mlp([3072, *[options.width] * (options.depth + 1), 10])
    nodes = [str(i) for i in range(1, options.depth + 1)]  # the first block only projects the input
    batch = torch.randn(options.batch, 3072), torch.randint(0, 10, (options.batch,))

    methods: dict[str, tuple[Callable[[], Norms], int]] = {
        "columns, pair by pair": (lambda: by_columns(model, *batch, nodes, shared=False), options.repeats),
        "columns, all nodes at once": (lambda: by_columns(model, *batch, nodes, shared=True), options.repeats),
        "block recursion": (lambda: by_recursion(model, *batch, nodes), 10 * options.repeats),
    }
    seconds, results = {}, {}
    for name, (run, repeats) in methods.items():
        seconds[name], results[name] = median_seconds(run, repeats)

    ours, reference = results["block recursion"], results["columns, all nodes at once"]
    worst = max(abs(float(ours[pair][0] / reference[pair][0]) - 1) for pair in reference)
    print(f"depth {options.depth}, width {options.width}, batch {options.batch}, float32, {options.threads} threads")
    print(f"H, H^GN and Gap of all {len(ours)} pairs; largest relative difference of |H|: {worst:.1e}\n")
    print(f"{'method':28} {'seconds':>9} {'ratio':>7}")
    for name, duration in seconds.items():
        print(f"{name:28} {duration:9.4f} {duration / seconds['block recursion']:7.1f}")


if __name__ == "__main__":
    main()
