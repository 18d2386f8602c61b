"""Directions of spectral steps in the coordinates of the curvature, of matrices of equal shape together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

from hessopt.averages.averages import Stack
from hessopt.averages.division import Work
from hessopt.spectral.factor_powers import RANK, FactorPowers
from hessopt.spectral.gram_polar import inverse_roots
from hessopt.spectral.options import KroneckerCoordinates

SIZE = 0.2
"""Root mean square of the entries of a direction: about that of an AdamW step (Liu et al., 2025)."""


class StackDirection:
    r"""``D̂`` of matrices M, ``(m, o, a)``, with damped factors A of the inputs and B of the output columns.

    .. math::
       Z = B^{-p} M A^{-p}, \quad O = (Z Z^\top)^{-1/2} Z, \quad D = B^{-p} O A^{-p}, \quad
       \hat D = 0.2 \sqrt{oa} \, D / \lVert D \rVert_F

    One product with a matrix of the larger side is all that is needed of it. For ``o ≤ a``, with ``N = M A^{-2p}``::

        Z Zᵀ = B^{-p} N Mᵀ B^{-p},   D = B^{-p} (Z Zᵀ)^{-1/2} B^{-p} N

    and likewise from the other side; square matrices take ``B^{-p}`` into both factors of the Gram matrix, which is two
    products less. Source: docs/spectral.md.

    Args:
        stack: What the factors are averaged in.
        options: p and the damping.
        outputs: Whether B counts; else it is the identity.
    """

    def __init__(self, stack: Stack, options: KroneckerCoordinates, outputs: bool) -> None:
        _, o, a = stack.shape
        self.stack, self.wide = stack, o <= a
        self.square = o == a and outputs
        small, large = options.exponent, 2 * options.exponent
        left, right = (small, large) if self.wide else (large, small)
        self.right = FactorPowers(stack.inputs, right, options.damping)
        self.left = FactorPowers(stack.outputs, left, options.damping) if outputs else None

    @property
    def powers(self) -> list[FactorPowers]:
        """Of the factors that count."""
        return [self.right] if self.left is None else [self.right, self.left]

    @property
    def factors(self) -> list[Tensor]:
        """Of :attr:`powers`."""
        return [self.stack.inputs] if self.left is None else [self.stack.inputs, self.stack.outputs]

    def refresh(self, *, first: bool) -> None:
        """Take the factors as they are now."""
        for power, factor in zip(self.powers, self.factors, strict=True):
            power.refresh(factor, first=first)

    @property
    def work(self) -> list[Work]:
        """What the direction of each matrix costs, its polar factor by :func:`inverse_roots` included."""
        count, o, a = self.stack.shape
        small, large = min(o, a), max(o, a)
        widths = [1.0 if p.diagonal else float(p.shape[1]) if p.full else 2.0 * RANK for p in self.powers]
        inside, outside = (widths[-1], widths[0]) if self.wide else (widths[0], widths[-1])
        products = small * large * (2.0 * small + outside) + small**2 * (14.0 * small + 4.0 * inside)
        return [Work(products, o * a)] * count

    def part(self, entries: Sequence[int]) -> StackDirection:
        """That of some of the matrices, with powers as they are now."""
        found = copy(self)
        found.right = self.right.part(entries)
        found.left = None if self.left is None else self.left.part(entries)
        return found

    def gram(self, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """The Gram matrix of Z from its smaller side, and what the larger side is needed for, of M, ``(m, o, a)``."""
        if not self.wide:
            scaled = momentum if self.left is None else self.left.left(momentum)
            return self.right.both(momentum.mT @ scaled), scaled
        if self.square:
            assert self.left is not None
            momentum = self.left.left(momentum)
        scaled = self.right.right(momentum)
        gram = scaled @ momentum.mT
        return gram if self.left is None or self.square else self.left.both(gram), scaled

    def direction(self, root: Tensor, scaled: Tensor) -> Tensor:
        """D, from the inverse square root of the Gram matrix."""
        if not self.wide:
            return scaled @ self.right.both(root)
        if self.left is None:
            return root @ scaled
        return self.left.left(root @ scaled) if self.square else self.left.both(root) @ scaled


Roots = Callable[[Sequence[Tensor]], list[Tensor]]
"""Of Gram matrices ``Z Zᵀ`` from the smaller side, ``(m, n, n)``, what Z is multiplied with from there."""


def directions_of(
    stacks: Sequence[StackDirection], momenta: Sequence[Tensor], roots: Roots = inverse_roots
) -> tuple[list[Tensor], list[Tensor]]:
    """D of each stack, ``(m, o, a)``, and the factors that make it ``D̂``, ``(m,)``; zero for a zero matrix."""
    found = unscaled(stacks, momenta, roots)
    return found, scales_of(found)


def unscaled(stacks: Sequence[StackDirection], momenta: Sequence[Tensor], roots: Roots) -> list[Tensor]:
    """D of each stack."""
    made = [stack.gram(m) for stack, m in zip(stacks, momenta, strict=True)]
    taken = roots([gram for gram, _ in made])
    return [s.direction(root, scaled) for s, root, (_, scaled) in zip(stacks, taken, made, strict=True)]


def scales_of(found: Sequence[Tensor]) -> list[Tensor]:
    """The factors that make ``D̂`` of D, of each stack."""
    norms = [torch.linalg.vector_norm(d, dim=(1, 2)).clamp_min(torch.finfo(d.dtype).tiny) for d in found]
    return [SIZE * (d.shape[1] * d.shape[2]) ** 0.5 / norm for d, norm in zip(found, norms, strict=True)]
