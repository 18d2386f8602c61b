"""Rules about pairs of nodes: modules, Gauss-Newton, bottlenecks, bandwidth, depth."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
import torch

from diagnostics.reporting.figures import Figures, named, percent, reach
from diagnostics.reporting.values import number
from diagnostics.verdicts import Finding, Rule

COUPLED, GN_SHARE, NARROW, FACTOR, OWN_SOURCE, GAP = 0.8, 0.5, 0.5, 2.0, 0.5, 0.1


def one_module(figures: Figures) -> Iterator[Finding]:
    """Runs of nodes, in topological order, all of whose pairs are coupled."""
    coupling, margin, nodes = figures.metric("coupling"), figures.margin("coupling"), figures.nodes
    i = 0
    while i < len(nodes):
        j = i
        while j + 1 < len(nodes) and bool((coupling[i : j + 1, j + 1] >= COUPLED).all()):
            j += 1
        if j > i:
            pairs = torch.triu_indices(j - i + 1, j - i + 1, 1) + i
            values, margins = coupling[pairs[0], pairs[1]], margin[pairs[0], pairs[1]]
            at = int(values.argmin())
            least, sure = values[at].item(), bool((values - margins >= COUPLED).all())
            run = nodes[i : j + 1]
            yield "module", run, {"which": named(run), "coupling": least, "margin": margins[at].item()}, sure
        i = j + 1


def gauss_newton_misses(figures: Figures) -> Iterator[Finding]:
    """Diagonal blocks of which the Gauss-Newton part is the smaller one."""
    gap, margin = figures.metric("gn_gap").diagonal(), figures.margin("gn_gap").diagonal()
    resonance = figures.metric("resonance").diagonal()
    share = 1 / (1 + gap.square())
    missed = (share < GN_SHARE) & (resonance > 0)
    hit = [i for i in range(len(figures.nodes)) if missed[i]]
    if not hit:
        return
    worst = min(hit, key=lambda i: share[i].item())
    low = (gap[worst] - margin[worst]).clamp(min=0)
    sure = bool(1 / (1 + low.square()) < GN_SHARE)
    nodes = tuple(figures.nodes[i] for i in hit)
    values = {
        "share": share[worst].item(),
        "gap": gap[worst].item(),
        "margin": margin[worst].item(),
        "shown": percent(share[worst].item()),
        "worst": figures.nodes[worst],
        "others": "" if len(hit) == 1 else f" (and less than half of {len(hit) - 1} more)",
    }
    yield "misses", nodes, values, sure


def bottlenecks(figures: Figures) -> Iterator[Finding]:
    """Nodes that squeeze: all paths from a node twice as wide pass them, and what follows is wider again."""
    network = figures.sections["network"]
    entries = {node["name"]: node["entries"] for node in network["nodes"]}
    graph: nx.DiGraph[str] = nx.DiGraph(network["edges"])
    graph.add_nodes_from(entries)
    ends = [node["name"] for node in network["nodes"] if node["output"]]
    reaching = set(ends).union(*(nx.ancestors(graph, end) for end in ends))
    ranks = figures.metric("stable_rank")
    for i, cut in enumerate(figures.nodes):
        width = entries[cut]
        if cut in ends:
            continue
        around = graph.subgraph(set(graph) - {cut})
        passing = set(ends).union(*(nx.ancestors(around, end) for end in ends))
        wide = [v for v in figures.nodes if v in reaching - passing - {cut} and width <= NARROW * entries[v]]
        later = [
            v for v in nx.descendants(graph, cut) if width <= NARROW * entries[v] or (v in ends and width < entries[v])
        ]
        if wide and later:
            own = ranks[i][~ranks[i].isnan()]
            measured = own.max().item() if own.numel() else None
            shown = "no curvature was measured there" if measured is None else f"measured at most {measured:.3g}"
            values = {"cut": cut, "width": width, "measured": measured, "shown": shown, "which": named(wide)}
            yield "bottleneck", (cut,), values, True


def bandwidth(figures: Figures) -> Iterator[Finding]:
    """The least distance beyond which no pair is coupled by more than ε."""
    coupling, margin, distance = figures.metric("coupling"), figures.margin("coupling"), figures.distance
    apart = (figures.metric("resonance") > 0) & ~torch.eye(len(figures.nodes), dtype=torch.bool)
    most, epsilon = distance[distance.isfinite()].max().item(), figures.epsilon
    interacts = apart & (coupling > epsilon)
    radius = distance[interacts].max().item() if bool(interacts.any()) else 0.0
    beyond = apart & (distance > radius)
    at = apart & interacts & (distance == radius)
    sure = not bool((coupling + margin > epsilon)[beyond].any())
    sure = sure and (radius == 0 or bool((coupling - margin > epsilon)[at].any()))
    rest = coupling[beyond].max().item() if bool(beyond.any()) else 0.0
    values = {"radius": radius, "epsilon": epsilon, "rest": rest, "diameter": most}
    if radius < most:
        share = _discarded(figures, radius)
        kept = "" if share is None else f", and {percent(share)} of the parameters' ‖H‖² is left out"
        yield "banded", (), values | {"k": f"{radius:g}", "discarded": share, "kept": kept}, sure
    elif most >= 2:
        least = coupling[at].max().item()
        yield "full", (), values | {"far": least}, sure


def _discarded(figures: Figures, bandwidth: float) -> float | None:
    """The share of the parameters' ‖H‖² beyond a distance, where it was measured."""
    rows = figures.sections.get("parameters", {}).get("discarded", [])
    within = [row for row in rows if number(row["bandwidth"]) <= bandwidth]
    return number(within[-1]["total"]) if within else None


