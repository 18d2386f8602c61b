"""Which node's nonlinearity makes the curvature, and the negative curvature, of a network (docs/sources.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diagnostics.blocks.containers import HessianBlocks
from diagnostics.blocks.pair_metrics import tabled_nodes
from diagnostics.blocks.spectrum import assemble, negligible
from diagnostics.estimators.symmetric_eigen import eigh
from diagnostics.results.text_table import format_table

if TYPE_CHECKING:
    import pandas as pd


def curvature_sources(blocks: HessianBlocks, *, include_output: bool = False) -> SourceTable:
    """Attribute the tensor part and the negative curvature of the batch-mean Hessian to the nodes that cause them.

    The tensor part is a sum over nodes, ``H^T = Σ_u H^T(u)``, and H = H^GN + H^T. Two numbers of the assembled matrix
    are split along that sum, both exactly:

    - ``‖H^T‖_F² = Σ_u ⟨H^T(u), H^T⟩``: the signed share of node u in the curvature that Gauss-Newton leaves out. It
      is negative where u works against the others. (Shares of norms, ``‖H^T(u)‖/‖H^T‖``, do not add up; they are
      given beside it.)
    - ``m⁻ = Σ_{λ<0} |λ| = −⟨H^GN, P⟩ − Σ_u ⟨H^T(u), P⟩``, with ``P = Σ_{λᵢ<0} vᵢ vᵢᵀ`` the projection on the
      directions of negative curvature. For a loss that is convex in the output the Gauss-Newton term is not positive:
      it holds negative curvature off, and the nodes' terms add up to m⁻ and what it holds off.

    Either term is the rate at which the number changes as the curvature of u alone is scaled (half that rate for
    ``‖H^T‖²``); that the rates add up to the number itself is Euler's theorem on homogeneous functions. It is a
    statement of first order: without u's curvature, the negative directions would be others. Where eigenvalues are
    zero, P is that of those below −√N · eps · ‖H‖_F. Source: docs/sources.md.

    Args:
        blocks: Blocks of ``hessian_blocks(graph, by_source=True)``, per sample or already averaged.
        include_output: Range over the model's output too, where it was not among the chosen nodes.

    Returns:
        A :class:`SourceTable`: sources × pairs of nodes.

    Raises:
        AttributeError: the blocks were computed without ``by_source=True``.
    """
    names = tabled_nodes(blocks.layout, include_output)
    shares = blocks.tensor_by_source
    tensor, gn = (assemble(part.mean(), names) for part in (blocks.tensor, blocks.gn))
    values, vectors = eigh(tensor + gn)
    negative = values < -negligible(tensor + gn)
    downhill = vectors[:, negative]
    projection = downhill @ downhill.mT
    layout = blocks.gn.mean().layout
    sizes = torch.tensor([layout.sizes[name] for name in names], device=tensor.device)
    of_node = torch.nn.functional.one_hot(torch.arange(len(names), device=tensor.device).repeat_interleave(sizes))
    of_node = of_node.to(tensor)

    def by_pair(entries: Tensor) -> Tensor:
        return of_node.mT @ entries @ of_node

    products, squares, masses = [], [], []
    for share in shares.values():  # one dense share at a time: there are as many as nodes
        own = assemble(share.mean(), names)
        products.append(by_pair(own * tensor))
        squares.append(by_pair(own.square()))
        masses.append(-by_pair(own * projection))
    index = torch.tensor([layout.names.index(name) for name in names], dtype=torch.long)
    nothing = tensor.new_zeros(0, len(names), len(names))
    return SourceTable(
        nodes=names,
        sources=tuple(shares),
        products=torch.stack(products) if products else nothing,
        norms=torch.stack(squares).sqrt() if squares else nothing,
        tensor_norm=by_pair(tensor.square()).sqrt(),
        negative=torch.stack(masses) if masses else nothing,
        gn_negative=-by_pair(gn * projection),
        negative_mass=values[negative].abs().sum().item(),
        distance=layout.distances[index][:, index],
    )


@dataclass(frozen=True, eq=False, repr=False)
class SourceTable:
    """What each node's nonlinearity contributes to the curvature; made by :func:`curvature_sources`.

    n nodes are measured, m nodes are sources. Pairs are ordered, ``(v, w)`` and ``(w, v)`` both count.

    Attributes:
        nodes: Names of the n nodes whose blocks were assembled, in topological order.
        sources: Names of the m nodes with curvature of their own, in topological order.
        products: ⟨H^T(u)[v,w], H^T[v,w]⟩, ``(m, n, n)``; over sources they add up to ``tensor_norm²``.
        norms: ‖H^T(u)[v,w]‖_F, ``(m, n, n)``.
        tensor_norm: ‖H^T[v,w]‖_F, ``(n, n)``.
        negative: −⟨H^T(u)[v,w], P[v,w]⟩, ``(m, n, n)``.
        gn_negative: −⟨H^GN[v,w], P[v,w]⟩, ``(n, n)``; with ``negative`` it adds up to m⁻ over sources and pairs.
        negative_mass: m⁻, the sum of the absolute values of the negative eigenvalues of H.
        distance: Length of the shortest undirected path between v and w, ``(n, n)``.
    """

    nodes: tuple[str, ...]
    sources: tuple[str, ...]
    products: Tensor
    norms: Tensor
    tensor_norm: Tensor
    negative: Tensor
    gn_negative: Tensor
    negative_mass: float
    distance: Tensor

    @property
    def share(self) -> Tensor:
        """⟨H^T(u), H^T⟩ / ‖H^T‖_F² of the assembled matrices, ``(m,)``; adds up to 1. NaN where H^T = 0."""
        return self.products.sum((1, 2)) / self.tensor_norm.square().sum()

    @property
    def norm_ratio(self) -> Tensor:
        """‖H^T(u)‖_F / ‖H^T‖_F, ``(m,)``; does not add up to 1. NaN where H^T = 0."""
        return self.norms.square().sum((1, 2)).sqrt() / self.tensor_norm.square().sum().sqrt()

    @property
    def negative_share(self) -> Tensor:
        """Each source's share of m⁻, ``(m,)``; with ``gn_negative_share`` it adds up to 1. NaN where m⁻ = 0."""
        return self.negative.sum((1, 2)) / self.negative_mass

    @property
    def gn_negative_share(self) -> float:
        """The Gauss-Newton part's share of m⁻: at most 0 for a convex loss. NaN where m⁻ = 0."""
        return (self.gn_negative.sum() / self.negative_mass).item()

    def by_distance(self) -> SourceDistanceTable:
        """The same shares over the pairs at each graph distance."""
        rows = []
        for d in self.distance.unique().tolist():
            here = self.distance == d
            whole = self.tensor_norm[here].square().sum()
            share = (self.products[:, here].sum(1) / whole).tolist()
            ratio = (self.norms[:, here].square().sum(1) / whole).sqrt().tolist()
            mass = (self.negative[:, here].sum(1) / self.negative_mass).tolist()
            rows += [SourceRow(d, *row) for row in zip(self.sources, share, ratio, mass, strict=True)]
            gn_mass = (self.gn_negative[here].sum() / self.negative_mass).item()
            rows.append(SourceRow(d, _GAUSS_NEWTON, float("nan"), float("nan"), gn_mass))
        return SourceDistanceTable(tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Names and nested lists, ready for JSON (but for NaN and infinity)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: getattr(self, name) for name in ("share", "norm_ratio", "negative_share", "gn_negative_share")}
        return {
            name: v.tolist() if isinstance(v, Tensor) else list(v) if isinstance(v, tuple) else v
            for name, v in values.items()
        }

    def to_pandas(self) -> pd.DataFrame:
        """One row per source, the Gauss-Newton part last; needs pandas."""
        import pandas as pd

        rows = [(r.source, r.share, r.norm_ratio, r.negative_share) for r in self._rows()]
        return pd.DataFrame(rows, columns=["source", "share", "norm_ratio", "negative_share"])

    def _rows(self) -> list[SourceRow]:
        columns = (self.share.tolist(), self.norm_ratio.tolist(), self.negative_share.tolist())
        rows = [SourceRow(float("nan"), *row) for row in zip(self.sources, *columns, strict=True)]
        return [*rows, SourceRow(float("nan"), _GAUSS_NEWTON, float("nan"), float("nan"), self.gn_negative_share)]

    def __str__(self) -> str:
        norm = self.tensor_norm.square().sum().sqrt().item()
        title = (
            f"{len(self.sources)} sources, curvature between {len(self.nodes)} nodes; "
            f"|H^T| = {norm:.3g}, m- = {self.negative_mass:.3g}"
        )
        rows = [[r.source, *_shown(r.share, r.norm_ratio, r.negative_share)] for r in self._rows()]
        return "\n".join([title, format_table(["source", *_HEADER], rows)])

    __repr__ = __str__


