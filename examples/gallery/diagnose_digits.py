"""Diagnose a perceptron on handwritten digits, before and after training: exact blocks, verdicts, what changed.

python -m examples.gallery.diagnose_digits [--steps 300] [--out digits.json]
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import diagnostics
from examples.shared.models import mlp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", help="write the comparison as .json or .txt")
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data, dtype=torch.float64) / 16, torch.tensor(digits.target)
    model = mlp([64, 24, 24, 24, 10]).double()
    batch = inputs[:64], targets[:64]

    start = time.perf_counter()
    before = diagnostics.diagnose(model, batch, F.cross_entropy, name="at initialisation")
    print(f"{time.perf_counter() - start:.1f} s\n{before}\n")

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(options.steps):
        rows = torch.randint(len(inputs), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    after = diagnostics.diagnose(model, batch, F.cross_entropy, name="trained")
    comparison = diagnostics.compare([before, after])
    print(comparison)
    if options.out:
        comparison.save(options.out)


if __name__ == "__main__":
    main()
