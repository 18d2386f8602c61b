"""The full Hessian with respect to the parameters of an MLP and a CNN: seconds, beside torch.func in all of its modes.

python -m examples.benchmarks.parametric --threads 1 [--batch 32]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diagnostics
from examples.shared.models import mlp
from examples.shared.timing import median_seconds


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def modes(loss: Callable[[Tensor], Tensor], size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    def products(point: Tensor) -> Tensor:
        def column(v: Tensor) -> Tensor:
            product: Tensor = torch.func.jvp(torch.func.grad(loss), (point,), (v,))[1]
            return product

        columns: Tensor = torch.vmap(column, chunk_size=512)(torch.eye(size))
        return columns

    return {
        "torch.func.hessian (forward over reverse)": torch.func.hessian(loss),
        "jacrev of jacrev": torch.func.jacrev(torch.func.jacrev(loss)),
        "forward over reverse, chunks of 512": products,
        "jacrev of jacrev, chunks of 512": torch.func.jacrev(torch.func.jacrev(loss), chunk_size=512),
    }


def methods(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is compared; the first is ours."""
    labels = torch.randint(0, 10, (len(x),))
    values = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [p.numel() for p in values.values()]

    def flat_loss(point: Tensor) -> Tensor:
        parts = {n: part.view(values[n].shape) for n, part in zip(values, point.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x,)), labels)

    def ours() -> Tensor:
        graph = diagnostics.capture(model, x, lambda z: F.cross_entropy(z, labels))
        return diagnostics.parameter_hessian(graph)

    point = torch.cat([p.reshape(-1) for p in values.values()])
    theirs = {mode: lambda run=run: run(point) for mode, run in modes(flat_loss, len(point)).items()}
    return {"parameter_hessian": ours, **theirs}


def compare(name: str, model: nn.Module, x: Tensor, repeats: int) -> None:
    ours, *others = methods(model, x).items()
    seconds, hessian = median_seconds(ours[1], 3 * repeats)
    with FlopCounterMode(display=False) as counter:
        ours[1]()
    print(f"\n{name}, {len(hessian)} parameters, batch {len(x)}, float32, {torch.get_num_threads()} threads")
    print(f"{ours[0]:44}{seconds:9.3f} s, {counter.get_total_flops() / 1e9:.1f} GFLOP in matrix products")
    for mode, run in others:
        theirs, other = median_seconds(run, repeats)
        error = ((hessian - other).norm() / other.norm()).item()
        print(f"{mode:44}{theirs:9.3f} s {theirs / seconds:6.1f} times ours, relative difference {error:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    compare("MLP", mlp([32, 48, 48, 48, 10]), torch.randn(options.batch, 32), options.repeats)
    compare("CNN", small_cnn(), torch.randn(options.batch, 1, 16, 16), options.repeats)


if __name__ == "__main__":
    main()
