"""Exact Hessian blocks of all pairs of layers: seconds, beside double back-propagation by columns and torch.func.

The network is a GELU MLP (input 3072, 8 blocks of width 64, 10 classes, cross-entropy, 32 samples); every method gives,
for all 36 pairs of blocks, the batch means of H and of its Gauss-Newton part, their norms and the GN-Gap.

    python -m examples.benchmarks.blocks --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.results.pair_formulas import gn_gap, resonance
from examples.shared.models import mlp
from examples.shared.timing import median_seconds

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


def by_torch_func(model: nn.Sequential, x: Tensor, labels: Tensor, nodes: list[str], mode: str) -> Norms:
    """torch.func, vectorised over samples and columns: the Hessian of each sample's loss by injections at the nodes."""
    widths = [model.get_parameter(f"{name}.0.weight").shape[0] for name in nodes]

    def output(injections: Tensor, sample: Tensor) -> Tensor:
        parts = dict(zip(nodes, injections.split(widths), strict=True))
        z = sample
        for name, layer in model.named_children():
            z = layer(z)
            if name in parts:
                z = z + parts[name]
        return z

    def loss(injections: Tensor, sample: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(output(injections, sample), label) / len(x)

    zero = x.new_zeros(sum(widths))
    if mode == "forward over reverse, chunks of 64":  # a column for all samples at once, 64 columns together
        slopes = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

        def column(tangent: Tensor) -> Tensor:
            product: Tensor = torch.func.jvp(lambda e: slopes(e, x, labels).sum(0), (zero,), (tangent,))[1]
            return product

        total = torch.vmap(column, chunk_size=64)(torch.eye(len(zero)))
    else:
        of_sample = torch.func.hessian if mode == "forward over reverse" else _reverse_over_reverse
        total = torch.vmap(of_sample(loss), in_dims=(None, 0, 0))(zero, x, labels).sum(0)
    jacobian = torch.vmap(torch.func.jacrev(output), in_dims=(None, 0))(zero, x)
    with torch.no_grad():
        p = model(x).softmax(-1)
    curvature = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / len(x)
    gn = torch.einsum("bkv,bkw->vw", curvature @ jacobian, jacobian)
    grid = [[b.split(widths, 1) for b in matrix.split(widths)] for matrix in (total, total - gn, gn)]
    pairs = [(i, j) for i in range(len(nodes)) for j in range(i + 1)]
    norms = [resonance(torch.stack([blocks[i][j] for i, j in pairs])) for blocks in grid]
    return dict(zip(pairs, zip(norms[0], gn_gap(norms[1], norms[2]), strict=True), strict=True))


def _reverse_over_reverse(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    nested: Callable[..., Tensor] = torch.func.jacrev(torch.func.jacrev(f))
    return nested


def _column(value: Tensor, k: int, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value[:, k].sum(), inputs, retain_graph=True)


def methods(model: nn.Sequential, x: Tensor, labels: Tensor, nodes: list[str]) -> dict[str, Callable[[], Norms]]:
    """What is compared; the first is ours."""
    func = {
        f"torch.func, {mode}": lambda mode=mode: by_torch_func(model, x, labels, nodes, mode)
        for mode in ("forward over reverse", "reverse over reverse", "forward over reverse, chunks of 64")
    }
    return {
        "block recursion": lambda: by_recursion(model, x, labels, nodes),
        "columns, pair by pair": lambda: by_columns(model, x, labels, nodes, shared=False),
        "columns, all nodes at once": lambda: by_columns(model, x, labels, nodes, shared=True),
        **func,
    }


def problem(depth: int, width: int, batch: int) -> tuple[nn.Sequential, Tensor, Tensor, list[str]]:
    torch.manual_seed(0)
    model = mlp([3072, *[width] * (depth + 1), 10])
    nodes = [str(i) for i in range(1, depth + 1)]  # the first block only projects the input
    return model, torch.randn(batch, 3072), torch.randint(0, 10, (batch,)), nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="of the slow methods; ours is run ten times as often")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = methods(*problem(options.depth, options.width, options.batch))
    ours = next(iter(runs))
    seconds, results = {}, {}
    for name, run in runs.items():
        seconds[name], results[name] = median_seconds(run, 10 * options.repeats if name == ours else options.repeats)

    print(f"depth {options.depth}, width {options.width}, batch {options.batch}, float32, {options.threads} threads")
    print(f"H, H^GN and Gap of all {len(results[ours])} pairs; difference: the largest of |H|, relative, and of Gap\n")
    print(f"{'method':50} {'seconds':>9} {'ratio':>7} {'difference':>11}")
    for name, norms in results.items():
        worst = max(_difference(norms[pair], results[ours][pair]) for pair in norms)
        print(f"{name:50} {seconds[name]:9.4f} {seconds[name] / seconds[ours]:7.1f} {worst:11.1e}")


def _difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    return max(abs(float(one[0] / other[0]) - 1), abs(float(one[1] - other[1])))


if __name__ == "__main__":
    main()
