"""The damped inverse of tapered Kronecker curvature: direct inside blocks, conjugate gradients between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from diagnostics.ranks.collectives import Ranks
from hessopt.averages.averages import KroneckerAverages, Matrices, Pairs, Stack, times_left
from hessopt.averages.division import CHOLESKY, Work, own_entries, owners_of
from hessopt.kronecker.damping import Damping


@dataclass(eq=False)
class _Inverse:
    """``inputs``, ``outputs``: the inverses of the damped A and G (or the inverses of their Cholesky factors)."""

    inputs: Tensor
    outputs: Tensor


class KroneckerInverse:
    """Solves ``(t ∘ M + blockdiag(E_v)) d = g`` with ``E_v = A_v' ⊗ G_v' − A_v ⊗ G_v``, the factored damping.

    The damping is :class:`hessopt.kronecker.damping.Damping`, so the diagonal blocks are ``A_v' ⊗ G_v'``. Without pairs
    the solution is ``G_v'⁻¹ X_v A_v'⁻¹``. With pairs, the system is written in coordinates in which the diagonal blocks
    are the identity::

        A_v' = L Lᵀ, G_v' = R Rᵀ, X̃_v = R⁻¹ X_v L⁻ᵀ, Ã_vw = L_v⁻¹ A_vw L_w⁻ᵀ, G̃_vw = R_v⁻¹ G_vw R_w⁻ᵀ
        Σ_w: X̃_v + Σ_{w≠v} t_vw G̃_vw X̃_w Ã_vwᵀ = g̃_v

    and solved by a few conjugate-gradient iterations from zero: that is the block-diagonal preconditioner, applied once
    and not once an iteration, and the first iterate is the block-diagonal step, optimally scaled.

    Memory: as much as the factors have.

    Args:
        factors: The averages.
        iterations: Of conjugate gradients, if there are pairs.

    Attributes:
        parts: The last solution, as matrices.
        ready: Whether the factors were inverted.
    """

    def __init__(self, factors: KroneckerAverages, iterations: int) -> None:
        self.factors = factors
        self.iterations = iterations
        self.inverses = [_Inverse(torch.zeros_like(s.inputs), torch.zeros_like(s.outputs)) for s in factors.stacks]
        self.cross = [_Inverse(torch.zeros_like(p.inputs), torch.zeros_like(p.outputs)) for p in factors.pairs]
        self.ready = False
        self._step, self.parts = factors.blank()
        self._gather = [_Scatter(pairs, factors.stacks) for pairs in factors.pairs]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept, in a fixed order."""
        return [t for part in [*self.inverses, *self.cross] for t in (part.inputs, part.outputs)]

    def refresh(self, damping: Damping, ranks: Ranks = Ranks()) -> None:  # noqa: B008 - frozen
        """Invert the factors as they are now. A factor that is not finite keeps its inverse.

        Args:
            damping: What is added to them.
            ranks: The processes that need them: each inverts a part, where that is worth it.
        """
        roots = bool(self.factors.pairs)
        self.ready = True
        pieces: list[tuple[Tensor, Tensor, bool, Tensor]] = []
        for stack, inverse in zip(self.factors.stacks, self.inverses, strict=True):
            extra_inputs, extra_outputs = damping.of_factors(stack)
            for factor, extra, diagonal, kept in (
                (stack.inputs, extra_inputs, stack.diagonal[1], inverse.inputs),
                (stack.outputs, extra_outputs, stack.diagonal[0], inverse.outputs),
            ):
                pieces.append((factor, extra, diagonal, kept))
        owners = iter(owners_of([work_of(t, diagonal) for t, _, diagonal, _ in pieces for _ in range(len(t))], ranks))
        sent: list[Tensor] = []
        senders: list[int] = []
        for factor, extra, diagonal, kept in pieces:
            own = list(islice(owners, len(factor)))
            mine = own_entries(own, ranks.rank)
            if len(mine) == len(own):
                _invert(factor, extra, diagonal, roots, kept)
            elif mine:
                part = kept[mine]
                _invert(factor[mine], extra[mine], diagonal, roots, part)
                kept[mine] = part
            for t, owner in zip(kept, own, strict=True):
                if owner is not None:
                    sent.append(t)
                    senders.append(owner)
        ranks.copy_(sent, senders)
        self._refresh_cross()

    def share(self, other: KroneckerInverse) -> None:
        """Take the roots of the same blocks from another band's inverse; only the cross factors are made anew."""
        self.inverses, self.ready = other.inverses, True
        self._refresh_cross()

    def _refresh_cross(self) -> None:
        for pairs, cross in zip(self.factors.pairs, self.cross, strict=True):
            left, right = (self.inverses[c] for c in pairs.stacks)
            a = left.inputs[pairs.left] @ pairs.inputs @ right.inputs[pairs.right].mT
            g = left.outputs[pairs.left] @ (pairs.taper * pairs.outputs) @ right.outputs[pairs.right].mT
            cross.inputs.copy_(a)
            cross.outputs.copy_(g)

    def penalty(self, step: Tensor, damping: Damping) -> Tensor:
        """``Σ_v λ_v ‖d_v‖²`` of a step, with λ_v the product of what is added to the diagonals of A_v and G_v."""
        parts = zip(self.factors.stacks, self.factors.matrices(step), strict=True)
        return torch.stack(
            [(torch.mul(*damping.of_factors(stack)) * part.square().sum((1, 2))).sum() for stack, part in parts]
        ).sum()

    def solve(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for a gradient.

        Args:
            flat: g, of :meth:`KroneckerAverages.blank`'s size.

        Returns:
            The step d (a buffer that the next call overwrites), ``gᵀd``,
            and whether conjugate gradients failed (``gᵀd`` not positive) and d is the
            block-diagonal step instead; the last two without dimensions, on the device.
        """
        x = self.factors.matrices(flat)
        if not self.cross:
            self._apply(x, transposed=False)
            step = self._step
            return step, flat @ step, torch.zeros((), dtype=torch.bool, device=flat.device)
        self._apply(x, transposed=False)
        solution, failed = self._conjugate_gradients(self._step)
        decrement = self._step @ solution
        self._apply(self.factors.matrices(solution), transposed=True)
        return self._step, decrement, failed

    def solve_blocks(self, flat: Tensor) -> Tensor:
        """The block-diagonal step, from roots; a buffer that the next call overwrites."""
        self._apply(self.factors.matrices(flat), transposed=False)
        self._apply(self.factors.matrices(self._step.clone()), transposed=True)
        return self._step

    def _apply(self, x: Matrices, transposed: bool) -> None:
        """Into the buffer ``G⁻¹ X A⁻¹``; with roots ``R⁻¹ X L⁻ᵀ``, or transposed ``R⁻ᵀ X L⁻¹``."""
        roots = bool(self.cross)
        for stack, inverse, part, out in zip(self.factors.stacks, self.inverses, x, self.parts, strict=True):
            a, g = inverse.inputs, inverse.outputs
            if roots and not stack.diagonal[1] and not transposed:
                a = a.mT
            if roots and not stack.diagonal[0] and transposed:
                g = g.mT
            left = times_left(g, part, stack.diagonal[0])
            if stack.diagonal[1]:
                torch.mul(left, a.unsqueeze(1), out=out)
            else:
                torch.bmm(left, a, out=out)

    def _conjugate_gradients(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """A few iterations for ``(I + Õ) x = b`` from zero."""
        x = torch.zeros_like(b)
        r, p = b, b
        rho = r @ r
        tiny = torch.finfo(b.dtype).tiny
        nothing = tiny / torch.finfo(b.dtype).eps  # a residual this small is none, and its curvature may underflow
        sound = torch.ones((), dtype=torch.bool, device=b.device)
        for i in range(self.iterations):
            q = self._coupled(p)
            curvature = p @ q
            sound = sound & ((curvature > 0) | (rho <= nothing))
            alpha = torch.where(curvature > 0, rho / curvature.clamp_min(tiny), 0.0)
            x = torch.addcmul(x, alpha, p)
            if i + 1 < self.iterations:
                r = torch.addcmul(r, alpha, q, value=-1)
                before, rho = rho, r @ r
                p = torch.addcmul(r, rho / before.clamp_min(tiny), p)
        failed = ~(sound & ((b @ x > 0) | (b @ b == 0)))
        return torch.where(failed, b, x), failed

    def _coupled(self, flat: Tensor) -> Tensor:
        """``(I + Õ) x``."""
        y = flat.clone()
        x, out = self.factors.matrices(flat), self.factors.matrices(y)
        for scatter, cross in zip(self._gather, self.cross, strict=True):
            scatter.add(cross, x, out)
        return y


class _Scatter:
    """Products with cross factors, from and into the stacks of two blocks."""

    def __init__(self, pairs: Pairs, stacks: list[Stack]) -> None:
        self.stacks = pairs.stacks
        self.single = (pairs.left[0], pairs.right[0]) if len(pairs.left) == 1 else None
        self.left, self.right = (torch.tensor(index, device=pairs.inputs.device) for index in (pairs.left, pairs.right))
        # A product with a 0/1 matrix and not index_add_, whose order is not determined on some devices.
        self.into_left, self.into_right = (
            torch.zeros(stacks[c].shape[0], len(index), dtype=pairs.inputs.dtype, device=pairs.inputs.device)
            for c, index in zip(pairs.stacks, (pairs.left, pairs.right), strict=True)
        )
        for i, (v, w) in enumerate(zip(pairs.left, pairs.right, strict=True)):
            self.into_left[v, i] = self.into_right[w, i] = 1.0

    def add(self, cross: _Inverse, x: Matrices, y: Matrices) -> None:
        c, d = self.stacks
        a, g = cross.inputs, cross.outputs
        if self.single is not None:
            v, w = self.single
            a, g = a[0], g[0]
            y[c][v].addmm_(g @ x[d][w], a.mT)
            y[d][w].addmm_(g.mT @ x[c][v], a)
            return
        up = (g @ x[d][self.right]) @ a.mT
        down = (g.mT @ x[c][self.left]) @ a
        y[c].flatten(1).addmm_(self.into_left, up.flatten(1))
        y[d].flatten(1).addmm_(self.into_right, down.flatten(1))


def work_of(factor: Tensor, diagonal: bool) -> Work:
    """What the inverse of one factor of a stack costs."""
    n = factor.shape[1]
    return Work(0.0, n) if diagonal else Work(CHOLESKY * n**3, n * n)


def _invert(factor: Tensor, extra: Tensor, diagonal: bool, root: bool, kept: Tensor) -> None:
    """Write the inverse (root) of ``factor + extra I`` into ``kept``, where it is sound."""
    if diagonal:
        damped = factor + extra.unsqueeze(1)
        found = damped.rsqrt() if root else damped.reciprocal()
        sound = found.isfinite().all(1)
        kept.copy_(torch.where(sound.unsqueeze(1), found, kept))
        return
    damped = factor.clone()
    damped.diagonal(dim1=1, dim2=2).add_(extra.unsqueeze(1))
    lower, info = torch.linalg.cholesky_ex(damped)
    if info.device.type == "cpu" and not info.any():  # the common case, where nothing waits for a look at it
        inverse = triangular_inverse(lower) if root else torch.cholesky_inverse(lower)
        if inverse.sum().isfinite():
            kept.copy_(inverse)
            return
    # A factorization that failed may leave a zero on the diagonal, which LAPACK refuses.
    lower = torch.where(
        (info == 0)[:, None, None], lower, torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    )
    inverse = triangular_inverse(lower) if root else torch.cholesky_inverse(lower)
    sound = (info == 0) & inverse.isfinite().flatten(1).all(1)
    kept.copy_(torch.where(sound[:, None, None], inverse, kept))


def triangular_inverse(lower: Tensor) -> Tensor:
    """Inverse of lower triangular matrices ``(…, n, n)``, by halves: products are faster than LAPACK's solves."""
    n = lower.shape[-1]
    if n <= 64:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        small: Tensor = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
        return small
    h = n // 2
    inverse = torch.zeros_like(lower)
    inverse[..., :h, :h] = triangular_inverse(lower[..., :h, :h])
    inverse[..., h:, h:] = triangular_inverse(lower[..., h:, h:])
    inverse[..., h:, :h] = -inverse[..., h:, h:] @ (lower[..., h:, :h] @ inverse[..., :h, :h])
    return inverse
