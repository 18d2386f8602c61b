"""Running averages of Kronecker factors, stacked over blocks of equal shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from hessopt.averages.blocks import Block, Rows

Matrices = list[Tensor]
"""A step: for each :class:`Stack` a tensor ``(m, o, a)``."""

T = TypeVar("T")


@dataclass(eq=False)
class Stack:
    """Blocks of equal shape, one entry a group.

    Attributes:
        shape: ``(m, o, a)``.
        diagonal: Whether G and A are diagonal.
        inputs: A, ``(m, a, a)``, or ``(m, a)`` if diagonal.
        outputs: G, ``(m, o, o)``, or ``(m, o)`` if diagonal.
    """

    shape: tuple[int, int, int]
    diagonal: tuple[bool, bool]
    inputs: Tensor
    outputs: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and G."""
        return self.inputs, self.outputs


@dataclass(eq=False)
class Pairs:
    """Cross factors of pairs (v, w), v before w, with equal shapes.

    Attributes:
        stacks: Numbers of the stacks of v and w.
        left: Entries of v in its stack, ``(p,)``.
        right: Entries of w.
        blocks: Numbers of the blocks, ``p`` pairs.
        taper: t(v, w), ``(p, 1, 1)``.
        inputs: A_vw, ``(p, a_v, a_w)``.
        outputs: G_vw, ``(p, o_v, o_w)``.
    """

    stacks: tuple[int, int]
    left: list[int]
    right: list[int]
    blocks: list[tuple[int, int]]
    taper: Tensor
    inputs: Tensor
    outputs: Tensor


@dataclass(eq=False)
class Moments:
    """What one batch adds to the averages.

    Attributes:
        tensors: In the order of :attr:`KroneckerAverages.tensors`.
        called: Of each stack the share of the samples that its entries' blocks were called with, ``(m,)``, or just 1.
        excluded: Blocks without cross factors because their rows are not those of the samples.
        samples: B.
    """

    tensors: list[Tensor]
    called: list[float | Tensor]
    excluded: list[int]
    samples: int

    @property
    def totals(self) -> list[Tensor]:
        """The sums of all, which are finite only if all are."""
        return [t.sum() for t in self.tensors]


