"""Powers of factors and directions that one process computes and the others receive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from diagnostics.ranks.collectives import Ranks
from hessopt.averages.division import Work, own_entries, owners_of
from hessopt.spectral.stack_direction import Roots, StackDirection, scales_of, unscaled

Owners = list[list[int | None]]
"""Of each stack those of its entries; None for what all compute."""


def divided(works: Sequence[Sequence[Work]], ranks: Ranks) -> Owners:
    """Owners of the entries of stacks, balanced over all of them: a function of sizes alone."""
    owners: Iterator[int | None] = iter(owners_of([piece for work in works for piece in work], ranks))
    return [list(islice(owners, len(work))) for work in works]


def refresh_shared(directions: Sequence[StackDirection], ranks: Ranks, *, first: bool) -> None:
    """Take the factors as they are now into their powers, each computed by its owner and copied to the others."""
    pairs = [pair for d in directions for pair in zip(d.powers, d.factors, strict=True)]
    tensors: list[Tensor] = []
    senders: list[int] = []
    for (power, factor), owners in zip(pairs, divided([power.work for power, _ in pairs], ranks), strict=True):
        mine = own_entries(owners, ranks.rank)
        if len(mine) == len(owners):
            power.refresh(factor, first=first)
        elif mine:
            part = power.part(mine)
            part.refresh(factor[mine], first=first)
            power.take(part, mine)
        for i, owner in enumerate(owners):
            if owner is not None:
                tensors += [t[i] for t in power.tensors]
                senders += [owner] * len(power.tensors)
    ranks.copy_(tensors, senders)


class SharedDirections:
    """Directions that are computed by owners where that is worth it (:func:`hessopt.averages.division.owners_of`).

    Every step then sends them, as many numbers as matrices have entries; the others every process computes.

    Args:
        directions: Of each stack, with powers that stay as they are.
        ranks: The processes.
    """

    def __init__(self, directions: Sequence[StackDirection], ranks: Ranks) -> None:
        self.ranks, self.owners = ranks, divided([d.work for d in directions], ranks)
        self.mine = [own_entries(owners, ranks.rank) for owners in self.owners]
        self.parts = [
            d if len(mine) == len(owners) else d.part(mine)
            for d, mine, owners in zip(directions, self.mine, self.owners, strict=True)
        ]

    @torch.no_grad()
    def of(self, momenta: Sequence[Tensor], roots: Roots) -> tuple[list[Tensor], list[Tensor]]:
        """D of each stack and the factors that make ``D̂``; bit for bit the same everywhere."""
        found = [torch.empty_like(m) for m in momenta]
        there = [i for i, mine in enumerate(self.mine) if mine]
        whole = [len(mine) == len(m) for mine, m in zip(self.mine, momenta, strict=True)]
        given = [momenta[i] if whole[i] else momenta[i][self.mine[i]] for i in there]
        for i, d in zip(there, unscaled([self.parts[i] for i in there], given, roots), strict=True):
            if whole[i]:
                found[i] = d
            else:
                found[i][self.mine[i]] = d
        sent = [
            (d[i], o)
            for d, owners in zip(found, self.owners, strict=True)
            for i, o in enumerate(owners)
            if o is not None
        ]
        self.ranks.copy_([t for t, _ in sent], [o for _, o in sent])
        return found, scales_of(found)
