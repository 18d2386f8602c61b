"""How much memory blocks will take, known before anything is allocated."""

from __future__ import annotations

from collections import defaultdict

from diagnostics.autograd.tape import CHUNK_BYTES
from diagnostics.blocks.layout import Layout
from diagnostics.errors import MemoryBudgetError
from diagnostics.graph.dense_layer import DenseLayer
from diagnostics.graph.flatness import cannot_bend
from diagnostics.graph.graph import Graph


def planned_bytes(
    graph: Graph, layout: Layout, *, by_source: bool = False, averaged: bool = False, samples: int | None = None
) -> int:
    """Bytes that :func:`diagnostics.hessian_blocks` and its blocks take when they take most.

    Counted are, for each sample, local Jacobians, local curvatures, fronts, the Gauss-Newton factor and those of the
    sources, and what is needed on top of them by the differentiation or else by the products: all total Jacobians for
    blocks of single samples, those in use at one time and the results for batch means. Local curvatures that
    turn out to be zero are counted unless the node's tape shows it: the plan is an upper estimate.

    Args:
        graph: The network.
        layout: Which nodes have blocks.
        by_source: Count the factors of the sources.
        averaged: Count what ``blocks.mean()`` takes instead of blocks of single samples.
        samples: How many independent samples; None: those of the graph.
    """
    samples = layout.samples if samples is None else samples
    size = layout.sizes
    jacobians = curvatures = scratch = products = sources = kept_shares = 0
    flat: set[str] = set()
    ancestors: dict[str, set[str]] = {}
    for node in graph.nodes:
        own, parents = size[node.name], [size[p] for p in node.parents]
        width = sum(parents)
        ancestors[node.name] = set(node.parents).union(*(ancestors[p] for p in node.parents))
        layer = None if graph.coupled else DenseLayer.recognise(node, [graph[p] for p in node.parents])
        bends = not cannot_bend(node, [graph[p].value for p in node.parents])
        if layer is None or layer.activation is not None:  # otherwise its Jacobian is the weight
            jacobians += own * width
        if bends:
            curvatures += _triangle(parents)
        else:
            flat.add(node.name)
        if layer is None:  # cotangents, and products before and after their pieces are joined
            scratch = max([scratch, own * (own + 2 * width), *(p * (p + 2 * width) for p in parents)])
        if by_source and bends:
            sources += width**2 + width * sum(size[v] for v in ancestors[node.name])
            products = max(products, width)
            kept_shares += bool(parents)
    fronts = _fronts(graph, flat)
    rank = sum(size[p] for p in graph.loss_parents)
    columns = sum(size[v] for v in layout.names)
    factors = jacobians + rank**2 + rank * sum(size.values()) + sources
    factors += sum(size[u] * size[s] for u, others in fronts.items() for s in others)
    item = layout.like.element_size()
    vjp = min(CHUNK_BYTES, samples * item * scratch)
    before = samples * item * (curvatures + scratch) + vjp
    if averaged:
        of_one = layout.mean()
        results = (2 + kept_shares) * _triangle([of_one.sizes[v] for v in of_one.names])
        live = _live_rows(graph, layout, fronts) + 3 * max(rank, products) * columns
        after = item * (samples * live + results)
    else:
        largest = max(size[v] for v in layout.names)
        # total Jacobians serve the tensor part alone
        rows = sum(size[node.name] * layout.before(node.name) for node in graph.nodes) if any(fronts.values()) else 0
        after = samples * item * (rows + 4 * largest**2)  # a block, and what it is summed from
    return samples * item * factors + max(before, after)


def check_memory(needed: int, limit: int, layout: Layout, hint: str = "") -> None:
    """Refuse what would take more than ``limit`` bytes, with the figure and the way out."""
    if needed > limit:
        joint = "The samples are coupled, so the batch is one joint sample: a smaller batch helps."
        raise MemoryBudgetError(
            f"the blocks of {len(layout.names)} nodes take {needed / 2**30:.1f} GiB, more than the limit of "
            f"{limit / 2**30:.1f} GiB. {joint if layout.coupled else hint} Use fewer or smaller nodes, a smaller "
            "batch or `pairs`, or raise memory_limit."
        )


def _triangle(sizes: list[int]) -> int:
    """Entries of the blocks on and below the diagonal."""
    return (sum(sizes) ** 2 + sum(d * d for d in sizes)) // 2


def _fronts(graph: Graph, flat: set[str]) -> dict[str, set[str]]:
    """For every node those that its front has blocks with, if all but ``flat`` nodes bend: symbolic elimination."""
    near: dict[str, set[str]] = defaultdict(set)
    fronts: dict[str, set[str]] = {}
    for node in reversed(graph.nodes):
        fronts[node.name] = near.pop(node.name, set())
        others = fronts[node.name] - {node.name}
        bent = node.name not in flat or node.name in fronts[node.name]
        for p in node.parents:
            near[p] |= others | set(node.parents if bent else ())
        for s in others:
            near[s] -= {node.name}
            near[s] |= set(node.parents)
    return fronts


def _live_rows(graph: Graph, layout: Layout, fronts: dict[str, set[str]]) -> int:
    """Most entries of total Jacobians at one time, in a sweep through the nodes for batch means."""
    last = {p: node.name for node in graph.nodes for p in node.parents}
    needed = {s: v for v in layout.names for s in fronts[v]}
    live: dict[str, int] = {}
    most = 0
    for node in graph.nodes:
        u = node.name
        live[u] = layout.sizes[u] * layout.before(u)
        most = max(most, sum(live.values()))
        for s in list(live):
            if all(layout.position[use[s]] <= layout.position[u] for use in (last, needed) if s in use):
                del live[s]
    return most
