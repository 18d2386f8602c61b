"""The schema of a report, and a check that names the key that is wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diagnostics.errors import DiagnosticsError

SCHEMA = "hessopt-diagnostics/1"


@dataclass(frozen=True)
class Maybe:
    """The kind, or null."""

    kind: Any


@dataclass(frozen=True)
class ListOf:
    """A list of the kind."""

    kind: Any


@dataclass(frozen=True)
class MapOf:
    """An object with any keys, whose values are of the kind."""

    kind: Any


@dataclass(frozen=True)
class Optional:
    """An entry that may be absent."""

    kind: Any


@dataclass(frozen=True)
class ForEach:
    """A list of the kind, as long as the list ``of`` in the same object."""

    of: str
    kind: Any


@dataclass(frozen=True)
class OneOf:
    """One of these strings."""

    values: tuple[str, ...]


class _Number:
    """A number that a float holds, null for NaN, or ``"Infinity"`` or ``"-Infinity"``."""


class _Matrix:
    """Rows of numbers, as many as there are nodes in the nearest object that has nodes, each as long."""


NUMBER, MATRIX = _Number(), _Matrix()
NUMBERS = ListOf(NUMBER)
TABLE_METRICS = ("resonance", "coupling", "stable_rank", "gn_gap", "gn_norm", "tensor_norm")
"""What a table of pairs has in a matrix each, with an error each where it is estimated."""
_LEVELS = ("measured", "jacobian", "path", "depth", "count", "geometric")
_MEANS = ("resonance", "coupling", "stable_rank", "gn_gap", "gap_ratio")
_MOST_INTEGER = 2**63 - 1

_TABLE: dict[str, Any] = {
    "exact": bool,
    "nodes": ListOf(str),
    **dict.fromkeys((*TABLE_METRICS, "distance"), MATRIX),
    "errors": Maybe(dict.fromkeys(TABLE_METRICS, MATRIX)),
    "probes": Maybe(int),
    "products": Maybe(int),
    "gap_ratio": NUMBER,
    "gap_ratio_error": NUMBER,
    "by_distance": ListOf(
        {
            "pairs": int,
            **dict.fromkeys(("distance", *_MEANS), NUMBER),
            "errors": Maybe(dict.fromkeys(_MEANS, NUMBER)),
        }
    ),
}
_PART = {
    **dict.fromkeys(
        (
            *("largest", "largest_residual", "smallest", "smallest_residual", "trace", "trace_error"),
            *("negative_mass", "negative_mass_error", "absolute_sum", "negative_fraction"),
        ),
        NUMBER,
    ),
    "converged": bool,
    "products": int,
    "density": Maybe({"values": NUMBERS, "weights": ForEach("values", NUMBER), "probes": int, "steps": int}),
}
_NODE = {
    "name": str,
    "kind": Maybe(str),
    "shape": ListOf(int),
    "entries": int,
    "parents": ListOf(str),
    "children": ListOf(str),
    "parameters": ListOf(str),
    "parameter_count": int,
    "chosen": bool,
    "output": bool,
    "bends": bool,
    "gradient": Optional(NUMBER),
    "dead_units": Optional(NUMBER),
}
SECTION_SHAPES: dict[str, Any] = {
    "network": {
        "loss": NUMBER,
        "batch_size": int,
        "coupled": bool,
        "batch_norm_in_training": bool,
        "nodes": ListOf(_NODE),
        "edges": ListOf(ListOf(str)),
        "unused_parameters": ListOf(str),
    },
    "metrics": _TABLE,
    "sources": {
        "exact": bool,
        "sources": ListOf(str),
        "share": ForEach("sources", NUMBER),
        "share_error": Maybe(ForEach("sources", NUMBER)),
        "norm_ratio": ForEach("sources", NUMBER),
        "negative_share": Maybe(ForEach("sources", NUMBER)),
        "gn_negative_share": NUMBER,
        "negative_mass": NUMBER,
        "tensor_norm": NUMBER,
        "probes": Maybe(int),
    },
    "bounds": {
        "bottlenecks": ListOf({"node": str, "entries": int, "width": int, "cut": ListOf(str)}),
        "gains": Maybe(
            {"children": int, **dict.fromkeys(("rho", "rho_mean", "branch", "margin", "sharp_margin"), NUMBER)}
        ),
        "lyapunov": Maybe({"path": ListOf(str), "norm": NUMBER, "qr": NUMBER, "steps": int}),
        "a_priori_radius": NUMBER,
        "resonance": Maybe({"nodes": ListOf(str), **dict.fromkeys(_LEVELS, MATRIX)}),
        "ranks": Maybe({"nodes": ListOf(str), "part": str, "bound": MATRIX, "rank": MATRIX, "stable": MATRIX}),
        "reason": Maybe(str),
    },
    "spectrum": {
        "parameters": int,
        "loss": NUMBER,
        "gradient_norm": NUMBER,
        "exact": bool,
        "products": Maybe(int),
        **dict.fromkeys(("H", "GN", "T"), _PART),
        **dict.fromkeys(("sharpness", "stable_lr", "negative_ratio", "curvature_along_gradient"), NUMBER),
        **dict.fromkeys(("escape_length", "escape_gain"), Optional(NUMBER)),
    },
    "parameters": {
        **_TABLE,
        "sizes": ForEach("nodes", int),
        "groups": ForEach("nodes", ListOf(str)),
        "discarded": ListOf(
            dict.fromkeys(
                ("bandwidth", "total", "total_error", "gn", "gn_error", "tensor", "tensor_error"),
                NUMBER,
            )
        ),
    },
}
_VERDICT = {
    "rule": str,
    "wording": str,
    "level": OneOf(("note", "advice", "warning")),
    "nodes": ListOf(str),
    "text": str,
    "figures": MapOf(NUMBER),
    "significant": bool,
}
DOCUMENT: dict[str, Any] = {
    "schema": str,
    "name": str,
    "torch": str,
    "model": {"class": str, "parameters": int, "trainable": int, "dtype": str, "device": str, "training": bool},
    "data": {"batches": Maybe(int), "batch_size": int, "inputs": ListOf(ListOf(int))},
    "options": {"seed": int, "probes": int, "epsilon": NUMBER, "seconds": Optional(NUMBER)},
    "plan": {"exact": bool, "reason": str, "bytes": int, "operations": int, "nodes": str},
    "sections": {name: section if name == "network" else Optional(section) for name, section in SECTION_SHAPES.items()},
    "skipped": MapOf(str),
    "shortened": Optional(MapOf(str)),
    "failures": Optional(MapOf({"error": str, "text": str})),
    "seconds": MapOf(NUMBER),
    "verdicts": ListOf(_VERDICT),
}


def check(data: Any, where: str) -> None:
    """Raise a DiagnosticsError that names the first key at which ``data`` is not a report of this schema."""
    if not isinstance(data, Mapping) or "schema" not in data:
        raise DiagnosticsError(f'{where}: no report, it has no key "schema".')
    if data["schema"] != SCHEMA:
        raise DiagnosticsError(f'{where}: schema is {_shown(data["schema"])}, and this version reads "{SCHEMA}".')
    _check(data, DOCUMENT, where, 0)
    _check_graph(data["sections"]["network"], f"{where}.sections.network")


def _check_graph(network: Mapping[str, Any], where: str) -> None:
    """Nodes have names of their own and come after their parents; edges join them."""
    position: dict[str, int] = {}
    for i, node in enumerate(network["nodes"]):
        if node["name"] in position:
            raise DiagnosticsError(f"{where}.nodes[{i}].name: {_shown(node['name'])} is the name of another node too.")
        unknown = [parent for parent in node["parents"] if parent not in position]
        if unknown:
            raise DiagnosticsError(f"{where}.nodes[{i}].parents: {_shown(unknown[0])} is no node before this one.")
        position[node["name"]] = i
    for i, edge in enumerate(network["edges"]):
        if len(edge) != 2 or not position.get(edge[0], len(position)) < position.get(edge[1], -1):
            raise DiagnosticsError(f"{where}.edges[{i}]: expected the names of two nodes, the parent first.")


def _check(value: Any, kind: Any, where: str, size: int) -> None:
    if isinstance(kind, Maybe):
        if value is not None:
            _check(value, kind.kind, where, size)
    elif isinstance(kind, dict):
        _check_object(value, kind, where, size)
    elif isinstance(kind, MapOf):
        if not isinstance(value, Mapping):
            raise _wrong(where, "an object", value)
        for key, entry in value.items():
            _check(entry, kind.kind, f"{where}.{key}", size)
    elif isinstance(kind, ListOf):
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        for i, entry in enumerate(value):
            _check(entry, kind.kind, f"{where}[{i}]", size)
    elif isinstance(kind, _Matrix):
        _check(value, ListOf(NUMBERS), where, size)
        if len(value) != size or any(len(row) != size for row in value):
            raise DiagnosticsError(f"{where}: expected {size} × {size} numbers, one for each pair of nodes.")
    elif isinstance(kind, _Number):
        _check_number(value, where)
    elif isinstance(kind, OneOf):
        if not isinstance(value, str) or value not in kind.values:
            raise _wrong(where, f"one of {', '.join(kind.values)}", value)
    elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(where, {str: "a string", int: "an integer", bool: "true or false"}[kind], value)
    elif kind is int and abs(value) > _MOST_INTEGER:
        raise _wrong(where, "an integer of 64 bits", value)


def _check_number(value: Any, where: str) -> None:
    if value is None or (isinstance(value, str) and value in ("Infinity", "-Infinity")):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(where, "a number or null", value)
    if value != value:
        raise DiagnosticsError(f"{where}: NaN is written as null.")
    if not abs(value) <= sys.float_info.max:
        raise _wrong(where, 'a number that a float holds (infinity is written as "Infinity")', value)


def _check_object(value: Any, kind: Mapping[str, Any], where: str, size: int) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object", value)
    for key in value:
        if key not in kind:
            raise DiagnosticsError(f"{where}.{key}: no such key in the schema {SCHEMA}.")
    if "nodes" in kind:
        nodes = value.get("nodes")
        size = len(nodes) if isinstance(nodes, list) else 0
    for key, entry in kind.items():
        if key in value:
            _check(value[key], _plain(entry), f"{where}.{key}", size)
        elif not isinstance(entry, Optional):
            raise DiagnosticsError(f"{where}.{key}: missing.")
    for key, entry in kind.items():
        each = entry.kind if isinstance(entry, Maybe) else entry
        if isinstance(each, ForEach) and value[key] is not None and len(value[key]) != len(value[each.of]):
            raise DiagnosticsError(
                f"{where}.{key}: expected {len(value[each.of])} entries, as many as {each.of} has, "
                f"got {len(value[key])}."
            )


def _plain(entry: Any) -> Any:
    """The kind of an entry without what other entries say about it."""
    if isinstance(entry, Optional):
        return entry.kind
    if isinstance(entry, Maybe):
        return Maybe(_plain(entry.kind))
    return ListOf(entry.kind) if isinstance(entry, ForEach) else entry


def _wrong(where: str, expected: str, value: Any) -> DiagnosticsError:
    return DiagnosticsError(f"{where}: expected {expected}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    """A value of JSON for a message, whatever its size."""
    if isinstance(value, int) and value.bit_length() > 100:  # more digits than Python may be willing to print
        return "an integer of some hundred digits" if value.bit_length() < 2**12 else "a huge integer"
    if isinstance(value, (Mapping, list)):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    shown = repr(value)
    return shown if len(shown) < 40 else f"{shown[:39]}…"
