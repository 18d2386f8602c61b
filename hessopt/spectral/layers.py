"""The weight matrices of a network: which they are, and what spectral steps know of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diagnostics.ranks.collectives import Ranks
from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.blocks import Block, plan_blocks
from hessopt.spectral.coarse_curvature import CoarseCurvature
from hessopt.spectral.options import CurvatureLengths, KroneckerCoordinates
from hessopt.spectral.shared.directions import SharedDirections, refresh_shared
from hessopt.spectral.stack_direction import Roots, StackDirection, directions_of

MEMORY, START = 0.97, 5
"""Weight of the past in the usual norm of gradients, and steps before which none is too long."""


@dataclass(eq=False)
class SpectralLayers:
    """What is known of the matrices once a batch has shown which are called.

    Attributes:
        factors: Their averages.
        directions: Of each stack of these.
        coarse: The curvature between their steps; None with fixed lengths.
        parameters: Theirs.
        momentum: M, flat.
        gradient: G, flat; views of it are filled from the gradients.
        slots: The views, of each parameter.
        norm: Running mean of ‖G‖, clipped.
        rows: Of each stack the places of its entries' blocks, ``(m,)``.
        lengths: Of each stack the lengths of its entries, ``(m,)``; of fixed ones just one number.
        usual: Their median.
        shared: Of several processes what each computes, since the last refresh.
    """

    factors: KroneckerAverages
    directions: list[StackDirection]
    coarse: CoarseCurvature | None
    parameters: list[Tensor]
    momentum: Tensor
    gradient: Tensor
    slots: list[Tensor]
    norm: Tensor
    rows: list[Tensor]
    lengths: list[Tensor]
    usual: Tensor
    shared: SharedDirections | None = None

    @classmethod
    def blank(
        cls,
        factors: KroneckerAverages,
        distances: Tensor,
        options: KroneckerCoordinates,
        rule: CurvatureLengths | None,
        *,
        outputs: bool,
        fixed: float,
    ) -> SpectralLayers:
        """Before the first step.

        Args:
            factors: The averages.
            distances: Of their blocks, ``(L, L)``.
            options: Coordinates.
            rule: Of the step lengths; None: they are fixed.
            outputs: Whether the factors of outputs count.
            fixed: Length until there is another.
        """
        gradient, matrices = factors.blank()
        views = factors.views(matrices)
        rows: list[list[int]] = [[] for _ in factors.stacks]
        for i, (block, (stack, _)) in enumerate(zip(factors.blocks, factors.place, strict=True)):
            rows[stack] += [i] * block.shape[0]
        coarse = None
        if rule is not None:
            coarse = CoarseCurvature(distances, rule.bandwidth, rule.decay, rule.response, factors.dtype)
        return cls(
            factors=factors,
            directions=[StackDirection(stack, options, outputs) for stack in factors.stacks],
            coarse=coarse,
            parameters=list(views),
            momentum=torch.zeros_like(gradient),
            gradient=gradient,
            slots=list(views.values()),
            norm=gradient.new_zeros(()),
            rows=[torch.tensor(own, device=factors.device) for own in rows],
            lengths=[gradient.new_full((1,), fixed)] * len(rows),
            usual=gradient.new_full((), fixed),
        )

    def refresh(self, ranks: Ranks, *, first: bool) -> None:
        """Take the factors as they are now, into their powers."""
        self.shared = None
        if ranks.size == 1:
            for direction in self.directions:
                direction.refresh(first=first)
        else:
            refresh_shared(self.directions, ranks, first=first)

    def directions_of(self, momenta: Sequence[Tensor], roots: Roots, ranks: Ranks) -> tuple[list[Tensor], list[Tensor]]:
        """:func:`hessopt.spectral.stack_direction.directions_of` all matrices."""
        if ranks.size == 1:
            return directions_of(self.directions, momenta, roots)
        if self.shared is None or self.shared.ranks != ranks:
            self.shared = SharedDirections(self.directions, ranks)
        return self.shared.of(momenta, roots)

    def clip(self, bound: float, steps: int, sound: Tensor) -> None:
        """Scale G down to so many times its usual norm, in place, after so many steps; take its norm into the usual.

        Args:
            bound: c.
            steps: That were taken.
            sound: 1, or 0 where G does not count.
        """
        found = torch.linalg.vector_norm(self.gradient)
        if steps >= START:
            most = (bound * self.norm).clamp_min(torch.finfo(found.dtype).tiny)
            share = (most / found).clamp_max(1.0)
            self.gradient *= share
            found = found * share
        self.norm.lerp_(found, max(1 - MEMORY, 1 / (steps + 1)) * sound)

    def set_lengths(self, share: float) -> None:
        """Take the lengths of the coarse curvature, times a share, for the steps from now on."""
        assert self.coarse is not None
        found = self.coarse.lengths * share
        self.lengths, self.usual = [found[rows] for rows in self.rows], found.median()

    def blocks(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Of each block its part of matrices, ``(g, o, a)``."""
        places = zip(self.factors.blocks, self.factors.place, strict=True)
        return [matrices[stack][start : start + block.shape[0]] for block, (stack, start) in places]

    def filled(self, gradients: dict[Tensor, Tensor]) -> list[Tensor]:
        """The gradients, and for one that is missing the momentum, which then stays as it is."""
        if all(p in gradients for p in self.parameters):
            return [gradients[p] for p in self.parameters]
        return [gradients.get(p, m) for p, m in self.momenta.items()]

    @property
    def momenta(self) -> dict[Tensor, Tensor]:
        """M by parameter, as views."""
        return self.factors.views(self.factors.matrices(self.momentum))

    def rates(self, share: Tensor) -> dict[Tensor, Tensor]:
        """Of each parameter its step length, times a share."""
        found: dict[Tensor, Tensor] = {}
        for block, (stack, start) in zip(self.factors.blocks, self.factors.place, strict=True):
            length = self.lengths[stack]
            found.update(dict.fromkeys(block.parameters, length[min(start, len(length) - 1)] * share))
        return found

    @property
    def saved(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Tensors of a saved state by its entries, with what to call them; factors and momentum are saved elsewhere."""
        powers = [
            (f"the power of a factor of stack {number}", t)
            for number, direction in enumerate(self.directions)
            for power in direction.powers
            for t in power.tensors
        ]
        coarse = [] if self.coarse is None else self.coarse.tensors
        return {
            "powers": powers,
            "coarse": [("the curvature between steps", t) for t in coarse],
            "norm": [("the usual norm of gradients", self.norm)],
        }


def divided(model: nn.Module, trained: Sequence[Tensor], max_size: int) -> tuple[list[Tensor], dict[Tensor, str]]:
    """The parameters of layers that have matrices with factors, and of the others why not."""
    blocks, reasons = plan_blocks(model, trained, max_size, tied=True)
    others = dict(reasons)
    matrices: list[Tensor] = []
    for block in blocks:
        if _is_spectral(block):
            matrices += block.parameters
        else:
            vector = block.kind in ("linear", "convolution")
            others.update(dict.fromkeys(block.parameters, "a single row or column" if vector else block.kind))
    return matrices, {p: others[p] for p in trained if p in others}


def _is_spectral(block: Block) -> bool:
    return block.kind in ("linear", "convolution") and min(block.shape[1:]) > 1