class KroneckerAverages:
    """The averages ``A_v, G_v`` of all blocks and ``A_vw, G_vw`` of the pairs whose taper does not vanish.

    All are averaged with the same weights, so the stacked A is an average of Gram matrices, and so is G: the curvature
    ``M[v, w] = A_vw ⊗ G_vw`` is a Khatri-Rao product of two positive semidefinite matrices. That stays true where
    cross factors are not gathered (they then decay towards zero, as if the missing terms were zero), where two blocks
    have different numbers T of positions (pairs then take the mean of inputs and the sum of cotangents over √T, whose
    Gram matrix is below that of the positions), and under the taper.

    Memory, in numbers: ``Σ_v g (a² + o²)`` (a or o where diagonal) and ``Σ_(v,w) (a_v a_w + o_v o_w)`` over pairs.

    Args:
        blocks: The blocks.
        taper: t, ``(n, n)``, from :func:`hessopt.kronecker.taper.clique_taper`.
        dtype: Of the factors.
        device: Of the factors.

    Attributes:
        updates: Batches that were given to :meth:`average`.
        skipped: How many of these were not taken, on the device.
    """

    def __init__(self, blocks: Sequence[Block], taper: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks = list(blocks)
        self.dtype, self.device = dtype, device
        self.place: list[tuple[int, int]] = []
        sizes: dict[tuple[int, int, tuple[bool, bool]], int] = {}
        for block in blocks:
            key = (block.shape[1], block.shape[2], block.diagonal)
            start = sizes.setdefault(key, 0)
            self.place.append((list(sizes).index(key), start))
            sizes[key] += block.shape[0]
        self.stacks = [
            Stack((m, o, a), diagonal, self._zeros(m, a, diagonal[1]), self._zeros(m, o, diagonal[0]))
            for (o, a, diagonal), m in sizes.items()
        ]
        self.pairs = self._plan(taper)
        self._swapped = [self._embeddings(number) for number in range(len(self.stacks))]
        self.updates = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def _zeros(self, count: int, size: int, diagonal: bool) -> Tensor:
        shape = (count, size) if diagonal else (count, size, size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _embeddings(self, number: int) -> Tensor | None:
        """Of the entries of a stack whether they are of embeddings, whose factors have swapped roles, if one is."""
        own = [block for block, (stack, _) in zip(self.blocks, self.place, strict=True) if stack == number]
        kinds = [block.kind == "embedding" for block in own for _ in range(block.shape[0])]
        return torch.tensor(kinds, device=self.device) if any(kinds) else None

    def _plan(self, taper: Tensor) -> list[Pairs]:
        members: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for v, w in torch.triu(taper, 1).nonzero().tolist():
            if self.blocks[v].coupled and self.blocks[w].coupled:
                members.setdefault((self.place[v][0], self.place[w][0]), []).append((v, w))
        plans = []
        for (c, d), pairs in members.items():
            (_, o_v, a_v), (_, o_w, a_w) = self.stacks[c].shape, self.stacks[d].shape
            weights = [[[float(taper[v, w])]] for v, w in pairs]
            plans.append(
                Pairs(
                    (c, d),
                    [self.place[v][1] for v, _ in pairs],
                    [self.place[w][1] for _, w in pairs],
                    pairs,
                    torch.tensor(weights, dtype=self.dtype, device=self.device),
                    torch.zeros(len(pairs), a_v, a_w, dtype=self.dtype, device=self.device),
                    torch.zeros(len(pairs), o_v, o_w, dtype=self.dtype, device=self.device),
                )
            )
        return plans

    @property
    def tensors(self) -> list[Tensor]:
        """All averages, in a fixed order."""
        parts = [t for stack in self.stacks for t in stack.factors]
        return parts + [t for pairs in self.pairs for t in (pairs.inputs, pairs.outputs)]

    def split(self, parts: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
        """What is in the order of :attr:`tensors`: that of single blocks, and that of pairs."""
        count = 2 * len(self.stacks)
        return parts[:count], parts[count:]

    def named(self, what: str, tensors: Sequence[Tensor] | None = None) -> list[tuple[str, Tensor]]:
        """Tensors in the order of :attr:`tensors`, by default these, with what to call them in messages."""
        names: list[str] = []
        for number in range(len(self.stacks)):
            blocks = [repr(b.name) for b, (n, _) in zip(self.blocks, self.place, strict=True) if n == number]
            names += [f"the {what} {side} of {', '.join(blocks[:3])}" for side in ("A", "G")]
        for pairs in self.pairs:
            between = [f"{self.blocks[v].name!r} and {self.blocks[w].name!r}" for v, w in pairs.blocks[:2]]
            names += [f"the {what} {side} between {', '.join(between)}" for side in ("A", "G")]
        return list(zip(names, self.tensors if tensors is None else tensors, strict=True))

    def adopt(self, other: KroneckerAverages) -> None:
        """Copy the averages of the same blocks with another band, where this one has them."""
        for stack, theirs in zip(self.stacks, other.stacks, strict=True):
            stack.inputs.copy_(theirs.inputs)
            stack.outputs.copy_(theirs.outputs)
        place = {pair: (p, i) for p in other.pairs for i, pair in enumerate(p.blocks)}
        for pairs in self.pairs:
            for i, pair in enumerate(pairs.blocks):
                source, j = place[pair]
                pairs.inputs[i].copy_(source.inputs[j])
                pairs.outputs[i].copy_(source.outputs[j])
        self.updates = other.updates
        self.skipped.copy_(other.skipped)

    def blank(self) -> tuple[Tensor, Matrices]:
        """A zero vector, and its views as matrices."""
        sizes = [prod(stack.shape) for stack in self.stacks]
        flat = torch.zeros(sum(sizes), dtype=self.dtype, device=self.device)
        return flat, self.matrices(flat)

    def matrices(self, flat: Tensor) -> Matrices:
        """Views of a vector of :meth:`blank`'s size as matrices."""
        parts = flat.split([prod(stack.shape) for stack in self.stacks])
        return [part.view(stack.shape) for part, stack in zip(parts, self.stacks, strict=True)]

    def views(self, matrices: Matrices) -> dict[Tensor, Tensor]:
        """For every parameter its view of the matrices."""
        found: dict[Tensor, Tensor] = {}
        for block, (stack, start) in zip(self.blocks, self.place, strict=True):
            part = matrices[stack][start : start + block.shape[0]]
            found.update(zip(block.parameters, block.views(part), strict=True))
        return found

    def moments(self, rows: Sequence[Rows | None], samples: int) -> Moments:
        """The same matrices of the rows of one batch alone.

        ``A = Σ x xᵀ / (number of rows)``, ``G = Σ ĵ ĵᵀ``: the mean over samples of the curvature is in ĵ's scale.

        Args:
            rows: Of each block; None for one that was not called.
            samples: B.
        """
        found = Moments([torch.zeros_like(t) for t in self.tensors], [1.0] * len(self.stacks), [], samples)
        for number in range(len(self.stacks)):
            own = [i for i, place in enumerate(self.place) if place[0] == number]
            if any(rows[i] is None for i in own):
                called = [float(rows[i] is not None) for i in own for _ in range(self.blocks[i].shape[0])]
                found.called[number] = torch.tensor(called, dtype=self.dtype, device=self.device)
            inputs, outputs = found.tensors[2 * number : 2 * number + 2]
            for i in own:
                row, start = rows[i], self.place[i][1]
                part = slice(start, start + self.blocks[i].shape[0])
                if row is not None:
                    _moments(self.blocks[i], row, inputs[part], outputs[part])
        found.excluded = [v for v, row in enumerate(rows) if row is None or _positions(row, samples) is None]
        if self.pairs:
            self._pair_moments(rows, samples, found.tensors[2 * len(self.stacks) :])
        return found

    def _pair_moments(self, rows: Sequence[Rows | None], samples: int, found: Sequence[Tensor]) -> None:
        whole = {v: x for v, row in enumerate(rows) if row is not None and (x := _positions(row, samples)) is not None}
        for pairs, inputs, outputs in zip(self.pairs, found[::2], found[1::2], strict=True):
            for i, (v, w) in enumerate(pairs.blocks):
                if v not in whole or w not in whole:
                    continue
                x, y = whole[v], whole[w]
                if x.inputs.shape[2] != y.inputs.shape[2]:
                    x, y = _means(x), _means(y)
                left, right = x.inputs.flatten(0, 2), y.inputs.flatten(0, 2)
                inputs[i].addmm_(left.mT, right, beta=0, alpha=1 / len(left))
                outputs[i].addmm_(x.cotangents.flatten(0, 3).mT, y.cotangents.flatten(0, 3), beta=0)

    def joined(self, parts: Sequence[Moments], shares: Sequence[float | Tensor]) -> Moments:
        """Those of several batches as those of one with the samples of all.

        A is the mean over the samples that reach the block, G is a sum. (The roles of an embedding's are swapped.)

        Args:
            parts: Of each batch.
            shares: Of each batch the factor of its curvature.
        """
        blank = torch.zeros((), dtype=self.dtype, device=self.device)
        scaled = [self.scaled(part, blank + share) for part, share in zip(parts, shares, strict=True)]
        sums = [sum(own[1:], own[0]) for own in zip(*scaled, strict=True)]
        total = sum(part.samples for part in parts)
        excluded = sorted({v for part in parts for v in part.excluded})
        return self.divided(sums, blank + total, blank + 1.0, excluded, total)

    def scaled(self, moments: Moments, share: Tensor) -> list[Tensor]:
        """Those of a batch times what they count, and the latter for A of single blocks: what is added up over batches.

        A counts with the samples that reach the block, G with the share.

        Args:
            moments: Of the batch.
            share: Factor of its curvature, without dimensions, on the device.
        """
        size = torch.full_like(share, moments.samples)
        reached = [
            (size * called).expand(stack.shape[0]) for stack, called in zip(self.stacks, moments.called, strict=True)
        ]
        weights = self._by_tensor(reached, share, size)
        found = [t * w.view(-1, *[1] * (t.ndim - 1)) for t, w in zip(moments.tensors, weights, strict=True)]
        return [*found, *reached]

    def divided(
        self, sums: Sequence[Tensor], size: Tensor, share: Tensor, excluded: list[int], samples: int
    ) -> Moments:
        """What :meth:`scaled` gave, added up over batches, as moments of all of them.

        Args:
            sums: The sums.
            size: Number of the samples.
            share: What G is to be divided by.
            excluded: As of moments.
            samples: As of moments.
        """
        tiny, reached = torch.finfo(self.dtype).tiny, sums[len(sums) - len(self.stacks) :]
        sizes = [own.clamp_min(tiny) for own in reached]
        tensors = sums[: len(sums) - len(self.stacks)]
        weights = self._by_tensor(sizes, share, size)
        found = [t / w.view(-1, *[1] * (t.ndim - 1)) for t, w in zip(tensors, weights, strict=True)]
        return Moments(found, [own / size for own in reached], excluded, samples)

    def _by_tensor(self, reached: Sequence[Tensor], share: Tensor, size: Tensor) -> list[Tensor]:
        """One weight for A and one for G, in the order of :attr:`tensors`: ``(m,)`` or without dimensions."""
        found: list[Tensor] = []
        for own, swapped in zip(reached, self._swapped, strict=True):
            both = share.expand(len(own))
            found += [own, both] if swapped is None else [both.where(swapped, own), own.where(swapped, both)]
        return found + [size, share] * len(self.pairs)

    def average(self, moments: Moments, decay: float, sound: Tensor) -> Tensor:
        """Average in those of one batch, with weight ``max(1 - decay, 1/t)`` at update t, unless it is not sound.

        A block that was not called keeps its factors; cross factors that were not gathered decay towards zero.

        Args:
            moments: Of the batch; used up.
            decay: Weight of the past.
            sound: Whether to, without dimensions, on the device.

        Returns:
            The weight, without dimensions, on the device.
        """
        self.updates += 1
        weight = (self.updates - self.skipped).to(self.dtype).reciprocal().clamp_min(1 - decay)
        self.skipped += ~sound
        step = weight * sound
        for i, (mine, found) in enumerate(zip(self.tensors, moments.tensors, strict=True)):
            called = moments.called[i // 2] if i < 2 * len(self.stacks) else 1.0
            share = step
            if isinstance(called, Tensor):
                share = step * (called > 0).view(-1, *[1] * (mine.ndim - 1))
            # Nothing times what is not finite would not be nothing.
            mine.lerp_(found.nan_to_num_(0.0, 0.0, 0.0), share)
        return weight

    def product(self, x: Matrices) -> Matrices:
        """``(t ∘ M) x``, undamped: ``(M X)_v = Σ_w t_vw G_vw X_w A_wv``."""
        y = [
            times_right(times_left(stack.outputs, part, stack.diagonal[0]), stack.inputs, stack.diagonal[1])
            for stack, part in zip(self.stacks, x, strict=True)
        ]
        for pairs in self.pairs:
            (c, d), g, a = pairs.stacks, pairs.taper * pairs.outputs, pairs.inputs
            for i, (v, w) in enumerate(zip(pairs.left, pairs.right, strict=True)):
                y[c][v] += g[i] @ x[d][w] @ a[i].mT
                y[d][w] += g[i].mT @ x[c][v] @ a[i]
        return y


def times_left(factor: Tensor, x: Tensor, diagonal: bool) -> Tensor:
    """Factors ``(m, o, o)``, or ``(m, o)`` if diagonal, times matrices ``(m, o, a)``."""
    return factor.unsqueeze(2) * x if diagonal else factor @ x


def times_right(x: Tensor, factor: Tensor, diagonal: bool) -> Tensor:
    """Matrices ``(m, o, a)`` times factors ``(m, a, a)``, or ``(m, a)`` if diagonal."""
    return x * factor.unsqueeze(1) if diagonal else x @ factor


def _moments(block: Block, rows: Rows, a: Tensor, g: Tensor) -> None:
    """Write the rows' second moments into ``a`` and ``g``, ``(groups, …)``, which are zero."""
    j = rows.cotangents.flatten(1, 3)
    if block.kind == "embedding":
        # Roles are swapped: the weight is (tokens, features), so its left factor is the tokens' frequency.
        index = rows.inputs.flatten()
        skip = getattr(block.modules[0], "padding_idx", None)
        seen = torch.ones_like(index, dtype=g.dtype) if skip is None else (index != skip).to(g.dtype)
        g[0].index_put_((index,), seen / len(index), accumulate=True)
        _gram(a, j, block.diagonal[1], 1.0)
        return
    share = 1 / (rows.inputs.shape[1] * rows.inputs.shape[2])
    if rows.gram is not None:
        torch.mul(rows.gram, share, out=a)
    else:
        _gram(a, rows.inputs.flatten(1, 2), block.diagonal[1], share)
    _gram(g, j, block.diagonal[0], 1.0)


def _gram(factor: Tensor, x: Tensor, diagonal: bool, scale: float) -> None:
    if diagonal:
        torch.mul(x.square().sum(1), scale, out=factor)
    else:
        factor.baddbmm_(x.mT, x, beta=0, alpha=scale)


def _positions(rows: Rows, samples: int) -> Rows | None:
    """The rows as those of B samples with T positions each, or None."""
    count = rows.inputs.shape[1]
    if rows.inputs.ndim != 4 or samples == 0 or count % samples:
        return None
    if count == samples:
        return rows
    _, k, _, _, o = rows.cotangents.shape
    return Rows(
        rows.inputs.reshape(1, samples, -1, rows.inputs.shape[-1]), rows.cotangents.reshape(1, k, samples, -1, o)
    )


def _means(rows: Rows) -> Rows:
    t = rows.inputs.shape[2]
    return Rows(rows.inputs.mean(2, keepdim=True), rows.cotangents.sum(3, keepdim=True) / t**0.5)
