"""A training loop of one's own, watched: sharpness against 2/lr, coupling, the Gauss-Newton gap, and when they change.

Trains a small network on handwritten digits with a learning rate that is raised on the way. Prints what was measured
and what was flagged; writes the same to a JSONL file.

    python -m examples.gallery.monitor_training [--steps 400] [--out curvature.jsonl]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import diagnostics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--out", default="curvature.jsonl")
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 32), nn.GELU()), nn.Sequential(nn.Linear(32, 32), nn.GELU()), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    monitor = diagnostics.Monitor(model, cross_entropy, every=options.every, probes=5, writers=[options.out])
    detach = monitor.attach(optimizer, (x[:128], y[:128]))  # measured after optimizer.step(), always on this batch
    batches = torch.randint(len(x), (options.steps, 64))
    for step, rows in enumerate(batches):
        if step == options.steps // 2:
            optimizer.param_groups[0]["lr"] = 1.5
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    detach()

    names = ("sharpness", "sharpness_to_limit", "coupling", "gn_gap")
    print(f"{'step':>6}" + "".join(f"{name:>20}" for name in names) + "  flagged")
    for found in monitor.history:
        shown = "".join(f"{found.values.get(name, float('nan')):20.3g}" for name in names)
        print(f"{found.step:6}{shown}  {', '.join(str(change) for change in found.changes)}")


if __name__ == "__main__":
    main()
