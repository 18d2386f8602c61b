"""Squared Frobenius norms of all blocks from random probes, with what the jackknife needs for standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.matrix_free.pair_products import Responses

Extract = Callable[[Responses, str], Tensor]
"""Which part of the responses: ``(responses, v) -> (S, d_v, k)``."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Unbiased samples of ``‖A[v,w]‖_F² − known`` for one part A and all pairs.

    Attributes:
        known: The share that is exact, ``(n, n, S)``: of the deflated directions, or everything.
        random: ``(n, n, S, m)``: entry i from the i-th probes of both nodes; 0 where ``known`` is everything.
    """

    known: Tensor
    random: Tensor

    def estimates(self) -> tuple[Tensor, Tensor]:
        """``‖A[v,w]‖²`` from all probes, and from all but the i-th: ``(n, n, S)`` and ``(n, n, S, m)``."""
        m = self.random.shape[-1]
        total = self.random.sum(-1)
        return self.known + total / m, self.known.unsqueeze(-1) + (total.unsqueeze(-1) - self.random) / (m - 1)

    def controlled(self, control: Samples, expected: Tensor) -> tuple[Tensor, Tensor]:
        """The same, less the part of the error that follows that of ``control``, whose true norms ``expected`` are.

        The slope is that of least squares, fitted anew where a probe is left out. At most a bias of order 1/m, which
        the jackknife's error covers; norms stay at least ``known``.
        """
        m = self.random.shape[-1]
        x, g = self.random, control.random - (expected - control.known).unsqueeze(-1)
        sums = [t.sum(-1, keepdim=True) for t in (x, g, x * g, g * g)]
        without = [s - t for s, t in zip(sums, (x, g, x * g, g * g), strict=True)]

        def fitted(count: int, sx: Tensor, sg: Tensor, sxg: Tensor, sgg: Tensor) -> Tensor:
            spread = sgg - sg * sg / count
            fit = spread > torch.finfo(x.dtype).eps * sgg  # otherwise the control is constant
            slope = torch.where(fit, (sxg - sx * sg / count) / torch.where(fit, spread, 1), 0)
            return (sx - slope * sg) / count

        full, rest = fitted(m, *sums).clamp(min=0), fitted(m - 1, *without).clamp(min=0)
        return self.known + full.squeeze(-1), self.known.unsqueeze(-1) + rest


def column_samples(
    names: Sequence[str], probed: Responses, directions: Responses | None, extract: Extract, probes: int
) -> tuple[Tensor, Tensor]:
    """The known and the sampled share of ``‖A[v,w]‖_F²`` for all v, by products at w: ``(n, S)`` and ``(n, S, m)``.

    With orthonormal directions Q at w that are independent of the probe r,
    ``‖A‖² = ‖A Q‖² + E ‖A r − (A Q)(Qᵀ r)‖²``: the first term is known, only the rest is sampled. A node with at most
    as many entries as probes was given all unit vectors instead: its whole column of blocks is known.

    Args:
        names: Nodes v.
        probed: Responses to the probes at w, or to all unit vectors.
        directions: Responses to the directions Q at w; None if ``probed`` has all unit vectors.
        extract: The part.
        probes: m.
    """
    known: list[Tensor] = []
    random: list[Tensor] = []
    for v in names:
        response = extract(probed, v)
        if directions is None:
            known.append(response.square().sum((1, 2)))
            random.append(response.new_zeros(len(response), probes))
        else:
            fixed = extract(directions, v)
            rest = response - fixed @ (directions.vectors.mT @ probed.vectors)
            known.append(fixed.square().sum((1, 2)))
            random.append(rest.square().sum(1))
    return torch.stack(known), torch.stack(random)


def square_norm_samples(columns: Sequence[tuple[Tensor, Tensor]], complete: Tensor) -> Samples:
    """Samples of one part from both triangles.

    Args:
        columns: What :func:`column_samples` gives for each node w.
        complete: Which nodes were given all unit vectors, ``(n,)``.
    """
    known, random = (torch.stack(list(parts), 1) for parts in zip(*columns, strict=True))
    return Samples(_symmetric(known, complete), _symmetric(random, complete))


def _symmetric(values: Tensor, complete: Tensor) -> Tensor:
    """Entry [v, w], from products at w, and [w, v], from products at v, combined: a complete column is exact alone."""
    columns = complete.to(values.device).view(1, -1, *[1] * (values.ndim - 2)).expand_as(values)
    other = values.transpose(0, 1)
    mean = (values + other) / 2
    return torch.where(columns, values, torch.where(columns.transpose(0, 1), other, mean))


def jackknife(full: Tensor, without: Tensor) -> Tensor:
    """Standard error of an estimate from the estimates that leave one probe out, ``(…, m) -> (…)``."""
    m = without.shape[-1]
    deviation = without - full.unsqueeze(-1)  # exactly 0 for what no probe has a share in
    deviation = deviation - deviation.mean(-1, keepdim=True)
    return torch.where(torch.isfinite(full), ((m - 1) / m * deviation.square().sum(-1)).sqrt(), torch.nan)