_GAUSS_NEWTON = "(Gauss-Newton part)"  # no module has such a name
_HEADER = ("share of |H^T|^2", "|H^T(u)| / |H^T|", "share of m-")


@dataclass(frozen=True)
class SourceRow:
    """One source at one distance: its share of ‖H^T‖² there, ‖H^T(u)‖/‖H^T‖ there, and its share of all of m⁻."""

    distance: float
    source: str
    share: float
    norm_ratio: float
    negative_share: float


@dataclass(frozen=True, repr=False)
class SourceDistanceTable:
    """Shares of the sources by graph distance of the pair; made by :meth:`SourceTable.by_distance`.

    Shares of ‖H^T‖² add up to 1 at each distance, those of m⁻ over all distances.
    """

    rows: tuple[SourceRow, ...]

    def to_dict(self) -> dict[str, list[Any]]:
        """One list a column."""
        return {f.name: [getattr(row, f.name) for row in self.rows] for f in fields(SourceRow)}

    def to_pandas(self) -> pd.DataFrame:
        """One row per distance and source; needs pandas."""
        import pandas as pd

        return pd.DataFrame(self.to_dict())

    def __str__(self) -> str:
        rows = [[f"{r.distance:g}", r.source, *_shown(r.share, r.norm_ratio, r.negative_share)] for r in self.rows]
        return format_table(
            ["distance", "source", "share of |H^T|^2 here", "|H^T(u)| / |H^T| here", "share of m-"], rows
        )

    __repr__ = __str__


def _shown(*values: float) -> Sequence[str]:
    return ["" if value != value else f"{value:.3g}" for value in values]
