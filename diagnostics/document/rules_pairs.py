"""Rules about blocks of nodes: Gauss-Newton and what it leaves out, bandwidth, depth."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from diagnostics.document.figures import Figures, percent, reach
from diagnostics.document.values import number
from diagnostics.document.verdict import Finding, Rule

GN_SHARE, MOST, FACTOR, OWN_SOURCE, GAP, BAND = 0.5, 0.5, 1000.0, 0.5, 0.1, 0.5


def gauss_newton_misses(figures: Figures) -> Iterator[Finding]:
    """Networks at most of whose nodes the Gauss-Newton part of the diagonal block is the smaller one."""
    gap, margin = figures.metric("gn_gap").diagonal(), figures.margin("gn_gap").diagonal()
    resonance = figures.metric("resonance").diagonal()
    share = 1 / (1 + gap.square())
    missed = (share < GN_SHARE) & (resonance > 0)
    hit = [i for i in range(len(figures.nodes)) if missed[i]]
    measured = int((resonance > 0).sum())
    if measured < 2 or len(hit) <= MOST * measured:
        return
    worst = min(hit, key=lambda i: share[i].item())
    low = (gap - margin).clamp(min=0)
    sure = int((missed & (1 / (1 + low.square()) < GN_SHARE)).sum()) > MOST * measured
    nodes = tuple(figures.nodes[i] for i in hit)
    values = {
        "share": share[worst].item(),
        "gap": gap[worst].item(),
        "margin": margin[worst].item(),
        "shown": percent(share[worst].item()),
        "worst": figures.nodes[worst],
        "count": len(hit),
        "measured": measured,
    }
    yield "misses", nodes, values, sure


def bandwidth(figures: Figures) -> Iterator[Finding]:
    """The least distance beyond which no pair is coupled by more than ε, where that is half of the way at most."""
    coupling, margin, distance = figures.metric("coupling"), figures.margin("coupling"), figures.distance
    apart = (figures.metric("resonance") > 0) & ~torch.eye(len(figures.nodes), dtype=torch.bool)
    epsilon = figures.epsilon
    if not bool(apart.any()):
        return
    most = distance[apart].max().item()
    interacts = apart & (coupling > epsilon)
    radius = distance[interacts].max().item() if bool(interacts.any()) else 0.0
    beyond = apart & (distance > radius)
    sure = not bool((coupling + margin > epsilon)[beyond].any())
    rest = coupling[beyond].max().item() if bool(beyond.any()) else 0.0
    values = {"radius": radius, "epsilon": epsilon, "rest": rest, "diameter": most}
    if most >= 2 and radius <= BAND * most:
        share = _discarded(figures, radius)
        kept = "" if share is None else f", and {percent(share)} of the parameters' ‖H‖² is left out"
        yield "banded", (), values | {"k": f"{radius:g}", "discarded": share, "kept": kept}, sure


def _discarded(figures: Figures, bandwidth: float) -> float | None:
    """The share of the parameters' ‖H‖² beyond a distance, where it was measured."""
    rows = figures.sections.get("parameters", {}).get("discarded", [])
    within = [row for row in rows if number(row["bandwidth"]) <= bandwidth]
    return number(within[-1]["total"]) if within else None


def depth_profile(figures: Figures) -> Iterator[Finding]:
    """Resonance of the diagonal blocks as an exponential of depth, by least squares on its logarithm."""
    resonance, margin = figures.metric("resonance").diagonal(), figures.margin("resonance").diagonal()
    depth = torch.tensor([float(figures.depth[name]) for name in figures.nodes], dtype=torch.float64)
    kept = resonance > 0
    if int(kept.sum()) < 3 or depth[kept].unique().numel() < 3:
        return
    x, y = depth[kept] - depth[kept].mean(), resonance[kept].log()
    weights = x / x.square().sum()
    slope = (weights * y).sum().item()
    uncertain = (weights * margin[kept] / resonance[kept]).abs().sum().item()  # whatever the correlations are
    layers = (depth[kept].max() - depth[kept].min()).item()
    limit = math.log(FACTOR) / layers
    if abs(slope) <= limit:
        return
    order = torch.argsort(depth[kept])
    chosen = [name for name, keep in zip(figures.nodes, kept, strict=True) if keep]
    ends = resonance[kept][order[0]].item(), resonance[kept][order[-1]].item()
    values = {
        "factor": math.exp(abs(slope)),
        "whole": math.exp(abs(slope) * layers),
        "slope": slope,
        "margin": uncertain,
        "first": ends[0],
        "last": ends[1],
        "at_first": chosen[int(order[0])],
        "at_last": chosen[int(order[-1])],
    }
    nodes = (chosen[int(order[0])], chosen[int(order[-1])])
    yield "vanishing" if slope > 0 else "exploding", nodes, values, abs(slope) - uncertain > limit


def dominant_source(figures: Figures) -> Iterator[Finding]:
    """A node that makes more than half of the square norm of the tensor part, where that is not small."""
    section = figures.sections["sources"]
    ratio = number(figures.sections["metrics"]["gap_ratio"])
    shares = [number(value) for value in section["share"]]
    bending = {node["name"] for node in figures.sections["network"]["nodes"] if node["bends"]}
    if sum(source in bending for source in section["sources"]) < 3 or not ratio >= GAP:
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
        "resonance-over-depth",
        "warning",
        "Fitted to log R(v,v) against the depth of v, R changes by more than a factor of 1000 from the first to the "
        "last of three depths or more.",
        {"limit": FACTOR},
        "Thm 25, Cor. 26 and Eq. 8",
        {
            "vanishing": "curvature vanishes towards the input: {factor:.2g} times less a layer back, R = {first:.2g} "
            "at {at_first}, {last:.2g} at {at_last}; initialise for equal gains, or add skips or norms",
            "exploding": "curvature explodes towards the input: {factor:.2g} times more a layer back, R = {first:.2g} "
            "at {at_first}, {last:.2g} at {at_last}; initialise for equal gains, or add norms",
        },
        depth_profile,
        ("network", "metrics"),
    ),
    Rule(
        "gauss-newton-misses",
        "advice",
        "The share of GN in a diagonal block, |GN|²/(|GN|² + |T|²) = 1/(1 + Gap²), is below one half at more than "
        "half of two nodes or more.",
        {"limit": GN_SHARE, "nodes": MOST},
        "Thm 33 and the Gap of the paper's tables",
        {
            "misses": "GN explains less than half of the curvature at {count} of {measured} nodes, and {shown} at "
            "{worst}: use curvature='hessian'"
        },
        gauss_newton_misses,
        ("metrics",),
    ),
    Rule(
        "one-source",
        "note",
        "One node of three or more that bend makes more than half of |T|², where the ratio of sums |T|/|GN| is at "
        "least 0.1.",
        {"limit": OWN_SOURCE, "gap": GAP},
        "Thm 33; docs/sources.md",
        {"source": "the nonlinearity of {node} makes {shown} of what Gauss-Newton leaves out"},
        dominant_source,
        ("network", "metrics", "sources"),
    ),
    Rule(
        "bandwidth",
        "advice",
        "The interaction radius k, with C ≤ ε for all pairs farther apart than k, is at most half of the largest "
        "distance, which is 2 at least.",
        {"limit": BAND},
        "Def. 79 and Thm 44; docs/bounds.md, Interaction radius and band errors",
        {
            "banded": "recommended bandwidth {k} at ε = {epsilon:g}: C ≤ {rest:.2g} beyond, up to distance "
            "{diameter:g}{kept}"
        },
        bandwidth,
        ("metrics",),
    ),
)
