"""Curvature metrics of all pairs of stages of ResNet-18 by estimation: seconds, memory, products and errors.

ResNet-18 with SiLU in torchvision's layout, evaluation mode, random 32×32 images, 10 classes, cross-entropy; 5 nodes
(stem after pooling, layer1 to layer4), R, C, D and Gap of all 15 pairs with 30 probes. The published code of
arXiv 2604.11639 takes 65.7 s for R, C and D (20 power iterations) and 42.0 s for the Gap on one core at batch 32.

    python -m examples.benchmarks.resnet --threads 1
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import diagnostics
from diagnostics.matrix_free.node_metrics import estimate_metrics
from examples.shared.models import resnet18

NODES = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
PUBLISHED = 65.7 + 42.0


def measure(model: nn.Module, batch: int, probes: int, device: torch.device) -> diagnostics.MetricTable:
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    graph = diagnostics.capture(model, images, lambda z: F.cross_entropy(z, labels), NODES)
    return estimate_metrics(graph, probes)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--probes", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = resnet18(nn.SiLU).to(device).eval()

    measure(model, 2, 3, device)  # imports and kernels
    before, wall, cpu = peak_memory(device), [], []
    for _ in range(options.repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        table = measure(model, options.batch, options.probes, device)
        table.resonance.sum().item()  # waits for a GPU
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    errors = table.standard_errors
    assert errors is not None

    print(table)
    print(f"\nbatch {options.batch}, {options.probes} probes, float32, {device}, {options.threads} threads")
    print(f"seconds          {statistics.median(wall):8.2f}   (processor seconds {statistics.median(cpu):.2f})")
    if options.batch == 32 and options.probes == 30:
        print(f"published code   {PUBLISHED:8.2f}   (65.7 + 42.0 of one core, another machine)")
    print(
        f"peak memory      {peak_memory(device) / 2**20:8.0f}   MiB, of which {before / 2**20:.0f} before the first run"
    )
    print(f"products         {errors.products:8d}   columns, two passes each, and {errors.passes} columns of one pass")
    for name in ("resonance", "coupling", "stable_rank", "gn_gap"):
        relative = getattr(errors, name) / getattr(table, name)
        print(f"standard error   {100 * relative.nanmean().item():8.2f}   % of {name}, mean of all pairs")


if __name__ == "__main__":
    main()
