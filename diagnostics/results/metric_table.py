"""Tables of metrics: they print, and convert to a dict or a pandas frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diagnostics.results.pair_formulas import metrics_of_norms
from diagnostics.results.text_table import format_table

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = {"resonance": "R", "coupling": "C", "stable_rank": "D", "gn_gap": "Gap"}
_MOST_ROWS = 60


@dataclass(frozen=True, eq=False)
class MetricErrors:
    """Standard errors of the metrics in a table, ``(n, n)`` each: 0 where exact, NaN where the metric is.

    Intervals are ``metric ± t · error`` with Student's t of ``probes − 1`` degrees of freedom.

    Attributes:
        resonance: Of R.
        coupling: Of C.
        stable_rank: Of D, with what the iterations for ‖H‖₂ may have left out.
        gn_gap: Of the gap.
        gn_norm: Of ‖H^GN‖_F.
        tensor_norm: Of ‖H^T‖_F.
        probes: Number of random probes at each node.
        products: Columns that the Hessian or its tensor part was multiplied with: two passes through the network each.
        passes: Columns carried back from the output for the Gauss-Newton part: one pass each.
        leave_one_out: ``"resonance"``, ``"gn_norm"`` and ``"tensor_norm"`` without each probe in turn, ``(n, n, m)``:
            for errors of what is computed from several pairs. Not in :meth:`MetricTable.to_dict`.
    """

    resonance: Tensor
    coupling: Tensor
    stable_rank: Tensor
    gn_gap: Tensor
    gn_norm: Tensor
    tensor_norm: Tensor
    probes: int
    products: int
    passes: int
    leave_one_out: Mapping[str, Tensor]

    def shown(self) -> dict[str, Any]:
        """The fields that are exported."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "leave_one_out"}


