"""Norms of all blocks of a matrix that is known by products, with standard errors, and the metrics that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from diagnostics.estimators.probes import Probe
from diagnostics.matrix_free.pair_products import Pairs, Responses
from diagnostics.matrix_free.shared_krylov import Leading, SharedKrylov, leading, without_products
from diagnostics.matrix_free.square_norms import Extract, Samples, column_samples, jackknife, square_norm_samples
from diagnostics.results.metric_table import MetricErrors, MetricTable
from diagnostics.results.pair_formulas import metrics_of_norms

_PARTS: dict[str, Extract] = {"H": Responses.total, "G": lambda r, v: r.gn[v], "T": lambda r, v: r.tensor[v]}


@dataclass(frozen=True)
class Sampling:
    """How blocks are sampled.

    Attributes:
        probes: m, random probes at each node, at least 3.
        distribution: Of their entries.
        deflate: Directions multiplied exactly at each node.
        spectral_tolerance: Relative growth of ‖H‖₂ in a round at which its iterations end.
        spectral_rounds: Rounds at most.

    Raises:
        ValueError: one is out of range.
    """

    probes: int
    distribution: Probe
    deflate: int
    spectral_tolerance: float
    spectral_rounds: int

    def __post_init__(self) -> None:
        if self.probes < 3:
            raise ValueError(f"probes must be at least 3, so that there is a standard error, got {self.probes}.")
        if self.distribution not in ("rademacher", "gaussian"):
            raise ValueError(f'distribution must be "rademacher" or "gaussian", got {self.distribution!r}.')
        if self.deflate < 0 or self.spectral_rounds < 0 or not self.spectral_tolerance > 0:
            raise ValueError(
                f"deflate and spectral_rounds must be at least 0 and spectral_tolerance more than 0, got "
                f"{self.deflate}, {self.spectral_rounds} and {self.spectral_tolerance}."
            )

    @property
    def streams(self) -> bool:
        """Whether the responses to the probes at one node are not needed once those at the next are there."""
        return self.deflate == 0 and self.spectral_rounds == 0

    def planned_bytes(self, sizes: Sequence[int], item: int) -> int:
        """Bytes of probes and responses, of G, T, H and their copies, at nodes or groups of these sizes.

        Responses to the probes at all nodes, or, where they are streamed, at one; and then a vector for each pair.
        """
        n, m, vector = len(sizes), min(self.probes, max(sizes)), sum(sizes) * item
        return (8 * m + n) * vector if self.streams else (3 * n * (m + self.deflate) + 8 * m) * vector

    def within(self, sizes: Sequence[int], item: int, limit: int) -> Sampling:
        """The same, or what of it fits into ``limit`` bytes: no responses kept, then fewer probes as well.

        Raises:
            MemoryBudgetError: not even 3 probes fit.
        """
        if self.planned_bytes(sizes, item) <= limit:
            return self
        vector = sum(sizes) * item
        fitting = (limit // max(vector, 1) - len(sizes)) // 8
        fewer = replace(self, probes=max(3, min(self.probes, fitting)), deflate=0, spectral_rounds=0)
        fewer.check_memory(sizes, item, limit)
        return fewer

    def check_memory(self, sizes: Sequence[int], item: int, limit: int, name: str = "memory_limit") -> None:
        """Refuse what does not fit into ``limit`` bytes, with the figure and the way out."""
        needed = self.planned_bytes(sizes, item)
        if needed <= limit:
            return
        streamed = replace(self, deflate=0, spectral_rounds=0).planned_bytes(sizes, item)
        keeps = f"Use deflate=0 and spectral_rounds=0, which keep no responses and take {_size(streamed)}; or "
        raise MemoryBudgetError(
            f"{len(sizes)} groups or nodes with {self.probes} probes each, in vectors of {sum(sizes)} entries, take "
            f"{_size(needed)}, more than the limit of {_size(limit)}. {'Use ' if self.streams else keeps}fewer groups "
            f"or nodes, fewer probes, or a larger {name}."
        )

    def draw(self, pairs: Pairs, w: str, generator: torch.Generator) -> Tensor:
        """Random probes at w, ``(S, d, m)``, or all unit vectors where these are not more."""
        size, like = pairs.size(w), pairs.like
        if size <= self.probes:
            return torch.eye(size, dtype=like.dtype, device=like.device).expand(pairs.samples, -1, -1)
        values = torch.empty(pairs.samples, size, self.probes, dtype=like.dtype, device=generator.device)
        if self.distribution == "gaussian":
            values.normal_(generator=generator)
        else:
            values.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        return values.to(like.device)


def _size(count: int) -> str:
    return f"{count / 2**30:.2g} GiB" if count >= 2**28 else f"{count / 2**20:.2g} MiB"


@dataclass(frozen=True, eq=False)
class PairEstimates:
    """Estimates of all pairs of ``names``; made by :func:`estimate_pairs`.

    Attributes:
        names: Nodes, or groups of parameters.
        probes: m.
        squares: ``‖·‖_F²`` of H, G and T: from all probes ``(n, n, S)``, and from all but one ``(n, n, S, m)``.
        spectral: ``‖H‖₂``, ``(n, n, S)``, a lower bound.
        missing: By what share of itself it may still grow.
    """

    names: tuple[str, ...]
    probes: int
    squares: Mapping[str, tuple[Tensor, Tensor]]
    spectral: Tensor
    missing: Tensor

    def table(self, distance: Tensor, products: int, passes: int) -> MetricTable:
        """The metrics and their standard errors, means over samples."""
        total, gn, tensor = (self.squares[part][0].sqrt() for part in _PARTS)
        table = MetricTable.from_norms(self.names, total, gn, tensor, self.spectral, distance)
        rest, gn_rest, tensor_rest = (self.squares[part][1].sqrt() for part in _PARTS)
        one_less = metrics_of_norms(rest, gn_rest, tensor_rest, self.spectral.unsqueeze(-1))
        without = {name: values.mean(2) for name, values in one_less.items()}
        errors = {name: jackknife(getattr(table, name), values) for name, values in without.items()}
        grown = (2 * self.missing * (total / self.spectral).square()).mean(2)
        errors["stable_rank"] = (errors["stable_rank"].square() + grown.square()).sqrt()
        kept = {name: without[name] for name in ("resonance", "gn_norm", "tensor_norm")}
        found = MetricErrors(**errors, probes=self.probes, products=products, passes=passes, leave_one_out=kept)
        return replace(table, standard_errors=found)


def estimate_pairs(
    pairs: Pairs, sampling: Sampling, generator: torch.Generator, exact_gn: Tensor | None = None
) -> PairEstimates:
    """Probe every node; see :func:`diagnostics.estimate_metrics`.

    Args:
        pairs: The matrix of blocks.
        sampling: How.
        generator: Source of the probes.
        exact_gn: ``‖G[v,w]‖_F²``, ``(n, n, S)``, where it is known.
    """
    if sampling.streams:
        samples, spectral, missing = _streamed(pairs, sampling, generator)
    else:
        samples, spectral, missing = _deflated(pairs, sampling, generator)
    total, gn, tensor = (samples[part] for part in _PARTS)
    if exact_gn is None:
        squares = {part: samples[part].estimates() for part in _PARTS}
    else:
        known = Samples(exact_gn, torch.zeros_like(gn.random))
        squares = {
            "H": total.controlled(gn, exact_gn),
            "G": known.estimates(),
            "T": tensor.controlled(gn, exact_gn),
        }
    return PairEstimates(pairs.names, sampling.probes, squares, spectral, missing)


def _streamed(
    pairs: Pairs, sampling: Sampling, generator: torch.Generator
) -> tuple[dict[str, Samples], Tensor, Tensor]:
    """One node after another, nothing kept but numbers, the probes and a vector for each pair."""
    columns: dict[str, list[tuple[Tensor, Tensor]]] = {part: [] for part in _PARTS}
    vectors: dict[str, Tensor] = {}
    tops: dict[str, Leading] = {}
    for w in pairs.names:
        probed = pairs.respond(w, sampling.draw(pairs, w, generator))
        nothing = None if _complete(pairs, sampling, w) else pairs.respond(w, probed.vectors[..., :0])
        for part, extract in _PARTS.items():
            columns[part].append(column_samples(pairs.names, probed, nothing, extract, sampling.probes))
        scale = 1 / probed.vectors.norm(dim=1, keepdim=True)
        vectors[w] = probed.vectors * scale
        tops[w] = leading(vectors[w], {v: probed.total(v) * scale for v in pairs.names})
    return _samples(pairs, sampling, columns), *without_products(vectors, tops)


def _deflated(
    pairs: Pairs, sampling: Sampling, generator: torch.Generator
) -> tuple[dict[str, Samples], Tensor, Tensor]:
    """All nodes, then the directions that the responses of all nodes show, then iterations for ‖H‖₂."""
    probed = {w: pairs.respond(w, sampling.draw(pairs, w, generator)) for w in pairs.names}
    directions = {
        w: pairs.respond(w, _leading_directions(probed, w, sampling.deflate))
        for w in pairs.names
        if not _complete(pairs, sampling, w)
    }
    columns = {
        part: [column_samples(pairs.names, r, directions.get(w), extract, sampling.probes) for w, r in probed.items()]
        for part, extract in _PARTS.items()
    }
    vectors, products = {}, {}
    for w, responses in probed.items():
        scale = 1 / responses.vectors.norm(dim=1, keepdim=True)
        more = [directions[w]] if w in directions else []
        vectors[w] = torch.cat([responses.vectors * scale, *(r.vectors for r in more)], 2)
        products[w] = {v: torch.cat([responses.total(v) * scale, *(r.total(v) for r in more)], 2) for v in pairs.names}
    krylov = SharedKrylov(vectors, products, pairs.total)
    spectral = krylov.run(sampling.spectral_tolerance, sampling.spectral_rounds)
    return _samples(pairs, sampling, columns), *spectral


def _samples(
    pairs: Pairs, sampling: Sampling, columns: Mapping[str, list[tuple[Tensor, Tensor]]]
) -> dict[str, Samples]:
    complete = torch.tensor([_complete(pairs, sampling, w) for w in pairs.names], device=pairs.like.device)
    return {part: square_norm_samples(found, complete) for part, found in columns.items()}


def _complete(pairs: Pairs, sampling: Sampling, w: str) -> bool:
    return pairs.size(w) <= sampling.probes


def _leading_directions(probed: Mapping[str, Responses], w: str, count: int) -> Tensor:
    """Orthonormal directions at w that carry most of the blocks, from the responses to probes at other nodes."""
    vectors = probed[w].vectors
    responses = [r for v, other in probed.items() if v != w for r in (other.total(w), other.tensor[w])]
    if not responses or count == 0:
        return vectors[..., :0]
    scales = [r.square().sum((1, 2), keepdim=True).sqrt() for r in responses]
    stacked = torch.cat([r / torch.where(s > 0, s, 1) for r, s in zip(responses, scales, strict=True)], 2)
    directions, sizes, _ = torch.linalg.svd(stacked, full_matrices=False)
    rounding = sizes[..., :1] * torch.finfo(sizes.dtype).eps * max(stacked.shape[1:])
    kept: Tensor = directions[..., :count] * (sizes > rounding)[..., :count].unsqueeze(-2)
    return kept
