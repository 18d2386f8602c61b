"""What a block-diagonal or banded approximation of the curvature discards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diagnostics.matrix_free.square_norms import jackknife
from diagnostics.results.estimate import Estimate, exact
from diagnostics.results.metric_table import MetricTable


@dataclass(frozen=True, eq=False, repr=False)
class DiscardedShare:
    """What a banded approximation leaves out; made by :func:`discarded_share`.

    Attributes:
        bandwidth: Pairs farther apart than this are discarded.
        total: Share of ‖H‖_F².
        gn: Share of ‖H^GN‖_F².
        tensor: Share of ‖H^T‖_F².
    """

    bandwidth: float
    total: Estimate
    gn: Estimate
    tensor: Estimate

    def __str__(self) -> str:
        shares = {"|H|²": self.total, "|H^GN|²": self.gn, "|H^T|²": self.tensor}
        listed = ", ".join(f"{e.item():.3g} ± {e.standard_error.item():.2g} of {name}" for name, e in shares.items())
        return f"beyond distance {self.bandwidth:g}: {listed}"

    __repr__ = __str__


def discarded_share(table: MetricTable, bandwidth: float = 0) -> DiscardedShare:
    """The share of the squared Frobenius norm that a block-diagonal or banded approximation discards.

    ``Σ ‖H[v,w]‖² / Σ ‖H[v,w]‖²``, over the ordered pairs farther apart than ``bandwidth`` above and over all pairs
    below; likewise of the Gauss-Newton and of the tensor part. 0/0 is NaN.

    Standard errors are the jackknife's: the share with each probe left out of all pairs at once, so that correlations
    between pairs are in them. Those of an exact table are 0.

    Args:
        table: Of :func:`diagnostics.estimate_parameter_metrics`, :func:`diagnostics.estimate_metrics` or
            :func:`diagnostics.metrics`.
        bandwidth: Of the approximation, in the table's own distances; 0: block-diagonal.

    Raises:
        ValueError: ``bandwidth`` is negative.
    """
    if not bandwidth >= 0:
        raise ValueError(f"bandwidth is a distance of at least 0, got {bandwidth}.")
    errors = table.standard_errors

    def share(name: str) -> Estimate:
        value = _outside(getattr(table, name), table.distance, bandwidth)
        if errors is None:
            return exact(value, 0)
        error = jackknife(value, _outside(errors.leave_one_out[name], table.distance, bandwidth))
        return Estimate(value, error, errors.probes, errors.products + errors.passes, bool(error == 0))

    return DiscardedShare(bandwidth, share("resonance"), share("gn_norm"), share("tensor_norm"))


def _outside(norms: Tensor, distance: Tensor, bandwidth: float) -> Tensor:
    """The share of the squares of norms ``(n, n, …)``."""
    squares = norms.square()
    result: Tensor = squares[(distance > bandwidth).to(norms.device)].sum(0) / squares.sum((0, 1))
    return result
