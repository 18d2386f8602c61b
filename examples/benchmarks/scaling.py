"""Simulation of scale: what a step of a language model sends and computes, by rank, on many processes.

    python -m examples.benchmarks.scaling [--sizes 124M 1.3B 13B] [--processes 8 64 1024] [--tokens 16384]
        [--link 50e9] [--flops 4e14] [--json FILE]

Nothing is trained: the networks are on the meta device. Which layers have factors, how these are stacked, what the
powers, inverses and directions cost and who computes them are answers of the package's own code, of the process groups
asked for; refresh intervals are its defaults. Data-parallel, that is with all parameters in every process. Counted are
steps of the steady state, with updates and refreshes spread over the steps between them:

- received: bytes that the rank with the most receives. A ring all-reduce of N numbers is ``2 (n-1)/n N``; what owners
  compute and copy to all is everything but the rank's own.
- computed: multiplications beyond those of forward and backward passes, of the busiest rank, in the equivalents of
  matrix products that the package divides work by; times 2 they are FLOP. Element-wise work is left out.

A step takes at least the longer of ``received / link`` and ``FLOP / flops``, were the two to overlap wholly: that one
bounds it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diagnostics.ranks.collectives import Ranks
from examples.shared.models.transformer import gpt
from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.blocks import LEAST, Block, plan_blocks
from hessopt.averages.division import Work, owners_of
from hessopt.averages.options import KroneckerAveraging
from hessopt.kronecker.inverse import work_of
from hessopt.spectral.layers import divided
from hessopt.spectral.options import KroneckerCoordinates
from hessopt.spectral.stack_direction import StackDirection

SIZES = {"124M": (12, 768, 12, 1024), "1.3B": (24, 2048, 16, 1024), "13B": (40, 5120, 40, 2048)}
"""Blocks, width, heads and context of GPTs with the vocabulary of GPT-2."""
VOCABULARY = 50257
BYTES = 4
"""Of a number that is sent: float32."""
NEWTON_SCHULZ = 5
"""Iterations of Muon."""


@dataclass(frozen=True)
class Load:
    """Of one step and one rank, beyond the passes.

    Attributes:
        received: Bytes.
        computed: Multiplications.
    """

    received: float = 0.0
    computed: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(self.received + other.received, self.computed + other.computed)

    def every(self, steps: int) -> Load:
        """Once in so many steps."""
        return Load(self.received / steps, self.computed / steps)


def reduced(numbers: float, processes: int) -> Load:
    """An all-reduce."""
    return Load(2 * (processes - 1) / processes * numbers * BYTES)


def shared(pieces: Sequence[Work], processes: int, owners: Sequence[int | None] | None = None) -> Load:
    """Pieces of work that owners do and send to all: the most that a rank computes, and the most that one receives."""
    if owners is None:
        owners = owners_of(pieces, Ranks(size=processes))
    computed, own = [0.0] * processes, [0] * processes
    for piece, owner in zip(pieces, owners, strict=True):
        if owner is not None:
            computed[owner] += piece.cost
            own[owner] += piece.numbers
    by_all = sum(piece.cost for piece, owner in zip(pieces, owners, strict=True) if owner is None)
    return Load((sum(own) - min(own)) * BYTES, by_all + max(computed))


def gradients(model: nn.Module, processes: int) -> Load:
    """What DistributedDataParallel sends: all that AdamW needs."""
    return reduced(sum(p.numel() for p in model.parameters()), processes)


def muon(model: nn.Module, processes: int, tokens: int) -> Load:
    """Muon with directions by owners: Newton-Schulz iterations of the matrices between embedding and output."""
    shapes = [(min(p.shape), max(p.shape)) for p in divided(model, list(model.parameters()), 8192)[0] if p.ndim == 2]
    pieces = [Work(NEWTON_SCHULZ * (2.0 * s * s * n + s**3), s * n) for s, n in shapes]
    owners = Ranks(size=processes).owners([piece.cost for piece in pieces])
    return gradients(model, processes) + shared(pieces, processes, owners)


def spectral(model: nn.Module, processes: int, tokens: int) -> Load:
    """SpectralNewton with its defaults."""
    options = KroneckerCoordinates()
    matrices, _ = divided(model, list(model.parameters()), options.averages.max_size)
    factors = averages_of(plan_blocks(model, matrices, options.averages.max_size, tied=True)[0])
    stacks = [StackDirection(stack, options, outputs=True) for stack in factors.stacks]
    refresh = [piece for d in stacks for power in d.powers for piece in power.work]
    return (
        gradients(model, processes)
        + updates(model, factors, options.averages, processes, tokens)
        + reduced(len(factors.blocks) ** 2, processes).every(options.averages.factor_every)
        + shared(refresh, processes).every(options.averages.inverse_every)
        + shared([piece for d in stacks for piece in d.work], processes)
    )


def kronecker(model: nn.Module, processes: int, tokens: int) -> Load:
    """KroneckerNewton with its defaults: block-diagonal."""
    options = KroneckerAveraging()
    blocks, _ = plan_blocks(model, model.parameters(), options.max_size)
    factors = averages_of(blocks)
    pieces = [
        piece
        for stack in factors.stacks
        for factor, diagonal in zip(stack.factors, reversed(stack.diagonal), strict=True)
        for piece in [work_of(factor, diagonal)] * len(factor)
    ]
    solve = sum(g * o * a * ((1 if d_o else o) + (1 if d_a else a)) for g, o, a, (d_o, d_a) in _shapes(blocks))
    return (
        gradients(model, processes)
        + updates(model, factors, options, processes, tokens)
        + shared(pieces, processes).every(options.inverse_every)
        + Load(computed=solve)
    )


def averages_of(blocks: Sequence[Block]) -> KroneckerAverages:
    """As the package stacks them, in no memory."""
    return KroneckerAverages(blocks, torch.eye(len(blocks)), torch.float32, torch.device("meta"))


def updates(
    model: nn.Module, factors: KroneckerAverages, options: KroneckerAveraging, processes: int, tokens: int
) -> Load:
    """Of the factors: a column that goes back through the network, products of rows, and one all-reduce."""
    passed = float(tokens * sum(p.numel() for p in multiplied(model)))  # a column, to the layers' inputs
    products = 0.0
    for block, (g, o, a, diagonal) in zip(factors.blocks, _shapes(factors.blocks), strict=True):
        rows = tokens
        if options.rows is not None and block.kind == "linear":
            rows = tokens // max(1, min(tokens // (options.rows * max(o, a)), tokens // LEAST))
        products += sum(g * rows * (n if d else n * n) for n, d in zip((o, a), diagonal, strict=True))
    numbers = sum(t.numel() for stack in factors.stacks for t in stack.factors)
    numbers += sum(p.numel() for p in model.parameters()) - sum(p.numel() for b in factors.blocks for p in b.parameters)
    return (reduced(numbers, processes) + Load(computed=passed + products)).every(options.factor_every)


def _shapes(blocks: Sequence[Block]) -> list[tuple[int, int, int, tuple[bool, bool]]]:
    return [(*block.shape, block.diagonal) for block in blocks]


OPTIMIZERS: dict[str, Callable[[nn.Module, int, int], Load]] = {
    "AdamW": lambda model, processes, tokens: gradients(model, processes),
    "Muon": muon,
    "SpectralNewton": spectral,
    "KroneckerNewton": kronecker,
}


@dataclass(frozen=True)
class Row:
    """A line of the table; times in seconds.

    Attributes:
        optimizer: Its name.
        size: Of the network.
        processes: Their number.
        received: Bytes a step that the rank with the most receives.
        computed: FLOP a step beyond the passes, of the busiest rank.
        passes: FLOP of forward and backward.
        sending: ``received / link``.
        computing: ``(computed + passes) / flops``.
    """

    optimizer: str
    size: str
    processes: int
    received: float
    computed: float
    passes: float
    sending: float
    computing: float

    @property
    def bound(self) -> str:
        """What takes longer."""
        return "bandwidth" if self.sending > self.computing else "arithmetic"


def simulate(
    sizes: Sequence[str], processes: Sequence[int], tokens: int, link: float, flops: float, names: Sequence[str]
) -> list[Row]:
    """The rows of the table."""
    rows = []
    for size in sizes:
        depth, width, heads, context = SIZES[size]
        with torch.device("meta"):
            model = gpt(VOCABULARY, context, depth, width, heads)
        passes = 6.0 * tokens * sum(p.numel() for p in multiplied(model))
        for n in processes:
            for name in names:
                load = OPTIMIZERS[name](model, n, tokens)
                sending, computing = load.received / link, (2 * load.computed + passes) / flops
                rows.append(Row(name, size, n, load.received, 2 * load.computed, passes, sending, computing))
    return rows


def multiplied(model: nn.Module) -> list[Tensor]:
    """The matrices; the embedding of tokens is the output's too."""
    return [p for name, p in model.named_parameters() if p.ndim > 1 and "position" not in name]


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = [
        "| network | processes | optimizer | received, GB | computed, TFLOP | of passes | seconds | bound by |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {r.size} | {r.processes:,} | {r.optimizer} | {r.received / 1e9:.3g} | {r.computed / 1e12:.3g} | "
        f"{r.computed / r.passes:.1%} | {max(r.sending, r.computing):.3g} | {r.bound} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--processes", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--tokens", type=int, default=16384, help="of each process, a step")
    parser.add_argument("--link", type=float, default=50e9, help="bytes a second that a process receives")
    parser.add_argument("--flops", type=float, default=4e14, help="of a process, a second")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    rows = simulate(args.sizes, args.processes, args.tokens, args.link, args.flops, args.optimizers)
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(r) | {"bound": r.bound} for r in rows], indent=1))


if __name__ == "__main__":
    main()
