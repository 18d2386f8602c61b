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
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import diagnostics
from diagnostics.operators.curvature import CurvatureOperator
from examples.shared.models import mlp

OPERATORS: dict[str, Callable[..., CurvatureOperator]] = {
    "H": diagnostics.HessianOperator,
    "GN": diagnostics.GaussNewtonOperator,
    "T": diagnostics.TensorOperator,
}
THRESHOLD = 1e-3  # below it the axis is linear
SIGMA = 0.12
COLORS = {"H": "tab:blue", "GN": "tab:green", "T": "tab:red"}


def samples(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Centred images ``(N, d)`` and labels."""
    if folder is None:
        images, labels = load_digits(return_X_y=True)
        scaled = images / 16
    else:
        with np.load(folder / "mnist.npz") as archive:
            images, labels = archive["x_train"][:5000], archive["y_train"][:5000]
        scaled = images.reshape(len(images), -1) / 255
    return torch.tensor(scaled - scaled.mean(0), dtype=torch.float64), torch.tensor(labels, dtype=torch.long)


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


def stretched(values: Tensor) -> Tensor:
    """The coordinate that a symlog axis is even in: ±log(1 + |λ| / threshold)."""
    return values.sign() * (values.abs() / THRESHOLD).log1p()


def smoothed(density: diagnostics.SpectralDensity, grid: Tensor) -> Tensor:
    """Eigenvalues per unit of the stretched coordinate, smoothed by a Gaussian in it."""
    # nodes that are zero to rounding are zero, whatever their sign
    nodes = stretched(torch.where(density.nodes.abs() < density.rounding, 0, density.nodes)).flatten()
    weights = density.weights.flatten() / len(density.nodes)
    kernel = (-0.5 * ((grid.unsqueeze(1) - nodes) / SIGMA).square()).exp() / (SIGMA * (2 * torch.pi) ** 0.5)
    counts: Tensor = density.size * (kernel @ weights)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--data", type=Path, help="folder with mnist.npz; by default the 8×8 digits")
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

    limits = stretched(torch.tensor([min(e[0] for e in ends.values()), max(e[1] for e in ends.values())]))
    grid = torch.linspace(limits[0].item() - 1, limits[1].item() + 1, 1500, dtype=torch.float64)
    eigenvalues = grid.sign() * grid.abs().expm1() * THRESHOLD
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    curves = {name: smoothed(density, grid).numpy() for name, density in densities.items()}
    for name, density in densities.items():
        mass = density.negative_mass()
        label = f"{name}:  m⁻ = {mass.item():.3g} ± {mass.standard_error.item():.1g}"
        axes.plot(eigenvalues.numpy(), curves[name], label=label, color=COLORS[name], lw=1.5)
    axes.set_xscale("symlog", linthresh=THRESHOLD)
    axes.set_yscale("log")
    axes.set_ylim(0.3, 3 * max(curve.max() for curve in curves.values()))
    axes.axvline(0, color="black", lw=0.6)
    axes.set_xlabel("eigenvalue λ")
    axes.set_ylabel("eigenvalues per e-fold")
    axes.set_title("Spectral density of the Hessian and its parts: all negative curvature is the tensor part's")
    axes.legend()
    figure.savefig(options.out, dpi=130)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
