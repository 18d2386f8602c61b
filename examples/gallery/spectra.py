"""Where negative curvature is: spectral densities of the Hessian of a trained network, and of its two parts.

Trains a small perceptron for a moment on scikit-learn's 8×8 digits, or on part of MNIST. Then the eigenvalue densities
of the parameters' Hessian H, its Gauss-Newton part and its tensor part by stochastic Lanczos quadrature, the mass m⁻ of
negative eigenvalues, and the extreme eigenvalues, on 512 training samples.

    python -m examples.gallery.spectra [--steps 400] [--data DIR] [--out docs/images/spectra.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import diagnostics
from diagnostics.operators.curvature import CurvatureOperator
from examples.shared.models import mlp
from examples.shared.plots import draw_densities
from examples.shared.problems.data import mnist_pixels

OPERATORS: dict[str, Callable[..., CurvatureOperator]] = {
    "H": diagnostics.HessianOperator,
    "GN": diagnostics.GaussNewtonOperator,
    "T": diagnostics.TensorOperator,
}
COLORS = {"H": "tab:blue", "GN": "tab:green", "T": "tab:red"}


def samples(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Centred images ``(N, d)`` and labels."""
    if folder is None:
        images, labels = load_digits(return_X_y=True)
        x, y = torch.from_numpy(images) / 16, torch.from_numpy(labels)
    else:
        pixels, y = mnist_pixels(folder, 5000)
        x = pixels.flatten(1).double() / 255
    return x - x.mean(0), y


def train(x: Tensor, y: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = mlp([x.shape[1], 24, 24, 24, 10], nn.Tanh).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--data", type=Path, help="folder of MNIST; by default the 8×8 digits")
    parser.add_argument("--out", type=Path, default=Path("docs/images/spectra.png"))
    options = parser.parse_args()
    x, y = samples(options.data)
    model = train(x, y, options.steps)
    accuracy = (model(x).argmax(1) == y).double().mean().item()
    batch = x[:512], y[:512]
    operators = {name: kind(model, batch, F.cross_entropy) for name, kind in OPERATORS.items()}
    print(f"{operators['H'].shape[0]} parameters, training accuracy {100 * accuracy:.1f} %")

    densities = {name: diagnostics.spectral_density(op, probes=10, steps=120) for name, op in operators.items()}
    print(f"{'':4}{'λ_min':>12}{'λ_max':>12}{'m⁻':>12}{'std. error':>12}")
    ends = {}
    for name, op in operators.items():
        ends[name] = diagnostics.extreme_eigenpairs(op, which="both", max_products=500).values.tolist()
        mass = densities[name].negative_mass()
        numbers = [*ends[name], mass.item(), mass.standard_error.item()]
        print(f"{name:4}" + "".join(f"{n:12.4g}" for n in numbers))

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    limits = min(low for low, _ in ends.values()), max(high for _, high in ends.values())
    draw_densities(axes, densities, limits, COLORS)
    axes.set_title("Spectral density of the Hessian and its parts: all negative curvature is the tensor part's")
    figure.savefig(options.out, dpi=130)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
