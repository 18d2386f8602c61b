"""SpectralNewton beside tuned AdamW, SGD and Muon. (arXiv 2606.02596, table 3)

A small convolutional network on part of CIFAR-10. Each optimizer is tuned on a seed of its own over learning rates
1, 2, 5 × 10^n: three to begin with, and further while the best is an end of those tried. It is then run with the best
on three seeds. The published form T(σ) = σ/(σ^α + d) and the scale-free one are run with α = 1, 2 and measured online.

    python -m examples.studies.theories spectral_newton [--data DIR] [--epochs 6] [--seeds 3] [--images 3000]

``--data`` is a folder with CIFAR-10; without it, scikit-learn's 8×8 digits are used. With ``--rows FILE.jsonl`` every
run is written there as it ends, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon

import hessopt
from examples.shared.problems.data import Images, cifar10
from examples.studies.theories.rows import Rows

PUBLISHED = (
    "ResNet-18/CIFAR-10 AdamW 92.7 → SpectralNewton 93.8; CIFAR-100 71.5 → 75.0; ResNet-50/CIFAR-100 72.6 → 75.0 "
    "(30 epochs, seed 42 alone)"
)
Step = Callable[[Callable[[], Tensor]], Any]


def network(channels: int, side: int) -> nn.Sequential:
    widths, layers = [channels, 16, 32, 64], []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (side // 8) ** 2, 10))


def spectral(law: hessopt.PowerLaw, ratio: float) -> Callable[[nn.Sequential, float], Step]:
    return lambda model, lr: (
        hessopt.SpectralNewton(model, lr=lr, coordinates=law, adamw=hessopt.AdamWPart(ratio=ratio)).step
    )


def with_backward(make: Callable[[nn.Sequential, float], list[torch.optim.Optimizer]]) -> Any:
    """Optimizers that step after ``backward()``, as one function of a closure."""

    def build(model: nn.Sequential, lr: float) -> Step:
        optimizers = make(model, lr)

        def step(closure: Callable[[], Tensor]) -> None:
            closure().backward()
            for optimizer in optimizers:
                optimizer.step()

        return step

    return build


class FlatMuon(Muon):
    """Muon takes 2-D parameters only: it gets each convolution's weight flattened, in the same memory."""

    def __init__(self, weights: Sequence[Tensor], lr: float) -> None:
        self._pairs = [(w, nn.Parameter(w.detach().flatten(1))) for w in weights]
        super().__init__([flat for _, flat in self._pairs], lr=lr, weight_decay=0.0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for weight, flat in self._pairs:
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step(closure)  # type: ignore[no-untyped-call]


def muon(model: nn.Sequential, lr: float) -> list[torch.optim.Optimizer]:
    weights = [m.weight for m in model if isinstance(m, nn.Conv2d)]
    rest = [p for p in model.parameters() if all(p is not w for w in weights)]
    return [FlatMuon(weights, lr), AdamW(rest, lr=0.15 * lr, weight_decay=0.0)]


RATES = tuple(digit * 10.0**power for power in range(-5, 2) for digit in (1, 2, 5))
TUNING_SEED = 1000


@dataclass(frozen=True)
class Contender:
    build: Any
    rate: float  # the middle of the first three


ONLINE = hessopt.OnlineExponent(every=30)

CONTENDERS = {
    "AdamW": Contender(with_backward(lambda m, lr: [AdamW(m.parameters(), lr=lr)]), 5e-3),
    "SGD, momentum 0.9": Contender(
        with_backward(lambda m, lr: [SGD(m.parameters(), lr=lr, momentum=0.9, nesterov=True)]), 0.05
    ),
    "Muon": Contender(with_backward(muon), 0.02),
    "scale-free, α = 1": Contender(spectral(hessopt.PowerLaw(1.0), 0.15), 0.02),
    "scale-free, α = 2": Contender(spectral(hessopt.PowerLaw(2.0), 0.15), 0.02),
    "scale-free, online α": Contender(spectral(hessopt.PowerLaw("online", online=ONLINE), 0.15), 0.02),
    "published, α = 1": Contender(spectral(hessopt.PowerLaw(1.0, form="published"), 0.03), 0.1),
    "published, α = 2": Contender(spectral(hessopt.PowerLaw(2.0, form="published"), 0.03), 0.1),
    "published, online α": Contender(spectral(hessopt.PowerLaw("online", form="published", online=ONLINE), 0.03), 0.1),
}
"""The published form's learning rates are larger, and AdamW's share of them smaller, so that it gets 1e-3 to 1e-2."""


@dataclass(frozen=True)
class Outcome:
    accuracy: float
    loss: float
    milliseconds: float


def run(contender: Contender, lr: float, data: Images, epochs: int, seed: int) -> Outcome:
    x, y, x_test, y_test = data
    torch.manual_seed(seed)
    model = network(x.shape[1], x.shape[2])
    step = contender.build(model, lr)
    spent = []
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):

            def closure(rows: Tensor = rows) -> Tensor:
                model.zero_grad()
                return F.cross_entropy(model(x[rows]), y[rows])

            begun = time.process_time()
            step(closure)
            spent.append(time.process_time() - begun)
    with torch.no_grad():
        z = model(x_test)
    accuracy = (z.argmax(1) == y_test).double().mean().item()
    loss = F.cross_entropy(z, y_test).item()
    return Outcome(accuracy, loss if math.isfinite(loss) else 1e9, 1e3 * statistics.fmean(spent))


