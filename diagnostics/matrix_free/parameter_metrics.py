"""The metrics of all pairs of groups of parameters from a few Hessian products, with standard errors."""

from __future__ import annotations

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.probes import Probe, generator_for
from diagnostics.graph.graph import Graph
from diagnostics.matrix_free.pair_estimates import Sampling, estimate_pairs
from diagnostics.matrix_free.pair_products import Responses
from diagnostics.operators.curvature import HessianOperator
from diagnostics.operators.parameter_groups import GroupSelection, ParameterGroups
from diagnostics.results.metric_table import MetricTable


def estimate_parameter_metrics(
    op: HessianOperator,
    groups: GroupSelection = None,
    probes: int = 30,
    *,
    generator: torch.Generator | None = None,
    distribution: Probe = "rademacher",
    deflate: int = 10,
    spectral_tolerance: float = 1e-2,
    spectral_rounds: int = 20,
    graph: Graph | None = None,
    distance: Tensor | None = None,
    memory_limit: int = 8 * 2**30,
) -> MetricTable:
    """Resonance, coupling, stable rank and Gauss-Newton gap of every pair of groups of parameters.

    The blocks are ``H[v,w] = ∂²L/∂θ_v∂θ_w`` of the operator's own loss, over all its batches. They are estimated by
    the same code as those of nodes, :func:`diagnostics.estimate_metrics`, which says how: a product with a probe at
    group w gives ``H[v,w] r`` of all groups v with its Gauss-Newton and tensor part. Groups of at most ``probes``
    entries get all unit vectors instead, and are exact.

    With ``deflate=0`` and ``spectral_rounds=0`` responses are not kept, but reduced to norms group by group: for large
    networks. D is then an upper bound, from ‖H‖₂ within the span of the probes, and its error says by how much it may
    be off to first order.

    Args:
        op: The Hessian of a model on one batch or several, of all parameters or of some.
        groups: None: one group for each module that owns parameters. ``"parameter"``: one for each tensor. Or a mapping
            from names to names or patterns of parameters. See
            :class:`diagnostics.operators.parameter_groups.ParameterGroups`, also for tied parameters.
        probes: m, random probes at each group, at least 3.
        generator: Source of the probes. None: a new one with seed 0; the global random state is never used.
        distribution: Of the entries of a probe: ``"rademacher"`` or ``"gaussian"``.
        deflate: Directions multiplied exactly at each group.
        spectral_tolerance: Relative growth of ‖H‖₂ in a round at which its iterations end.
        spectral_rounds: Rounds at most; 0: no iterations.
        graph: A capture of the same model: the distance of two groups is then that of the nearest two nodes computed
            from their parameters.
        distance: The distances themselves, ``(n, n)``. Neither: ``|i − j|`` in the order of the groups.
        memory_limit: Bytes for probes and responses, by plan.

    Returns:
        A :class:`diagnostics.MetricTable` whose ``nodes`` are the names of the groups, for
        :func:`diagnostics.matrix_free.discarded.discarded_share` too.

    Raises:
        TypeError: ``op`` is not a :class:`diagnostics.HessianOperator`.
        ValueError: an argument is out of range.
        DiagnosticsError: groups overlap or are empty, a pattern has no match, or the distances do not fit.
        MemoryBudgetError: responses would take more than ``memory_limit``.
    """
    if not isinstance(op, HessianOperator):
        raise TypeError(f"op must be a HessianOperator, which gives all parts of a product, got {type(op).__name__}.")
    sampling = Sampling(probes, distribution, deflate, spectral_tolerance, spectral_rounds)
    chosen = ParameterGroups(op, groups)
    distances = _distances(chosen, graph, distance)
    sampling.check_memory([chosen.size(name) for name in chosen.names], op.dtype.itemsize, memory_limit)
    products = GroupProducts(op, chosen)
    with torch.no_grad():
        estimates = estimate_pairs(products, sampling, generator_for(op, generator))
    return estimates.table(distances, products.products, products.passes)


class GroupProducts:
    """Products with vectors at a group of parameters, for all groups at once.

    Attributes:
        names: Of the groups.
        samples: 1.
        like: A tensor of the operator's dtype and device.
        products: Columns multiplied so far.
        passes: Of them, those for which the Gauss-Newton part was carried back on its own.
    """

    def __init__(self, op: HessianOperator, groups: ParameterGroups) -> None:
        self._op, self._groups = op, groups
        self.names = groups.names
        self.samples = 1
        self.like = torch.empty(0, dtype=op.dtype, device=op.device)
        self.products = self.passes = 0

    def size(self, name: str) -> int:
        """Entries of the group."""
        return self._groups.size(name)

    def respond(self, w: str, vectors: Tensor) -> Responses:
        """G and T times vectors ``(1, d_w, k)`` at group w; k may be 0."""
        if vectors.shape[2] == 0:
            nothing = self._gathered(vectors.new_empty(self._groups.space.size, 0))
            return Responses(vectors, nothing, nothing)
        self.products += vectors.shape[2]
        self.passes += vectors.shape[2]
        _, gn, tensor = self._op.products(self._groups.spread(w, vectors[0]))
        return Responses(vectors, self._gathered(gn), self._gathered(tensor))

    def total(self, w: str, vectors: Tensor) -> dict[str, Tensor]:
        """``H[v,w] X`` for all groups v, ``(1, d_w, k) -> (1, d_v, k)``."""
        self.products += vectors.shape[2]
        return self._gathered(self._op @ self._groups.spread(w, vectors[0]))

    def _gathered(self, columns: Tensor) -> dict[str, Tensor]:
        return {v: self._groups.gather(v, columns).unsqueeze(0) for v in self.names}


def _distances(groups: ParameterGroups, graph: Graph | None, distance: Tensor | None) -> Tensor:
    if graph is not None and distance is not None:
        raise ValueError("give either graph or distance: both say how far groups are apart.")
    if graph is not None:
        return graph_distance(graph, groups)
    if distance is None:
        return groups.order_distance()
    n = len(groups.names)
    if distance.shape != (n, n) or not torch.equal(distance, distance.mT):
        raise DiagnosticsError(
            f"distance must be a symmetric ({n}, {n}) tensor for the {n} groups, got shape {tuple(distance.shape)}."
        )
    return distance


def graph_distance(graph: Graph, groups: ParameterGroups) -> Tensor:
    """Length of the shortest undirected path between nodes that use parameters of either group, ``(n, n)``.

    Raises:
        DiagnosticsError: no node of the graph uses any parameter of a group.
    """
    users = []
    for group, names in groups.parameters.items():
        nodes = [i for i, node in enumerate(graph.nodes) if not set(names).isdisjoint(node.parameters)]
        if not nodes:
            raise DiagnosticsError(
                f"group {group!r} has no place in the graph: none of its nodes is computed from "
                f"{', '.join(map(repr, names[:3]))}. Pass the graph of the same model, or a distance."
            )
        users.append(nodes)
    distances = graph.distances
    return torch.stack([torch.stack([distances[v][:, w].amin() for w in users]) for v in users])
