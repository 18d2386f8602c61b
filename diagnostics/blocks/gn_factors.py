"""Gauss-Newton blocks as thin factors, carried back through the network and cut on the way (docs/low_rank.md)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.autograd.kernels import plain_autograd, twice_differentiable
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.low_rank import LowRankBlock, LowRankBlocks, discarded
from diagnostics.blocks.memory_plan import check_memory, planned_bytes
from diagnostics.estimators.symmetric_eigen import eigh
from diagnostics.graph.graph import Graph
from diagnostics.graph.local import LOSS, Curvature, differentiate


@dataclass(frozen=True, eq=False)
class _Factor:
    """A_v ≈ U Wᵀ at one node: U ``(S, d_v, r)``, W ``(S, k, r)`` with orthonormal columns, ‖A_v − U Wᵀ‖_F ≤ bound."""

    left: Tensor
    basis: Tensor
    bound: Tensor

    @property
    def values(self) -> Tensor:
        """Singular values of U Wᵀ, ``(S, r)``, in descending order: the columns of U are orthogonal."""
        values: Tensor = torch.linalg.vector_norm(self.left, dim=1)
        return values

    @property
    def norm(self) -> Tensor:
        """‖U Wᵀ‖₂, ``(S,)``."""
        return self.values[:, :1].sum(1)

    def cut(self, rank: int | None = None, allowed: Tensor | None = None) -> _Factor:
        """Only the largest singular values: ``rank`` of them, or as few as lose at most ``allowed``, ``(S,)``."""
        tails = discarded(self.values)
        keep = min(rank, self.left.shape[2]) if rank is not None else self.left.shape[2]
        if allowed is not None:
            keep = int((tails > allowed.unsqueeze(1)).sum(1).max().item())
        return _Factor(self.left[:, :, :keep].clone(), self.basis[:, :, :keep].clone(), self.bound + tails[:, keep])


class GaussNewtonFactors(LowRankBlocks):
    """Gauss-Newton blocks of single samples as factors of one node each; made by :func:`gauss_newton_factors`.

    Attributes:
        ranks: Columns of each node's factor.
        bounds: Upper bound on ‖A_v − Â_v‖_F at each node, ``(S,)``.
    """

    def __init__(self, layout: Layout, at: Mapping[str, _Factor], signs: Tensor) -> None:
        super().__init__(layout)
        self._at = at
        self._signs = signs
        self.ranks = {v: factor.left.shape[2] for v, factor in at.items()}
        self.bounds = {v: factor.bound for v, factor in at.items()}

    def root(self, v: str) -> Tensor:
        """Â_v multiplied out, ``(S, d_v, k)``: in exact form the square root of the block, H^GN[v,v] = A_v Σ A_vᵀ."""
        return self._at[v].left @ self._at[v].basis.mT

    def _factors(self, v: str, w: str) -> LowRankBlock:
        a, b = self._at[v], self._at[w]
        core = a.basis.mT @ (self._signs.unsqueeze(2) * b.basis)  # (S, r_v, r_w)
        thin = a.left.shape[2] <= b.left.shape[2]
        left, right = (a.left, b.left @ core.mT) if thin else (a.left @ core, b.left)
        return LowRankBlock(left, right, a.bound * b.norm + a.norm * b.bound + a.bound * b.bound)


def gauss_newton_factors(
    graph: Graph, *, rank: int | None = None, tolerance: float = 0.0, memory_limit: int = 8 * 2**30
) -> GaussNewtonFactors:
    """Gauss-Newton blocks as thin factors, each node's carried back from its children's (cf. Prop. 92, Thm 93).

    With ``∇²ℓ = Sᵀ Σ S`` (S: eigenvectors of nonzero eigenvalues times their roots, Σ: signs) and ``A_v = J[z←v]ᵀ Sᵀ``,

        H^GN[v,w] = A_v Σ A_wᵀ,        A_v = Σ_{u∈Ch(v)} D[u,v]ᵀ A_u,

    so every block of a sample has at most the rank of ∇²ℓ, exactly: C − 1 for cross entropy over C classes. Walking
    back, each node keeps only the largest singular values of its Â_v. What node u discards, τ_u, reaches v through
    Jacobians, so that

        ‖A_v − Â_v‖_F ≤ b_v = ‖τ_v‖_F + Σ_{u∈Ch(v)} ‖D[u,v]‖₂ b_u,
        ‖H^GN[v,w] − Ĥ[v,w]‖_F ≤ b_v ‖Â_w‖₂ + ‖Â_v‖₂ b_w + b_v b_w,

    which needs nothing that was discarded. It bounds what is cut, not rounding.

    Args:
        graph: A captured network.
        rank: Keep at most so many columns at every node. The bounds say what it costs.
        tolerance: Choose the ranks such that ‖A_v − Â_v‖_F ≤ b_v ≤ tolerance · ‖A_v‖_F at every node and sample
            (cf. Cor. 94). A first walk back finds the norms ‖A_v‖_F. On a second one, node u may discard what at each
            v before it, amplified by the norms of the Jacobians on all paths from u to v, adds up to half of that; the
            rest is used at v itself, for what is kept there but not for what is carried on. 0: exact. Give either this
            or ``rank``.
        memory_limit: Bytes that local derivatives and factors may take, by the (larger) plan for batch means.

    Returns:
        :class:`GaussNewtonFactors`: blocks ``(S, d_v, d_w)``, and ``factors(v, w)`` of the pair with their bound.

    Raises:
        ValueError: Both ``rank`` and ``tolerance`` are given, or one is out of range.
        MemoryBudgetError: it would take more than ``memory_limit``; the message says how much.
        StaleGraphError: a parameter changed since the capture.
        DiagnosticsError: a node has no second derivative, named in the message.
    """
    if rank is not None and tolerance:
        raise ValueError("give either rank or tolerance: how many columns to keep, or what may be lost.")
    if not 0 <= tolerance < 1 or (rank is not None and rank < 0):
        raise ValueError(f"need rank ≥ 0 and 0 ≤ tolerance < 1, got rank={rank} and tolerance={tolerance}.")
    graph.check_fresh()
    with plain_autograd(), twice_differentiable():
        layout = Layout.of(graph)
        check_memory(planned_bytes(graph, layout, averaged=True), memory_limit, layout)
        local = differentiate(graph)
    with torch.no_grad():
        start, signs = _roots(graph, layout, local.curvatures[LOSS])
        walk = _WalkBack(graph, layout, local.jacobians, start)
        if rank is not None:
            return GaussNewtonFactors(layout, dict(walk.factors(rank=rank)), signs)
        if tolerance == 0:
            return GaussNewtonFactors(layout, dict(walk.factors()), signs)
        sizes = {u: torch.linalg.vector_norm(factor.left, dim=(1, 2)) for u, factor in walk.factors()}
        may_lose = walk.budgets({u: 0.5 * tolerance * size for u, size in sizes.items()})
        kept = {
            u: factor.cut(allowed=(tolerance * sizes[u] - factor.bound).clamp(min=0))
            for u, factor in walk.factors(allowed=may_lose)
        }
        return GaussNewtonFactors(layout, kept, signs)


def _roots(graph: Graph, layout: Layout, curvature: Curvature) -> tuple[dict[str, Tensor], Tensor]:
    """A_p = Sᵀ restricted to each node p that the loss reads, ``(S, d_p, k)``, and the signs Σ, ``(S, k)``."""
    whole = layout.stacked(graph.loss_parents, curvature)
    values, vectors = eigh((whole + whole.mT) / 2)
    order = values.abs().argsort(-1, descending=True)
    values = values.gather(-1, order)
    zero = whole.shape[1] * torch.finfo(values.dtype).eps * values[:, :1].abs()
    k = int((values.abs() > zero).sum(-1).max().item())
    values = values[:, :k]
    vectors = vectors.gather(-1, order.unsqueeze(1).expand_as(vectors))[:, :, :k]
    root = vectors * values.abs().sqrt().unsqueeze(1)
    return {p: root[:, rows] for p, rows in layout.rows(graph.loss_parents).items()}, values.sign()


class _WalkBack:
    """The recursion of :func:`gauss_newton_factors`; local Jacobians' norms are computed once for all walks."""

    def __init__(
        self,
        graph: Graph,
        layout: Layout,
        jacobians: Mapping[str, Mapping[str, Tensor]],
        start: Mapping[str, Tensor],
    ) -> None:
        self._nodes = [node.name for node in reversed(graph.nodes)]
        self._layout = layout
        self._jacobians = jacobians
        self._start = start
        self._norms: dict[tuple[str, str], Tensor] = {}

    def factors(
        self, rank: int | None = None, allowed: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[str, _Factor]]:
        """Â_v of every node, from the loss backwards, cut at each node to a rank or by what it may lose."""
        pieces: dict[str, list[_Factor]] = defaultdict(list)
        for p, root in self._start.items():
            k = root.shape[2]
            unit = torch.eye(k, dtype=root.dtype, device=root.device).expand(len(root), k, k)
            pieces[p].append(_Factor(root, unit, root.new_zeros(len(root))))
        for u in self._nodes:
            if u in pieces:
                here = self._merge(pieces.pop(u)).cut(rank, None if allowed is None else allowed[u])
                lossy = bool(here.bound.any())
                for p, jacobian in self._jacobians[u].items():
                    carried = self._norm(u, p) * here.bound if lossy else here.bound
                    pieces[p].append(_Factor(jacobian.mT @ here.left, here.basis, carried))
            else:
                here = self._nothing(u)
            yield u, here

    def budgets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each node u may lose, ``(S,)``, so that the bound at every node v stays below ``targets[v]``.

        The bound at v is Σ_u G[v,u] ‖τ_u‖ with G[v,u] the sum over paths from v to u of the products of ‖D‖₂: every u
        that v reaches gets an equal share of the target.
        """
        gains: dict[str, dict[str, Tensor]] = {}
        for u in self._nodes:
            gains[u] = {u: torch.ones_like(targets[u])}
            for w in self._nodes[self._nodes.index(u) :]:
                for p in self._jacobians[w] if w in gains[u] else ():
                    gain = self._norm(w, p) * gains[u][w]
                    gains[u][p] = gains[u][p] + gain if p in gains[u] else gain
        reached = Counter(v for at in gains.values() for v in at)
        budgets = {}
        for u, at in gains.items():
            shares = torch.stack([targets[v] / reached[v] / gain for v, gain in at.items()])
            budgets[u] = shares.nan_to_num(nan=torch.inf).amin(0)  # 0/0: what u loses does not reach v
        return budgets

    def _merge(self, pieces: Sequence[_Factor]) -> _Factor:
        """Σ Uᵢ Wᵢᵀ = [U₁ …] [W₁ …]ᵀ, and with [W₁ …] = Q R its singular values are those of the thin [U₁ …] Rᵀ."""
        q, r = torch.linalg.qr(torch.cat([piece.basis for piece in pieces], dim=2))
        joined = torch.cat([piece.left for piece in pieces], dim=2) @ r.mT
        left, values, right = torch.linalg.svd(joined, full_matrices=False)
        bound = torch.stack([piece.bound for piece in pieces]).sum(0)
        return _Factor(left * values.unsqueeze(1), q @ right.mT, bound)

    def _nothing(self, u: str) -> _Factor:
        """The factor of a node that does not reach the loss."""
        like, samples = self._layout.like, self._layout.samples
        k = next(iter(self._start.values())).shape[2]
        return _Factor(
            like.new_zeros(samples, self._layout.sizes[u], 0), like.new_zeros(samples, k, 0), like.new_zeros(samples)
        )

    def _norm(self, u: str, p: str) -> Tensor:
        """‖D[u,p]‖₂ of each sample, ``(S,)``."""
        if (u, p) not in self._norms:
            jacobian = self._jacobians[u][p]
            same = jacobian.stride(0) == 0  # a linear layer's weight, shared by all samples
            norm: Tensor = torch.linalg.matrix_norm(jacobian[:1] if same else jacobian, 2)
            self._norms[u, p] = norm.expand(len(jacobian))
        return self._norms[u, p]
