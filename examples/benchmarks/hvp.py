"""Seconds of one product with the Hessian, beside a gradient, a hand-written double backward pass and curvlinops.

Networks: MLPs of about 1e5 and 1e6 parameters, ResNet-18 on 32×32 images, a small GPT and, on a GPU (or when it is
asked for), one of GPT-2's size, all with cross-entropy in float32. The hand-written product is ``torch.autograd.grad``
over the kept tape of the gradient; "flat" also splits its vector and concatenates the product, as operators do.
curvlinops is measured where it is installed.

    python -m examples.benchmarks.hvp --threads 1 [--repeats 7] [--only "MLP, 1e5"] [--batch 32]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics.autograd.kernels import twice_differentiable
from diagnostics.operators.curvature import GaussNewtonOperator, HessianOperator, TensorOperator
from examples.shared.models import gpt, mlp, resnet18

try:
    import curvlinops
except ImportError:
    curvlinops = None


def token_loss(z: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Problem:
    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    size: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    large: bool = False


PROBLEMS = {
    "MLP, 1e5": Problem(
        lambda: mlp([100, 200, 200, 200, 10]), lambda b: (torch.randn(b, 100), torch.randint(0, 10, (b,))), 64
    ),
    "MLP, 1e6": Problem(
        lambda: mlp([300, 600, 600, 600, 10]), lambda b: (torch.randn(b, 300), torch.randint(0, 10, (b,))), 64
    ),
    "ResNet-18": Problem(
        lambda: resnet18(nn.SiLU, stem="cifar"),
        lambda b: (torch.randn(b, 3, 32, 32), torch.randint(0, 10, (b,))),
        8,
    ),
    "small GPT": Problem(gpt, lambda b: (torch.randint(0, 65, (b, 64)), torch.randint(0, 65, (b, 64))), 8, token_loss),
    "GPT, 1.2e8": Problem(
        lambda: gpt(50257, 1024, 12, 768, 12),
        lambda b: (torch.randint(0, 50257, (b, 256)), torch.randint(0, 50257, (b, 256))),
        4,
        token_loss,
        large=True,
    ),
}


def methods(problem: Problem, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Callable[[], Any]]:
    x, y = batch
    parameters = list(model.parameters())
    with twice_differentiable():
        gradient = torch.autograd.grad(problem.loss(model(x), y), parameters, create_graph=True)
    operators = {
        kind.__name__.removesuffix("Operator"): kind(model, batch, problem.loss)
        for kind in (HessianOperator, GaussNewtonOperator, TensorOperator)
    }
    hessian = operators["Hessian"]
    vector = torch.randn(hessian.shape[0], device=x.device)
    parts = [part.clone() for part in hessian.unflatten(vector).values()]
    sizes, shapes = [p.numel() for p in parameters], [p.shape for p in parameters]

    def by_hand() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradient, parameters, parts, retain_graph=True)

    def by_hand_flat() -> Tensor:
        split = [piece.view(shape) for piece, shape in zip(vector.split(sizes), shapes, strict=True)]
        product = torch.autograd.grad(gradient, parameters, split, retain_graph=True)
        return torch.cat([piece.reshape(-1) for piece in product])

    found: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(problem.loss(model(x), y), parameters),
        "by hand, kept": by_hand,
        "by hand, kept, flat": by_hand_flat,
        "HessianOperator @ v": lambda: hessian @ vector,
        "GaussNewtonOperator @ v": lambda: operators["GaussNewton"] @ vector,
        "TensorOperator @ v": lambda: operators["Tensor"] @ vector,
        "H, GGN and T by products(v)": lambda: operators["Tensor"].products(vector),
    }
    if curvlinops is not None:
        theirs = _curvlinops_operator(problem, model, batch, parameters)
        try:
            theirs @ vector
        except RuntimeError as failure:  # batch-norm in training mode works in place
            print(f"curvlinops cannot: {str(failure).partition('. ')[0]}")
        else:
            found["curvlinops Hessian @ v"] = lambda: theirs @ vector
    error = (hessian @ vector - by_hand_flat()).norm() / by_hand_flat().norm()
    print(f"relative difference to the product by hand {error:.0e}")
    return found


def _curvlinops_operator(
    problem: Problem, model: nn.Module, batch: tuple[Tensor, Tensor], parameters: list[nn.Parameter]
) -> Any:
    x, y = batch
    loss = nn.CrossEntropyLoss()
    if problem.loss is token_loss:  # curvlinops wants the classes second and one target for each row
        model, y = nn.Sequential(model, nn.Flatten(0, 1)), y.flatten()
    return curvlinops.HessianLinearOperator(
        model, loss, parameters, [(x, y)], check_deterministic=False, num_data=len(y), batch_size_fn=lambda _: len(y)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, help="samples; by default 64 for the MLPs and 8 for the others")
    parser.add_argument("--only", choices=PROBLEMS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} threads"
    for name, problem in PROBLEMS.items():
        if options.only != name and (options.only is not None or (problem.large and device.type == "cpu")):
            continue
        torch.manual_seed(0)
        model = problem.make().to(device)
        x, y = problem.batch(options.batch or problem.size)
        batch = x.to(device), y.to(device)
        count = sum(p.numel() for p in model.parameters())
        print(f"\n{name}: {count} parameters, batch {len(x)}, {where}")
        with twice_differentiable():  # the peers as well
            runs = methods(problem, model, batch)
            seconds = _alternating(runs, options.repeats, device)
        print(f"{'':30} {'seconds':>9} {'/ gradient':>11} {'/ by hand':>10} {'/ flat':>7}")
        for method, duration in seconds.items():
            ratios = [duration / seconds[key] for key in ("gradient", "by hand, kept", "by hand, kept, flat")]
            print(f"{method:30} {duration:9.5f} {ratios[0]:11.2f} {ratios[1]:10.2f} {ratios[2]:7.2f}")
        if device.type == "cuda":
            print(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
            torch.cuda.reset_peak_memory_stats(device)
        del model, batch, runs


def _alternating(runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median wall-clock seconds, the methods in turn, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first does not count
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
