"""Diagnose large or unusual networks: ResNet-18 and a GPT with tied embeddings by estimates, a network with branches.

python -m examples.gallery.diagnose_models [resnet gpt branches] [--threads 1] [--verdicts]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from examples.shared.models import gpt, resnet18


class Branches(nn.Module):
    """Data-dependent control flow: how often a layer is applied, and which head, depends on the values."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.enter, self.step = nn.Linear(16, width), nn.Linear(width, width)
        self.calm, self.wild = (
            nn.Linear(width, 3),
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        for _ in range(4):
            if h.abs().mean() < 0.1:
                break
            h = torch.tanh(self.step(h))
        z: Tensor = self.calm(h) if h.mean() > 0 else self.wild(h)
        return z


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def resnet_case() -> tuple[nn.Module, Any, Callable[[Tensor, Tensor], Tensor]]:
    return resnet18(nn.SiLU).eval(), (torch.randn(32, 3, 32, 32), torch.randint(10, (32,))), F.cross_entropy


def gpt_case() -> tuple[nn.Module, Any, Callable[[Tensor, Tensor], Tensor]]:
    tokens = torch.randint(65, (8, 65))
    return gpt(tied=True).eval(), (tokens[:, :-1], tokens[:, 1:]), next_token_loss


def branches_case() -> tuple[nn.Module, Any, Callable[[Tensor, Tensor], Tensor]]:
    return Branches(), (torch.randn(32, 16), torch.randint(3, (32,))), F.cross_entropy


CASES = {"resnet": resnet_case, "gpt": gpt_case, "branches": branches_case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--verdicts", action="store_true", help="print verdicts only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.cases:
        torch.manual_seed(0)
        model, batch, loss_fn = CASES[name]()
        start, start_cpu = time.perf_counter(), time.process_time()
        report = diagnostics.diagnose(model, batch, loss_fn, name=name)
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        print(f"\n{name}: {seconds:.1f} s, {cpu:.1f} s of processor time, {options.threads} threads")
        print("\n".join(map(str, report.verdicts)) if options.verdicts else report)


if __name__ == "__main__":
    main()