def depth_profile(figures: Figures) -> Iterator[Finding]:
    """Resonance of the diagonal blocks as a power of depth, by least squares on its logarithm."""
    resonance, margin = figures.metric("resonance").diagonal(), figures.margin("resonance").diagonal()
    depth = torch.tensor([float(figures.depth[name]) for name in figures.nodes], dtype=torch.float64)
    kept = resonance > 0
    if int(kept.sum()) < 3 or depth[kept].unique().numel() < 3:
        return
    x, y = depth[kept] - depth[kept].mean(), resonance[kept].log()
    weights = x / x.square().sum()
    slope = (weights * y).sum().item()
    uncertain = (weights * margin[kept] / resonance[kept]).abs().sum().item()  # whatever the correlations are
    limit = torch.tensor(FACTOR, dtype=torch.float64).log().item()
    if abs(slope) <= limit:
        return
    order = torch.argsort(depth[kept])
    chosen = [name for name, keep in zip(figures.nodes, kept, strict=True) if keep]
    ends = resonance[kept][order[0]].item(), resonance[kept][order[-1]].item()
    values = {
        "factor": torch.tensor(abs(slope)).exp().item(),
        "slope": slope,
        "margin": uncertain,
        "first": ends[0],
        "last": ends[1],
        "at_first": chosen[int(order[0])],
        "at_last": chosen[int(order[-1])],
    }
    nodes = (chosen[int(order[0])], chosen[int(order[-1])])
    yield "vanishing" if slope > 0 else "exploding", nodes, values, abs(slope) - uncertain > limit


def dead(figures: Figures) -> Iterator[Finding]:
    """Nodes whose own block is zero."""
    resonance = figures.metric("resonance").diagonal()
    nodes = tuple(name for name, r in zip(figures.nodes, resonance.tolist(), strict=True) if r == 0)
    if nodes:
        verb = "has" if len(nodes) == 1 else "have"
        yield "dead", nodes, {"which": named(nodes), "count": len(nodes), "verb": verb}, True