def images(folder: Path | None, count: int) -> Images:
    if folder is not None:
        return cifar10(folder, count, 2000)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels, dtype=torch.long)
    return x[:1297], y[:1297], x[1297:], y[1297:]


def tuned(trial: Callable[[float], float], middle: float) -> float:
    """The learning rate of least loss, inside of those tried."""
    losses: dict[int, float] = {}
    start = min(range(len(RATES)), key=lambda i: abs(RATES[i] - middle))
    wanted: Sequence[int] = (start - 1, start, start + 1)
    while wanted:
        losses |= {i: trial(RATES[i]) for i in wanted}
        best = min(losses, key=lambda i: losses[i])
        wanted = [i for i in (best - 1, best + 1) if i not in losses and 0 <= i < len(RATES)]
    return RATES[best]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.theories spectral_newton",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; by default the 8×8 digits")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rows", type=Path, help="a file.jsonl of finished runs, read and extended")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = images(options.data, options.images)
    rows = Rows(options.rows)
    protocol = f"{'CIFAR-10' if options.data else 'digits'}, {len(data[0])} images, {options.epochs} epochs"

    def outcome(name: str, lr: float, seed: int) -> Outcome:
        def new() -> dict[str, float]:
            return asdict(run(CONTENDERS[name], lr, data, options.epochs, seed))

        return Outcome(**rows.get(new, protocol=protocol, optimizer=name, lr=lr, seed=seed))

    print(f"{protocol}, {options.seeds} seeds, ± standard deviation (ddof 1)")
    print(f"{'':22}{'lr':>7}{'test accuracy':>18}{'test loss':>18}{'ms a step':>11}")
    best: dict[str, list[Outcome]] = {}
    for name, contender in CONTENDERS.items():
        lr = tuned(lambda rate, name=name: outcome(name, rate, TUNING_SEED).loss, contender.rate)  # type: ignore[misc]
        outcomes = best[name] = [outcome(name, lr, seed) for seed in range(options.seeds)]
        columns = []
        for values, form in (([o.accuracy for o in outcomes], ".1%"), ([o.loss for o in outcomes], ".3f")):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            columns.append(f"{statistics.fmean(values):{form}} ± {spread:{form}}")
        cost = statistics.fmean(o.milliseconds for o in outcomes)
        print(f"{name:22}{lr:>7g}{columns[0]:>18}{columns[1]:>18}{cost:>11.1f}", flush=True)

    def loss(name: str) -> float:
        return statistics.fmean(o.loss for o in best[name])

    print(f"published: {PUBLISHED}")
    ours = min((name for name in best if name.startswith("scale-free")), key=loss)
    printed = min((name for name in best if name.startswith("published")), key=loss)
    others = sorted(("AdamW", "SGD, momentum 0.9", "Muon"), key=loss)
    print(f"verdict, by mean test loss: {ours} {loss(ours):.3f}, {printed} {loss(printed):.3f}; "
          + ", ".join(f"{name} {loss(name):.3f}" for name in others))  # fmt: skip
