"""A report as text, in at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diagnostics.document.values import number
from diagnostics.document.verdict import Verdict
from diagnostics.results.text_table import format_table

WIDTH = 100
_LONGEST_NAME = 20
_MOST_ROWS = 15
_SHOWN = {"resonance": "R", "coupling": "C", "stable_rank": "D", "gn_gap": "Gap"}


def text_of(report: Mapping[str, Any]) -> str:
    """The whole report: what it is of, verdicts, and a table for each section."""
    parts = [_title(report), *_failures(report), _verdicts(report["verdicts"])]
    for name, show in _SECTIONS.items():
        if name in report["sections"]:
            parts.append(show(report["sections"][name]))
    parts += [wrapped(f"{name}: left out. {why}") for name, why in report["skipped"].items()]
    parts += [wrapped(f"{name}: shortened. {why}") for name, why in report.get("shortened", {}).items()]
    seconds = ", ".join(f"{name} {number(s):.1f}" for name, s in report["seconds"].items())
    parts.append(wrapped(f"seconds: {seconds}"))
    return "\n\n".join(parts)


def wrapped(text: str, indent: str = "") -> str:
    """Lines of at most :data:`WIDTH` columns."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def short(name: str) -> str:
    """A name that fits into a column: the end says most."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def figure(value: Any, error: Any = None) -> str:
    """A number with three digits, and its standard error where there is one."""
    if value is None:
        return "-"
    shown = f"{number(value):.3g}"
    return shown if error is None or number(error) == 0 else f"{shown} ± {number(error):.1g}"


def _title(report: Mapping[str, Any]) -> str:
    model, data, plan, options = (report[key] for key in ("model", "data", "plan", "options"))
    title = f"Curvature of {report['name']}: {model['class']}, {model['parameters']:,} parameters, {model['dtype']}"
    mode = "training" if model["training"] else "evaluation"
    batches = "several batches" if data["batches"] is None else f"{data['batches']} batches"
    several = "" if data["batches"] == 1 else f", of {batches}; sections about nodes are of the first"
    how = "exact" if plan["exact"] else f"estimated, {options['probes']} probes a node, ± one standard error"
    lines = [
        title,
        f"{mode} mode on {model['device']}, batch of {data['batch_size']}{several}",
        f"blocks between nodes: {how} ({plan['reason']}); nodes: {plan['nodes']}",
    ]
    heading = "\n".join(wrapped(line) for line in lines)
    return f"{heading}\n{'=' * WIDTH}"


def _failures(report: Mapping[str, Any]) -> list[str]:
    """What is missing because it failed: said first, since verdicts that need it are silent."""
    failures = report.get("failures", {})
    lines = [wrapped(f"! {name}: {why['error']}: {why['text']}", "  ") for name, why in failures.items()]
    return [_section("Failed sections, on which there are no verdicts", "\n".join(lines))] if lines else []


def _verdicts(entries: Sequence[Mapping[str, Any]]) -> str:
    found = [str(Verdict(**{**entry, "nodes": tuple(entry["nodes"])})) for entry in entries]
    return _section("Verdicts", "\n".join(wrapped(line, "  ") for line in found) or "none of the rules applies")


def _network(section: Mapping[str, Any]) -> str:
    nodes = section["nodes"]
    rows = [
        [
            short(node["name"]),
            str(node["kind"] or "output"),
            "×".join(map(str, node["shape"][1:])) or "-",
            f"{node['parameter_count']:,}",
            _few([short(p) for p in node["parents"]]) or "-",
            "yes" if node["bends"] else "no",
        ]
        for node in nodes
    ]
    table = _table(["node", "module", "shape", "parameters", "parents", "bends"], rows)
    return _section(f"Network: {len(nodes)} nodes, loss {figure(section['loss'])}", table)


def _metrics(section: Mapping[str, Any]) -> str:
    title = f"Metrics of pairs of nodes; sum of |H^T| / sum of |H^GN| = {figure(*_gap(section))}"
    return _section(title, f"{_by_distance(section)}\n\n{_pairs(section)}")


def _gap(section: Mapping[str, Any]) -> tuple[Any, Any]:
    return section["gap_ratio"], section["gap_ratio_error"]


def _by_distance(section: Mapping[str, Any], without: str = "") -> str:
    names = {name: symbol for name, symbol in _SHOWN.items() if name != without} | {"gap_ratio": "Gap (ratio of sums)"}
    rows = [
        [
            f"{number(row['distance']):g}",
            str(row["pairs"]),
            *(figure(row[name], row["errors"] and row["errors"][name]) for name in names),
        ]
        for row in section["by_distance"]
    ]
    return _table(["distance", "pairs", *names.values()], rows)


def _pairs(section: Mapping[str, Any]) -> str:
    nodes, errors = section["nodes"], section["errors"]
    pairs = [(i, j) for i in range(len(nodes)) for j in range(i, len(nodes))]
    title = []
    if len(pairs) > _MOST_ROWS:
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        pairs.sort(key=lambda p: -number(section["coupling"][p[0]][p[1]] or 0))
        title = [f"the {_MOST_ROWS} most coupled of {len(pairs)} pairs:"]
        pairs = pairs[:_MOST_ROWS]
    rows = [
        [
            short(nodes[i]),
            short(nodes[j]),
            f"{number(section['distance'][i][j]):g}",
            *(figure(section[name][i][j], errors and errors[name][i][j]) for name in _SHOWN),
        ]
        for i, j in pairs
    ]
    return "\n".join([*title, _table(["v", "w", "distance", *_SHOWN.values()], rows)])


def _sources(section: Mapping[str, Any]) -> str:
    errors, negative = section["share_error"], section["negative_share"]
    order = sorted(range(len(section["sources"])), key=lambda i: -number(section["share"][i] or 0))
    rows = [
        [
            short(section["sources"][i]),
            figure(section["share"][i], errors and errors[i]),
            figure(section["norm_ratio"][i]),
            figure(negative and negative[i]),
        ]
        for i in order[:_MOST_ROWS]
    ]
    if negative is not None:
        rows.append(["(Gauss-Newton)", "", "", figure(section["gn_negative_share"])])
    title = f"Sources of the tensor part, |H^T| = {figure(section['tensor_norm'])}"
    if not section["sources"]:
        return _section(title, "no node bends: the tensor part is zero")
    return _section(title, _table(["source", "share of |H^T|²", "|H^T(u)| / |H^T|", "share of m-"], rows))


def _bounds(section: Mapping[str, Any]) -> str:
    lines = []
    narrow: dict[tuple[str, ...], list[str]] = {}
    for row in section["bottlenecks"]:
        if row["width"] < row["entries"]:
            narrow.setdefault((str(row["width"]), *row["cut"]), []).append(short(row["node"]))
    for (width, *cut), nodes in narrow.items():
        if not cut:
            lines.append(f"no path leads from {_few(nodes)} to the loss")
            continue
        at = _few([short(name) for name in cut])
        lines.append(f"all paths from {_few(nodes)} to the loss pass {width} entries, those of {at}")
    gains, exponent = section["gains"], section["lyapunov"]
    if gains is not None:
        lines.append(
            f"rho = {figure(gains['rho'])} (of batch means {figure(gains['rho_mean'])}), s = {gains['children']}, "
            f"stability margin {figure(gains['margin'])}; a-priori radius {figure(section['a_priori_radius'])}"
        )
    if exponent is not None:
        lines.append(
            f"Lyapunov exponent over {exponent['steps']} steps: {figure(exponent['norm'])} by the norm (Eq. 8), "
            f"{figure(exponent['qr'])} by QR"
        )
    if section["reason"]:
        lines.append(section["reason"])
    text = "\n".join(wrapped(line, "  ") for line in lines) or "no node is narrower than those before it"
    levels, ranks = section["resonance"], section["ranks"]
    if levels is not None and ranks is not None:
        nodes = levels["nodes"]
        pairs = [(i, j) for i in range(len(nodes)) for j in range(i, len(nodes))][:_MOST_ROWS]
        rows = [
            [
                short(nodes[i]),
                short(nodes[j]),
                *(figure(levels[name][i][j]) for name in ("measured", "jacobian", "path", "depth")),
                *(figure(ranks[name][i][j]) for name in ("stable", "bound")),
            ]
            for i, j in pairs
        ]
        text += "\n\n" + _table(["v", "w", "R", "≤ by |J|", "≤ by paths", "≤ by rho", "D of GN", "rank ≤"], rows)
    return _section("Bounds", text)


def _spectrum(section: Mapping[str, Any]) -> str:
    how = "all eigenvalues" if section["exact"] else f"{section['products']} products"
    rows = []
    for name in ("H", "GN", "T"):
        part = section[name]
        rows.append(
            [
                name,
                figure(part["smallest"], part["smallest_residual"]),
                figure(part["largest"], part["largest_residual"]),
                figure(part["trace"], part["trace_error"]),
                figure(part["negative_mass"], part["negative_mass_error"]),
                "-" if part["negative_fraction"] is None else f"{100 * number(part['negative_fraction']):.3g} %",
                "yes" if part["converged"] else "no",
            ]
        )
    table = _table(["part", "smallest", "largest", "trace", "m-", "negative", "converged"], rows)
    last = (
        f"sharpness {figure(section['sharpness'])}: gradient descent is stable up to lr = "
        f"{figure(section['stable_lr'])}; gradient norm {figure(section['gradient_norm'])}, curvature along the "
        f"gradient {figure(section['curvature_along_gradient'])}"
    )
    title = f"Spectrum of the parameters' Hessian, {section['parameters']:,} parameters ({how})"
    return _section(title, f"{table}\n{wrapped(last)}")


def _parameters(section: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{number(row['bandwidth']):g}",
            *(figure(row[part], row[f"{part}_error"]) for part in ("total", "gn", "tensor")),
        ]
        for row in section["discarded"][:_MOST_ROWS]
    ]
    table = _table(["bandwidth", "of |H|²", "of |H^GN|²", "of |H^T|²"], rows)
    how = "exact" if section["exact"] else f"{section['probes']} probes a group"
    loose = "" if section["exact"] else "stable_rank"  # an upper bound within the span of few probes
    title = f"Discarded by a banded approximation of the parameters' blocks, one for each node ({how})"
    return _section(title, f"{table}\n\n{_by_distance(section, loose)}")


def _section(title: str, text: str) -> str:
    return f"{wrapped(title)}\n{'-' * WIDTH}\n{text}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the widest column is cut where it would be wider than the page."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    while True:
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
        if excess <= 0:
            return format_table(cells[0], cells[1:])
        i = widths.index(max(widths))
        limit = max(widths[i] - excess, 4)
        for row in cells:
            if len(row[i]) > limit:
                row[i] = row[i][: limit - 1] + "…"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" +{len(names) - most}" if len(names) > most else "")


_SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "network": _network,
    "metrics": _metrics,
    "sources": _sources,
    "bounds": _bounds,
    "spectrum": _spectrum,
    "parameters": _parameters,
}
