"""The network as a drawing: where its nodes are, its edges, and curvature highways between coupled nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import networkx as nx

from diagnostics.rendering.charts import finite
from diagnostics.rendering.pair_charts import pair_text
from diagnostics.rendering.text import short

LEAST_COUPLING = 0.05
MOST_HIGHWAYS = 60
_ROW, _LETTER, _HEIGHT, _GAP = 46.0, 7.3, 26.0, 26.0


@dataclass
class DrawnNode:
    """A node: its centre, its width, and what to say about it."""

    name: str
    label: str
    x: float
    y: float
    width: float
    about: str
    chosen: bool
    bends: bool
    left: float = field(init=False)
    right: float = field(init=False)
    height: float = _HEIGHT

    def __post_init__(self) -> None:
        self.left, self.right = self.x - self.width / 2, self.x + self.width / 2


@dataclass(frozen=True)
class DrawnEdge:
    """A path of SVG between two nodes."""

    start: str
    end: str
    path: str
    about: str = ""
    width: float = 0.0
    opacity: float = 0.0


@dataclass(frozen=True)
class Drawing:
    """Everything that the page draws of a network, in the units of ``width`` and ``height``."""

    nodes: list[DrawnNode]
    edges: list[DrawnEdge]
    highways: list[DrawnEdge]
    coupled: int
    left: float
    width: float
    height: float


def drawing(sections: Mapping[str, Any]) -> Drawing:
    """The network, inputs on top, in layers of longest paths; highways where C ≥ 0.05, the 60 strongest of them."""
    nodes = {node["name"]: node for node in sections["network"]["nodes"]}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((a, b) for a, b in sections["network"]["edges"] if a in nodes and b in nodes)
    rows = {name: float(layer) for layer, names in enumerate(nx.topological_generations(graph)) for name in names}
    labels = {name: short(name) for name in graph}
    widths = {name: 22 + _LETTER * max(len(label), 2) for name, label in labels.items()}
    slot = max(widths.values(), default=0.0) + _GAP
    across = _columns(graph)
    drawn = {
        name: DrawnNode(name, labels[name], across[name] * slot, rows[name] * _ROW + _ROW / 2, widths[name],
                        _about(nodes[name]), nodes[name]["chosen"], nodes[name]["bends"])
        for name in graph
    }  # fmt: skip
    edges = [_edge(drawn[a], drawn[b]) for a, b in graph.edges]
    highways, coupled = _highways(sections.get("metrics"), drawn)
    farthest = max((abs(rows[e.start] - rows[e.end]) for e in highways), default=0.0)
    longest = max((rows[b] - rows[a] for a, b in graph.edges), default=0.0)
    left = min((n.left for n in drawn.values()), default=0.0) - (_bulge(longest) if longest > 1 else 0.0) - 12
    right = max((n.right for n in drawn.values()), default=0.0) + (_bulge(farthest) if highways else 0.0) + 12
    height = (max(rows.values(), default=0.0) + 1) * _ROW
    return Drawing(list(drawn.values()), edges, highways, coupled, left, right - left, height)


def _columns(graph: nx.DiGraph[str]) -> dict[str, float]:
    """Columns about zero: nodes of a layer in the order of their parents' mean column, which avoids most crossings."""
    columns: dict[str, float] = {}
    for names in nx.topological_generations(graph):
        parents = {name: [columns[p] for p in graph.predecessors(name)] for name in names}
        ordered = sorted(names, key=lambda name: sum(parents[name]) / max(len(parents[name]), 1))
        columns |= {name: i - (len(ordered) - 1) / 2 for i, name in enumerate(ordered)}
    return columns


def _edge(a: DrawnNode, b: DrawnNode) -> DrawnEdge:
    down, up = a.y + a.height / 2, b.y - b.height / 2
    if b.y - a.y <= _ROW * 1.01:
        middle = (down + up) / 2
        path = f"M{a.x:.1f} {down:.1f}C{a.x:.1f} {middle:.1f} {b.x:.1f} {middle:.1f} {b.x:.1f} {up:.1f}"
    else:  # past other layers: around them on the left
        reach = min(a.left, b.left) - _bulge((b.y - a.y) / _ROW) / 0.75
        path = f"M{a.left:.1f} {a.y:.1f}C{reach:.1f} {a.y:.1f} {reach:.1f} {b.y:.1f} {b.left:.1f} {b.y:.1f}"
    return DrawnEdge(a.name, b.name, path)


def _highways(metrics: Any, drawn: Mapping[str, DrawnNode]) -> tuple[list[DrawnEdge], int]:
    if metrics is None:
        return [], 0
    names = metrics["nodes"]
    pairs = [(finite(metrics["coupling"][i][j]) or 0.0, i, j) for i, j in combinations(range(len(names)), 2)]
    coupled = sorted(p for p in pairs if p[0] >= LEAST_COUPLING and names[p[1]] in drawn and names[p[2]] in drawn)
    kept = coupled[-MOST_HIGHWAYS:]  # the strongest last, on top of the others
    thin = 1.0 if len(kept) <= MOST_HIGHWAYS / 2 else 0.6
    arcs = [_highway(drawn[names[i]], drawn[names[j]], min(c, 1.0), thin, pair_text(metrics, i, j)) for c, i, j in kept]
    return arcs, len(coupled)


def _highway(a: DrawnNode, b: DrawnNode, coupling: float, thin: float, about: str) -> DrawnEdge:
    reach = max(a.right, b.right) + _bulge(abs(b.y - a.y) / _ROW) / 0.75
    path = f"M{a.right:.1f} {a.y:.1f}C{reach:.1f} {a.y:.1f} {reach:.1f} {b.y:.1f} {b.right:.1f} {b.y:.1f}"
    if a.y == b.y:  # side by side: above what lies between
        top, above = a.y - a.height / 2, a.y - a.height / 2 - 12
        path = f"M{a.x:.1f} {top:.1f}C{a.x:.1f} {above:.1f} {b.x:.1f} {above:.1f} {b.x:.1f} {top:.1f}"
    return DrawnEdge(a.name, b.name, path, about, thin * (1 + 6 * coupling), thin * (0.12 + 0.68 * coupling))


def _bulge(rows: float) -> float:
    """How far an arc over so many layers goes aside: ever more slowly, or deep networks would be all arcs."""
    return 16 + 26 * math.pow(rows, 0.6)


def _about(node: Mapping[str, Any]) -> str:
    shape = "×".join(map(str, node["shape"][1:])) or "a number"
    lines = [node["name"], f"{node['kind'] or 'output'}, {shape}", f"{node['parameter_count']:,} parameters"]
    lines.append("bends" if node["bends"] else "piecewise linear")
    return "\n".join(lines)
