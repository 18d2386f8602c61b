"""The page that a person reads: one file with everything in it, of a report or of several behind a slider."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from diagnostics.document.judge import RULES
from diagnostics.document.values import number
from diagnostics.rendering import charts, pair_charts
from diagnostics.rendering.charts import PAIR_METRICS, Chart, shown
from diagnostics.rendering.formats import library
from diagnostics.rendering.graph_drawing import LEAST_COUPLING, drawing

_LEVELS = {"warning": ("!", "Warning"), "advice": ("→", "Advice"), "note": ("·", "Note")}
_FIRST_VERDICTS = 8
_TABLES = {"metrics": "Pairs of nodes", "parameters": "Pairs of parameter blocks"}


def page(
    reports: Sequence[Mapping[str, Any]], names: Sequence[str], comparison: Mapping[str, Any] | None = None
) -> str:
    """The page as HTML; the same reports give the same page.

    Args:
        reports: Documents, in the order of the slider.
        names: What they are called.
        comparison: ``rows`` and ``verdicts`` of a comparison, for the table above.

    Raises:
        DiagnosticsError: jinja2 or plotly is not installed.
    """
    jinja2, offline = library("jinja2"), library("plotly.offline")
    folder = files("diagnostics.rendering") / "page"
    source = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(source), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"shown": shown, "count": lambda value: f"{value:,}"}
    views = [_view(report, name, i, reports) for i, (report, name) in enumerate(zip(reports, names, strict=True))]
    figures: dict[str, Any] = {"charts": [c for view in views for c in view["charts"]], "hover": {}}
    for i, view in enumerate(views):
        figures["hover"] |= {f"r{i}-{table['section']}": table["hover"] for table in view["tables"]}
    text: str = environment.get_template("page.html").render(
        title=names[0] if len(names) == 1 else f"{len(names)} reports",
        views=views,
        comparison=None if comparison is None else _comparison(comparison),
        levels=_LEVELS,
        first=_FIRST_VERDICTS,
        metrics=PAIR_METRICS,
        least=LEAST_COUPLING,
        css=source["page.css"],
        script=source["page.js"],
        plotly=offline.get_plotlyjs(),
        figures=_embedded(figures),
        documents=_embedded(list(reports)),
    )
    return text


def _view(report: Mapping[str, Any], name: str, index: int, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sections, prefix = report["sections"], f"r{index}"
    tables = [_table(sections[key], key, prefix, reports) for key in _TABLES if key in sections]
    bounds = sections["bounds"]["resonance"] if "bounds" in sections else None
    epsilon = number(report["options"]["epsilon"])
    for table in tables:
        levels = bounds if table["section"] == "metrics" else None
        table["by_distance"] = pair_charts.distance_charts(sections[table["section"]], epsilon, levels, table["id"])
    singles = {
        "spectrum": charts.spectra(sections["spectrum"]) if "spectrum" in sections else [],
        "sources": charts.source_bars(sections["sources"]) if "sources" in sections else [],
        "discarded": charts.discarded_charts(sections["parameters"]) if "parameters" in sections else [],
    }
    for found in singles.values():
        for chart in found:
            chart["id"] = f"{prefix}-{chart['id']}"
    everything: list[Chart] = [c for found in singles.values() for c in found]
    for table in tables:
        everything += [*table["maps"], *table["by_distance"]]
    return {
        "id": prefix,
        "name": name,
        "report": {"failures": {}, "shortened": {}, **report},
        "sections": sections,
        "verdicts": [_verdict(entry) for entry in report["verdicts"]],
        "graph": drawing(sections),
        "tables": tables,
        "levels": _levels(sections["bounds"]) if "bounds" in sections else [],
        "charts": everything,
        **singles,
    }


def _table(section: Mapping[str, Any], key: str, prefix: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    name = f"{prefix}-{key}"
    shared = [r["sections"][key] for r in reports if key in r["sections"]]
    tops = {metric: max(pair_charts.top(s[metric]) for s in shared) or 1.0 for metric in PAIR_METRICS}
    maps = pair_charts.heat_maps(section, tops, name)
    for chart in maps:
        chart["hover"] = name
    n, errors = len(section["nodes"]), section["errors"]
    rows = [
        {
            "v": section["nodes"][i],
            "w": section["nodes"][j],
            "distance": shown(section["distance"][i][j]),
            "cells": [shown(section[m][i][j], errors and errors[m][i][j]) for m in PAIR_METRICS],
        }
        for i in range(n)
        for j in range(i, n)
    ]
    return {"id": name, "section": key, "title": _TABLES[key], "maps": maps, "rows": rows, "exact": section["exact"],
            "gap": shown(section["gap_ratio"], section["gap_ratio_error"]), "hover": pair_charts.hover_texts(section),
            "probes": section["probes"]}  # fmt: skip


def _levels(bounds: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a pair: names, R with its bounds, the stable rank of GN with the bound on its rank."""
    levels, ranks = bounds["resonance"], bounds["ranks"]
    if levels is None or ranks is None:
        return []
    nodes = levels["nodes"]
    ranked = {(v, w): (i, j) for i, v in enumerate(ranks["nodes"]) for j, w in enumerate(ranks["nodes"])}
    rows = []
    for i, v in enumerate(nodes):
        for j in range(i, len(nodes)):
            at = ranked.get((v, nodes[j]))
            of_rank = [None, None] if at is None else [ranks[name][at[0]][at[1]] for name in ("stable", "bound")]
            of_norm = [levels[name][i][j] for name in ("measured", "jacobian", "path", "depth")]
            rows.append([v, nodes[j], *map(shown, (*of_norm, *of_rank))])
    return rows


def _verdict(entry: Mapping[str, Any]) -> dict[str, Any]:
    rule = next((rule for rule in RULES if rule.id == entry["rule"]), None)
    return {
        **entry,
        "condition": None if rule is None else rule.condition,
        "reference": None if rule is None else rule.reference,
    }


def _comparison(comparison: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "quantity": row["quantity"],
            "cells": [
                {"text": shown(value, error), "significant": mark}
                for value, error, mark in zip(row["values"], row["errors"], row["significant"], strict=True)
            ],
        }
        for row in comparison["rows"]
    ]
    return {"rows": rows, "verdicts": comparison["verdicts"]}


def _embedded(value: Any) -> str:
    """JSON that can stand in a script element, whatever names are in it."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
