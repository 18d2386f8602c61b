"""The metrics of all pairs of nodes from a few Hessian products, with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.probes import Probe
from diagnostics.graph.graph import Graph
from diagnostics.matrix_free.injections import Injections
from diagnostics.matrix_free.node_products import NodeProducts
from diagnostics.matrix_free.output_jacobians import OutputJacobians
from diagnostics.matrix_free.pair_estimates import Sampling, estimate_pairs
from diagnostics.matrix_free.pair_products import PairProducts, Share
from diagnostics.ranks.collectives import ranks_of
from diagnostics.results.metric_table import MetricTable


class ShardedGraph(NamedTuple):
    """A network captured in each of several processes, on its own samples of one batch.

    :func:`estimate_metrics` is then of all samples, the same in all processes, which have to call it together, with the
    same arguments. There is no ``per_sample`` and no ``exact_gn``.

    Attributes:
        graph: That of this process.
        group: The process group, such as ``ddp.process_group``. None: the default one.
        counts: False: the samples stand in for those that this process does not have, and count for nothing.
    """

    graph: Graph
    group: Any = None
    counts: bool = True


def estimate_metrics(
    graph: Graph | ShardedGraph,
    probes: int = 30,
    *,
    generator: torch.Generator | None = None,
    per_sample: bool = False,
    include_output: bool = False,
    distribution: Probe = "rademacher",
    deflate: int = 10,
    exact_gn: bool | None = None,
    spectral_tolerance: float = 1e-2,
    spectral_rounds: int = 20,
    memory_limit: int = 2**30,
    responses_limit: int = 8 * 2**30,
) -> MetricTable:
    """Resonance, coupling, stable rank and Gauss-Newton gap of every pair of nodes, estimated from Hessian products.

    For a random probe r with independent entries of mean 0 and variance 1, ``E ‖H[v,w] r‖² = ‖H[v,w]‖_F²``, and one
    product with r at node w gives ``H[v,w] r`` for all nodes v. So all n² pairs cost n·m products. What makes 30 probes
    enough:

    - The same probe serves H, its Gauss-Newton part G and its tensor part T.
    - Pair (v, w) is sampled by the probes at w and, transposed, by those at v.
    - ``deflate`` directions at each w, found in the responses to the probes at *other* nodes and therefore independent
      of those at w, are multiplied exactly; probes see only the rest (as in Hutch++).
    - Where the output has few entries, its Jacobians J[z←v] are computed once, in as many passes as it has entries.
      Then G r is a matrix product, ‖G‖ is exact, and the known error of ‖G‖² by the same probes corrects that of
      ‖H‖² and ‖T‖² (a control variate).
    - A node with at most ``probes`` entries a sample is given all unit vectors instead: its blocks are exact.

    ‖H‖₂ for the stable rank starts from all vectors multiplied so far and is refined by block power steps that all
    pairs share (:class:`diagnostics.matrix_free.shared_krylov.SharedKrylov`); it is a lower bound, so D is biased
    upwards by at most twice the tolerance where iterations have converged.

    Standard errors are those of the jackknife over the m probes: each probe left out in turn, at all nodes at once.
    That of D adds the last relative growth of ‖H‖₂. For a summary of many pairs, mind that errors of pairs that share
    a node are correlated.

    Args:
        graph: A captured network; or a :class:`ShardedGraph`, for the metrics of the samples of several processes.
        probes: m, random probes at each node, at least 3.
        generator: Source of the probes. None: a new one with seed 0; the global random state is never used.
        per_sample: As in :func:`diagnostics.metrics`: batch means of each sample's metrics instead of metrics of batch
            means. For batch means all samples share a probe, otherwise each has its own.
        include_output: Range over the model's output too, where it was not among the chosen nodes.
        distribution: Of the entries of a probe: ``"rademacher"`` or ``"gaussian"``.
        deflate: Directions multiplied exactly at each node; 0: the plain estimator of the paper.
        exact_gn: Compute the output's Jacobians. None: where samples are independent, the output has at most as many
            entries as there are probes at all nodes together, so that their passes are fewer than those they save, and
            they fit into ``memory_limit``.
        spectral_tolerance: Relative growth of ‖H‖₂ in a round at which its iterations end.
        spectral_rounds: Rounds at most; 0: no iterations, and D from the vectors multiplied anyway.
        memory_limit: Bytes that tangents multiplied at one time may take, by plan.
        responses_limit: Bytes that probes and responses may take besides, by plan: n² of them, with some 50 columns
            each. With ``deflate=0`` and ``spectral_rounds=0`` they are not kept, but reduced to norms node by node.

    Returns:
        A :class:`diagnostics.MetricTable` over the chosen nodes in topological order, with ``standard_errors`` and the
        number of products. Zero and NaN as in :func:`diagnostics.metrics`.

    Raises:
        ValueError: an argument is out of range.
        DiagnosticsError: a node has no second derivative; or ``per_sample=True`` or ``exact_gn=True`` with coupled
            samples, or with those of several processes.
        StaleGraphError: a parameter changed since the capture.

    Source: stochastic estimation as in arXiv 2604.11639 (30 probes, shared by H and GN), with the variance reduced.
    Deflation: Meyer, Musco, Musco, Woodruff, Hutch++ (2021).
    """
    share = None
    if isinstance(graph, ShardedGraph):
        share, graph = _share(graph, per_sample or bool(exact_gn)), graph.graph
    graph.check_fresh()
    sampling = Sampling(probes, distribution, deflate, spectral_tolerance, spectral_rounds)
    chosen = set(graph.chosen) | (set(graph.outputs) if include_output else set())
    index = [i for i, node in enumerate(graph.nodes) if node.name in chosen]
    names = tuple(graph.nodes[i].name for i in index)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    injections = Injections(graph, per_sample)
    sizes = [injections.samples * injections.size(name) for name in names]
    sampling.check_memory(sizes, graph.loss.element_size(), responses_limit, "responses_limit")
    before = dict(NodeProducts.of(graph).count)
    with torch.no_grad():
        wanted = exact_gn if share is None else False  # they are of this process's samples
        factors = _output_jacobians(graph, injections, names, probes, wanted, memory_limit)
        pairs = PairProducts(graph, names, injections, factors, memory_limit, share)
        exact = None if factors is None else factors.square_norms()
        estimates = estimate_pairs(pairs, sampling, generator, exact)
    count = {kind: columns - before[kind] for kind, columns in NodeProducts.of(graph).count.items()}
    return estimates.table(graph.distances[index][:, index], count["total"] + count["tensor"], count["vjp"])


def _share(sharded: ShardedGraph, local: bool) -> Share | None:
    ranks = ranks_of(group=sharded.group)
    if ranks.size == 1:
        return None
    if local:
        raise DiagnosticsError(
            "per_sample=True and exact_gn=True take the samples of one process. Leave them out, or pass the graph "
            "alone for the metrics of this process's own samples."
        )
    return Share(ranks, float(sharded.graph.batch_size * sharded.counts))


def _output_jacobians(
    graph: Graph, injections: Injections, names: Sequence[str], probes: int, wanted: bool | None, memory_limit: int
) -> OutputJacobians | None:
    if wanted is False:
        return None
    entries = sum(graph[name].value.numel() for name in graph.loss_parents)
    per_sample = entries // graph.batch_size
    if wanted is None:
        nodes = sum(graph[name].value.numel() for name in names)
        squares = len(names) * entries * (per_sample if injections.samples > 1 else entries)
        needed = (nodes * per_sample + squares) * graph.loss.element_size()
        if per_sample > probes * len(names) or needed > memory_limit:
            return None
    if graph.coupled:
        if wanted:
            raise DiagnosticsError(
                "exact_gn=True needs the output's Jacobians sample by sample, but the samples of this batch are "
                "coupled. Use exact_gn=None, or call model.eval() before the capture."
            )
        return None
    return OutputJacobians(NodeProducts.of(graph), injections, names)