@dataclass(frozen=True, eq=False, repr=False)
class MetricTable:
    """Curvature metrics of every pair of nodes; made by :func:`diagnostics.metrics`.

    All tensors are ``(n, n)``, symmetric, in the order of ``nodes``.

    Attributes:
        nodes: Names of the nodes, in topological order.
        resonance: R = ‖H[v,w]‖_F.
        coupling: C = R(v,w) / √(R(v,v) R(w,w)).
        stable_rank: D = ‖H‖_F² / ‖H‖₂².
        gn_gap: Gap = ‖H^T‖_F / (‖H^GN‖_F + 1e-12).
        gn_norm: ‖H^GN‖_F.
        tensor_norm: ‖H^T‖_F.
        distance: Length of the shortest undirected path.
        standard_errors: Of the metrics, where they are estimates (:func:`diagnostics.estimate_metrics`).
    """

    nodes: tuple[str, ...]
    resonance: Tensor
    coupling: Tensor
    stable_rank: Tensor
    gn_gap: Tensor
    gn_norm: Tensor
    tensor_norm: Tensor
    distance: Tensor
    standard_errors: MetricErrors | None = None

    @staticmethod
    def from_norms(
        nodes: tuple[str, ...], total: Tensor, gn: Tensor, tensor: Tensor, spectral: Tensor, distance: Tensor
    ) -> MetricTable:
        """The table from ‖H‖_F, ‖H^GN‖_F, ‖H^T‖_F and ‖H‖₂ of all pairs.

        Norms are ``(n, n)``; or ``(n, n, S)`` of S samples, whose metrics are averaged.
        """
        found = metrics_of_norms(total, gn, tensor, spectral)
        means = {name: values.mean(2) if values.ndim > 2 else values for name, values in found.items()}
        return MetricTable(nodes, **means, distance=distance)  # type: ignore[arg-type]  # no name is standard_errors

    @property
    def gap_ratio(self) -> float:
        """Σ‖H^T‖ / Σ‖H^GN‖ over the pairs v ≤ w: the gap of the paper's tables, governed by the largest blocks.

        The mean of ``gn_gap`` weighs all pairs alike; the two can differ a hundredfold.
        """
        n = len(self.nodes)
        v, w = torch.triu_indices(n, n, device=self.tensor_norm.device)
        return _ratio(*torch.stack([self.tensor_norm[v, w].sum(), self.gn_norm[v, w].sum()]).tolist())

    def by_distance(self) -> DistanceTable:
        """The metrics averaged over the pairs v ≤ w at each graph distance, NaN left out."""
        v, w = self._upper()
        at = self.distance[v, w]
        rows = []
        for d in at.unique().tolist():
            here = (v[at == d], w[at == d])
            gap = _ratio(self.tensor_norm[here].sum().item(), self.gn_norm[here].sum().item())
            means = {name: getattr(self, name)[here].nanmean().item() for name in _SHOWN}
            rows.append(DistanceRow(distance=d, pairs=len(here[0]), **means, gap_ratio=gap))
        return DistanceTable(tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Names and nested lists, ready for JSON (but for NaN and infinity); standard errors where there are some."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "standard_errors"}
        table: dict[str, Any] = {name: v.tolist() if isinstance(v, Tensor) else list(v) for name, v in values.items()}
        if self.standard_errors is not None:
            errors = self.standard_errors.shown()
            table["standard_errors"] = {n: e.tolist() if isinstance(e, Tensor) else e for n, e in errors.items()}
        return table

    def to_pandas(self) -> pd.DataFrame:
        """One row per pair v ≤ w; standard errors as ``"resonance_error"`` …; needs pandas."""
        import pandas as pd

        v, w = self._upper()
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.standard_errors is not None:
            tensors |= {f"{name}_error": error for name, error in self.standard_errors.shown().items()}
        metrics = {name: values[v, w].tolist() for name, values in tensors.items() if isinstance(values, Tensor)}
        return pd.DataFrame({"v": [self.nodes[i] for i in v], "w": [self.nodes[i] for i in w], **metrics})

    def _upper(self) -> tuple[Tensor, Tensor]:
        v, w = torch.triu_indices(len(self.nodes), len(self.nodes), device=self.distance.device)
        return v, w

    def __str__(self) -> str:
        v, w = self._upper()
        lines = [f"{len(self.nodes)} nodes, {len(v)} pairs; sum of |H^T| / sum of |H^GN| = {self.gap_ratio:.3g}"]
        if len(v) > _MOST_ROWS:
            return "\n".join(
                [
                    *lines,
                    f"by distance (more than {_MOST_ROWS} pairs; all are in the tensors):",
                    str(self.by_distance()),
                ]
            )
        order = sorted(range(len(v)), key=lambda i: (self.distance[v[i], w[i]].item(), i))
        rows = []
        for i in order:
            pair = (int(v[i]), int(w[i]))
            shown = [self._cell(name, pair) for name in _SHOWN]
            rows.append([self.nodes[pair[0]], self.nodes[pair[1]], f"{self.distance[pair].item():g}", *shown])
        return "\n".join([*lines, format_table(["v", "w", "distance", *_SHOWN.values()], rows)])

    __repr__ = __str__

    def _cell(self, name: str, pair: tuple[int, int]) -> str:
        value = f"{getattr(self, name)[pair].item():.3g}"
        if self.standard_errors is None:
            return value
        return f"{value} ± {getattr(self.standard_errors, name)[pair].item():.2g}"


@dataclass(frozen=True)
class DistanceRow:
    """Mean metrics of the pairs at one graph distance; ``gap_ratio`` is Σ‖H^T‖ / Σ‖H^GN‖ over them."""

    distance: float
    pairs: int
    resonance: float
    coupling: float
    stable_rank: float
    gn_gap: float
    gap_ratio: float


@dataclass(frozen=True, repr=False)
class DistanceTable:
    """Metrics by graph distance; made by :meth:`MetricTable.by_distance`."""

    rows: tuple[DistanceRow, ...]

    def to_dict(self) -> dict[str, list[float]]:
        """One list a column."""
        return {f.name: [getattr(row, f.name) for row in self.rows] for f in fields(DistanceRow)}

    def to_pandas(self) -> pd.DataFrame:
        """One row per distance; needs pandas."""
        import pandas as pd

        return pd.DataFrame(self.to_dict())

    def __str__(self) -> str:
        header = ["distance", "pairs", *_SHOWN.values(), "Gap (ratio of sums)"]
        names = [f.name for f in fields(DistanceRow)]
        return format_table(header, [[f"{getattr(row, name):.3g}" for name in names] for row in self.rows])

    __repr__ = __str__


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return 0.0 if numerator == 0 else float("inf")
    return numerator / denominator
