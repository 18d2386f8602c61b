"""What the paper announces for other architectures (Remark 74, Example 37), measured on small ones with controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss

import diagnostics
from diagnostics.blocks.containers import MeanBlocks
from examples.shared.problems.data import cifar10_pixels
from examples.studies.paper.experiments import Experiment, Variant, grid
from examples.studies.paper.extensions.networks import ConvolutionalChain, SmallGPT, UNet
from examples.studies.paper.images import Data, generated, scaled
from examples.studies.paper.measurement import Batch, Loss, Rows, row
from examples.studies.paper.networks import Network
from examples.studies.paper.training import Schedule

NOISE = 0.3
CONTEXT = 16
ENDS = frozenset(("init", "final"))


def measure_sources(network: Network, batch: Batch, loss: Loss, cuts: Sequence[str]) -> Rows:
    """Norms of all pairs of the network's nodes, and whose nonlinearity makes the tensor part.

    Rows, with ``v`` before ``w``: ``R v w``, ``C v w``, ``gap v w``; means of R and C over the pairs at a distance of
    indices; ``share u`` = ⟨H^T(u), H^T⟩ / ‖H^T‖² and ``ratio u`` = ‖H^T(u)‖ / ‖H^T‖ over all pairs, and
    ``share u | v w`` of single pairs. Sources without curvature have no row.
    """
    graph = diagnostics.capture(network, batch.x, lambda z: loss(z, batch.y), nodes=list(cuts))
    nodes = network.nodes
    pairs = [(v, w) for i, v in enumerate(nodes) for w in nodes[i:]]
    blocks = diagnostics.hessian_blocks(graph, pairs, by_source=True, memory_limit=12 * 2**30)
    gn, tensor = blocks.gn.mean(), blocks.tensor.mean()
    total = {pair: torch.linalg.matrix_norm(gn[pair] + tensor[pair]).item() for pair in pairs}
    parts = {pair: (_norm(tensor, pair), _norm(gn, pair)) for pair in pairs}
    rows: Rows = []
    by_distance: dict[int, list[tuple[float, float]]] = {}
    for (v, w), norm in total.items():
        coupling = norm / (total[v, v] * total[w, w]) ** 0.5
        by_distance.setdefault(nodes.index(w) - nodes.index(v), []).append((norm, coupling))
        t, g = parts[v, w]
        rows += [row(f"R {v} {w}", norm), row(f"C {v} {w}", coupling), row(f"gap {v} {w}", t / (g + 1e-12))]
    for d, found in by_distance.items():
        r, c = zip(*found, strict=True)
        rows += [row("R", sum(r) / len(r), d), row("C", sum(c) / len(c), d)]
    rows.append(row("gap_global", sum(t for t, _ in parts.values()) / sum(g for _, g in parts.values())))
    return rows + _shares(blocks, tensor, pairs)


def _norm(part: MeanBlocks, pair: tuple[str, str]) -> float:
    return float(torch.linalg.matrix_norm(part[pair]))


def _shares(blocks: diagnostics.HessianBlocks, tensor: MeanBlocks, pairs: Sequence[tuple[str, str]]) -> Rows:
    count = {pair: 1 if pair[0] == pair[1] else 2 for pair in pairs}  # the assembled matrix has both (v, w) and (w, v)
    whole = sum(n * _norm(tensor, pair) ** 2 for pair, n in count.items())
    rows: Rows = []
    for source, share in blocks.tensor_by_source.items():
        own = share.mean()  # one source at a time: there are as many as nodes
        squares = sum(n * _norm(own, pair) ** 2 for pair, n in count.items())
        if not squares:
            continue
        products = {pair: (own[pair] * tensor[pair]).sum().item() for pair in pairs}
        rows.append(row(f"share {source}", sum(n * products[pair] for pair, n in count.items()) / whole))
        rows.append(row(f"ratio {source}", (squares / whole) ** 0.5))
        for (v, w), product in products.items():
            if product:
                rows.append(row(f"share {source} | {v} {w}", product / _norm(tensor, (v, w)) ** 2))
    return rows


def small_images(folder: Path | None, seed: int) -> Data:
    """CIFAR-10 at 16×16 and its labels."""
    if folder is None:
        data = generated()
        return Data(avg_pool2d(data.x, 2), data.y, avg_pool2d(data.x_test, 2), data.y_test, data.origin)
    x, y, x_test, y_test = cifar10_pixels(folder)
    return Data(avg_pool2d(scaled(x), 2), y, avg_pool2d(scaled(x_test), 2), y_test, "CIFAR-10 at 16×16")


def noisy_images(folder: Path | None, seed: int) -> Data:
    """CIFAR-10 at 16×16 with normal noise of deviation 0.3, and without."""
    clean = small_images(folder, seed)
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        return x + NOISE * torch.randn(x.shape, generator=generator)

    return Data(noisy(clean.x), clean.x, noisy(clean.x_test), clean.x_test, f"{clean.origin} with noise")


def characters(folder: Path | None, seed: int) -> Data:
    """Shakespeare, in pieces of 16 characters and the same one later; the last tenth is the test set."""
    if folder is None:
        tokens, origin = torch.randint(65, (40_000,), generator=torch.Generator().manual_seed(0)), "generated images"
    else:
        text = np.frombuffer((folder / "tinyshakespeare.txt").read_bytes(), dtype=np.uint8)
        tokens, origin = torch.from_numpy(np.unique(text, return_inverse=True)[1]).long(), "tinyshakespeare"
    pieces = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    train = len(pieces) * 9 // 10
    x, y = pieces[:, :-1], pieces[:, 1:]
    return Data(x[:train], y[:train], x[train:], y[train:], origin)


def _of_all_nodes(loss: Loss) -> Callable[[Network, Batch, Variant, int], Rows]:
    return lambda network, batch, variant, seed: measure_sources(network, batch, loss, network.nodes)


def _of_a_transformer(network: Network, batch: Batch, variant: Variant, seed: int) -> Rows:
    assert isinstance(network, SmallGPT)
    return measure_sources(network, batch, cross_entropy, network.cuts)


ARCHITECTURES: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "densenet",
            grid(wiring=("plain", "residual", "dense")),
            lambda v: ConvolutionalChain(v["wiring"]),
            _of_all_nodes(cross_entropy),
            8,
            Schedule(epochs=2, lr=3e-3, weight_decay=0.0, adam=True),
            alone=True,
            load=small_images,
            phases=ENDS,
            quick_seeds=1,
        ),
        Experiment(
            "unet",
            grid(skips=(True, False)),
            lambda v: UNet(v["skips"]),
            _of_all_nodes(mse_loss),
            8,
            Schedule(epochs=1, lr=3e-3, weight_decay=0.0, adam=True),
            alone=True,
            loss=mse_loss,
            load=noisy_images,
            phases=ENDS,
            quick_seeds=1,
        ),
        Experiment(
            "gpt",
            grid(model=("gpt",)),
            lambda v: SmallGPT(),
            _of_a_transformer,
            8,
            Schedule(epochs=5, lr=3e-3, weight_decay=0.0, adam=True),
            alone=True,
            load=characters,
            phases=ENDS,
            quick_seeds=1,
        ),
    )
}