def dominant_source(figures: Figures) -> Iterator[Finding]:
    """A node that makes more than half of the square norm of the tensor part, where that is not small."""
    section = figures.sections["sources"]
    ratio = number(figures.sections["metrics"]["gap_ratio"])
    shares = [number(value) for value in section["share"]]
    if not shares or len(section["sources"]) < 2 or not ratio >= GAP:
        return
    top = max(range(len(shares)), key=lambda i: shares[i])
    if shares[top] > OWN_SOURCE:
        error = 0.0 if section["share_error"] is None else number(section["share_error"][top])
        margin = reach(section["probes"]) * error
        node = section["sources"][top]
        values = {
            "node": node,
            "share": shares[top],
            "margin": margin,
            "gap_ratio": ratio,
            "shown": percent(shares[top]),
        }
        yield "source", (node,), values, shares[top] - margin > OWN_SOURCE


PAIR_RULES = (
    Rule(
        "dead-node",
        "warning",
        "R(v,v) = 0: the block of a node with itself is exactly zero.",
        {},
        "Def. 23; docs/recursion.md, Non-smooth points",
        {
            "dead": "{which} {verb} no curvature at all: dead units, a loss that is linear behind, or no path to the "
            "loss"
        },
        dead,
        ("metrics",),
    ),
    Rule(
        "resonance-over-depth",
        "warning",
        "Fitted to log R(v,v) against the depth of v, R changes by more than a factor of 2 a layer, over three depths "
        "or more.",
        {"limit": FACTOR},
        "Thm 25, Cor. 26 and Eq. 8",
        {
            "vanishing": "curvature vanishes towards the input: {factor:.2g} times less a layer back, R = {first:.2g} "
            "at {at_first}, {last:.2g} at {at_last}",
            "exploding": "curvature explodes towards the input: {factor:.2g} times more a layer back, R = {first:.2g} "
            "at {at_first}, {last:.2g} at {at_last}",
        },
        depth_profile,
        ("network", "metrics"),
    ),
    Rule(
        "gauss-newton-misses",
        "advice",
        "The share of GN in a diagonal block, |GN|²/(|GN|² + |T|²) = 1/(1 + Gap²), is below one half.",
        {"limit": GN_SHARE},
        "Thm 33 and the Gap of the paper's tables",
        {
            "misses": "GN explains {shown} of the block of {worst}{others}: use curvature='hessian' or check the "
            "activation"
        },
        gauss_newton_misses,
        ("metrics",),
    ),
    Rule(
        "one-source",
        "note",
        "One node makes more than half of |T|², where the ratio of sums |T|/|GN| is at least 0.1.",
        {"limit": OWN_SOURCE, "gap": GAP},
        "Thm 33; docs/sources.md",
        {"source": "the nonlinearity of {node} makes {shown} of what Gauss-Newton leaves out"},
        dominant_source,
        ("metrics", "sources"),
    ),
    Rule(
        "one-module",
        "note",
        "Nodes that follow each other in topological order and all of whose pairs have C of at least 0.8.",
        {"limit": COUPLED},
        "Def. 23 (C, invariant under rescaling by Thm 44)",
        {"module": "{which} act as one module: C = {coupling:.2f} at least"},
        one_module,
        ("metrics",),
    ),
    Rule(
        "bottleneck",
        "note",
        "A node with at most half the entries of a node before it from which all paths to the loss pass it, and with "
        "at most half the entries of one behind it, or fewer than the output.",
        {"limit": NARROW},
        "Prop. 31 and Remark 60; docs/bounds.md, Rank",
        {
            "bottleneck": "bottleneck at {cut}: D ≤ {width} with any node ({shown}); GN blocks of one sample at "
            "{which} have rank {width} at most"
        },
        bottlenecks,
        ("network", "metrics"),
    ),
    Rule(
        "bandwidth",
        "advice",
        "The interaction radius k: C ≤ ε for all pairs farther apart than k.",
        {},
        "Def. 79 and Thm 44; docs/bounds.md, Interaction radius and band errors",
        {
            "banded": "recommended bandwidth {k} at ε = {epsilon:g}: C ≤ {rest:.2g} beyond{kept}",
            "full": "no band is enough at ε = {epsilon:g}: C = {far:.2g} at the largest distance, {diameter:g}; "
            "bandwidth='full'",
        },
        bandwidth,
        ("metrics",),
    ),
)
