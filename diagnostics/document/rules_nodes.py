"""Rules about single nodes: dead units, outputs that nothing reads, no curvature, bottlenecks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx

from diagnostics.document.figures import Figures, named, percent
from diagnostics.document.values import number
from diagnostics.document.verdict import Finding, Rule

NARROW, DEAD, FEW = 0.5, 0.5, 8


def dead_units(figures: Figures) -> Iterator[Finding]:
    """Nodes most of whose units do nothing on this batch."""
    network = figures.sections["network"]
    shares = {node["name"]: number(node.get("dead_units")) for node in network["nodes"] if not _unread(node)}
    hit = [name for name, share in shares.items() if share > DEAD]
    if hit and network["batch_size"] >= FEW:
        worst = max(hit, key=lambda name: shares[name])
        others = "" if len(hit) == 1 else f" (and more than half of {len(hit) - 1} more)"
        values = {"share": shares[worst], "shown": percent(shares[worst]), "worst": worst, "others": others}
        yield "dead", tuple(hit), values | {"count": len(hit), "batch_size": network["batch_size"]}, True


def unread(figures: Figures) -> Iterator[Finding]:
    """Nodes from which no path leads to the loss."""
    names = tuple(node["name"] for node in figures.sections["network"]["nodes"] if _unread(node))
    if names:
        verb = "does" if len(names) == 1 else "do"
        yield "unread", names, {"which": named(names), "count": len(names), "verb": verb}, True


def no_curvature(figures: Figures) -> Iterator[Finding]:
    """Nodes at which a gradient arrives, and whose own block is zero nevertheless."""
    resonance = dict(zip(figures.nodes, figures.metric("resonance").diagonal().tolist(), strict=True))
    gradients = {node["name"]: number(node.get("gradient")) for node in figures.sections["network"]["nodes"]}
    names = tuple(name for name, r in resonance.items() if r == 0 and gradients[name] > 0)
    if names:
        verb = "has" if len(names) == 1 else "have"
        yield "linear", names, {"which": named(names), "count": len(names), "verb": verb}, True


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


def _unread(node: dict[str, Any]) -> bool:
    return "gradient" in node and node["gradient"] is None


NODE_RULES = (
    Rule(
        "dead-units",
        "warning",
        "More than half of a node's units (entries of a vector, channels of an image) have the same value at all "
        "samples and places, or a gradient of exactly zero at all of them; at batches of 8 samples or more.",
        {"limit": DEAD, "batch": FEW},
        "Lu et al. 2020; docs/recursion.md, Non-smooth points",
        {
            "dead": "{shown} of the units of {worst}{others} are dead on this batch of {batch_size}: constant, or no "
            "gradient arrives; check initialisation, biases and step length"
        },
        dead_units,
        ("network",),
    ),
    Rule(
        "unread-output",
        "note",
        "No path leads from a node to the loss.",
        {},
        "docs/recursion.md",
        {"unread": "{which} {verb} not reach the loss: an output that the loss does not use"},
        unread,
        ("network",),
    ),
    Rule(
        "no-curvature",
        "warning",
        "R(v,v) = 0 exactly, though the gradient at the node is not zero.",
        {},
        "Def. 23",
        {
            "linear": "{which} {verb} a gradient but no curvature: what follows is linear, the loss too; no "
            "second-order method can choose a step there"
        },
        no_curvature,
        ("network", "metrics"),
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
)
