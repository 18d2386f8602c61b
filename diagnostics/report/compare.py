"""Reports side by side: two models, the checkpoints of a run, before and after."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from diagnostics.document.figures import reach
from diagnostics.document.schema import check
from diagnostics.document.summary import Figure, summary
from diagnostics.document.values import encode
from diagnostics.errors import DiagnosticsError
from diagnostics.rendering.formats import COMPARISON_FORMATS
from diagnostics.rendering.saving import Saved
from diagnostics.rendering.text import WIDTH, figure, short, wrapped
from diagnostics.report.report import Report, read_document
from diagnostics.results.files import write_text
from diagnostics.results.text_table import format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

COMPARISON_SCHEMA = "hessopt-diagnostics-comparison/1"


class Comparison(Saved):
    """Reports side by side; made by :func:`compare`.

    A change between two reports a and b is significant if ``|a − b| > √((t_a se_a)² + (t_b se_b)²)``, with Student's t
    of the probes of each for 95 %; of exact figures, if they differ by more than one part in 10⁶.

    Attributes:
        reports: The reports, in order.
        names: What they are called.
    """

    _KIND, _FORMATS = "comparison", COMPARISON_FORMATS

    def __init__(self, reports: Sequence[Report], names: Sequence[str]) -> None:
        self.reports, self.names = tuple(reports), tuple(names)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a quantity: its name, values, errors, changes from the report before, and which are significant.

        Keys are ``quantity``, ``values``, ``errors``, ``changes`` and ``significant``, lists with an entry a report.
        """
        found = [summary(report.data) for report in self.reports]
        quantities = dict.fromkeys(name for figures in found for name in figures)
        rows = []
        for quantity in quantities:
            pairs = [figures.get(quantity, (math.nan, 0.0, None)) for figures in found]
            changes, significant = [math.nan], [False]
            for before, after in pairwise(pairs):
                changes.append(after[0] - before[0])
                significant.append(_significant(before, after))
            rows.append(
                {
                    "quantity": quantity,
                    "values": [value for value, *_ in pairs],
                    "errors": [error for _, error, _ in pairs],
                    "changes": changes,
                    "significant": significant,
                }
            )
        return rows

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """Verdicts, with the names of the reports that have them, where not all do.

        Two reports have the same verdict where rule, wording and nodes agree, whatever the figures. The text is that of
        the first.
        """
        having: dict[tuple[str, str, tuple[str, ...]], tuple[str, list[str]]] = {}
        for name, report in zip(self.names, self.reports, strict=True):
            for verdict in report.verdicts:
                key = (verdict.rule, verdict.wording, tuple(verdict.nodes))
                having.setdefault(key, (verdict.text, []))[1].append(name)
        count = len(self.reports)
        return [{"text": text, "reports": names} for text, names in having.values() if len(names) < count]

    def to_dict(self) -> dict[str, Any]:
        """Names, rows, verdicts and the reports themselves, ready for JSON."""
        document: dict[str, Any] = encode(
            {
                "schema": COMPARISON_SCHEMA,
                "names": list(self.names),
                "rows": self.rows,
                "verdicts": self.verdicts,
                "reports": [report.data for report in self.reports],
            }
        )
        return document

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the document of :meth:`to_dict`."""
        write_text(path, json.dumps(self.to_dict(), allow_nan=False, indent=1) + "\n")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page of all reports, behind a slider, and what changed; needs the extra ``report``."""
        from diagnostics.rendering.html_page import page

        reports, changes = [report.data for report in self.reports], {"rows": self.rows, "verdicts": self.verdicts}
        write_text(path, page(reports, self.names, encode(changes)))

    def plot(self) -> MatplotlibFigure:
        """C, R and Gap by distance, and the spectral density of H, a line for each report; needs matplotlib."""
        from diagnostics.rendering.plot import plot_comparison

        return plot_comparison([report.data for report in self.reports], self.names)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """A comparison of the document that :meth:`to_dict` gives.

        Raises:
            DiagnosticsError: it is not of the schema; the message names the key.
        """
        return _read(data, "comparison")

    def __str__(self) -> str:
        lines = [wrapped(f"{len(self.reports)} reports: {', '.join(self.names)}")]
        columns = min(len(self.names), 4)  # a page holds no more: the first and the last three
        shown = (
            list(range(columns)) if len(self.names) <= columns else [0, *range(len(self.names) - 3, len(self.names))]
        )
        if len(shown) < len(self.names):
            lines.append("the first and the last three are shown; all are in to_dict()")
        header = ["", *(short(self.names[i])[:17] for i in shown)]
        rows = []
        for row in self.rows:
            cells = [short_quantity(row["quantity"])]
            for i in shown:
                mark = "*" if row["significant"][i] else " "
                value = row["values"][i]
                cells.append((figure(None) if math.isnan(value) else figure(value, row["errors"][i])) + mark)
            rows.append(cells)
        lines += ["=" * WIDTH, format_table(header, rows)]
        lines.append("* significant change from the report before (beyond the combined 95 % intervals)")
        for name, report in zip(self.names, self.reports, strict=True):
            lines += [wrapped(f"{name}: {section} failed: {why}", "  ") for section, why in report.failures.items()]
        for entry in self.verdicts:
            lines.append(wrapped(f"only {', '.join(entry['reports'])}: {entry['text']}", "  "))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Comparison({', '.join(map(repr, self.names))})"


def compare(reports: Iterable[Report], names: Iterable[str] | None = None) -> Comparison:
    """Two or more reports side by side, with combined standard errors and the significant changes marked.

    Args:
        reports: Of models, checkpoints, or before and after; nodes of the same name are compared.
        names: What to call them; None: their own names, numbered where two are the same.

    Raises:
        ValueError: fewer than two reports, or another number of names.
    """
    found = list(reports)
    if len(found) < 2:
        raise ValueError(f"a comparison needs at least two reports, got {len(found)}.")
    own = [report.name for report in found]
    called = [f"{name} {i + 1}" if own.count(name) > 1 else name for i, name in enumerate(own)]
    called = called if names is None else [str(name) for name in names]
    if len(called) != len(found):
        raise ValueError(f"{len(found)} reports need as many names, got {len(called)}.")
    return Comparison(found, called)


def load(path: str | os.PathLike[str]) -> Report | Comparison:
    """What a JSON file holds: a report, or a comparison of several.

    Raises:
        DiagnosticsError: the file cannot be read, or is neither; the message names the key.
    """
    data = read_document(path)
    if isinstance(data, Mapping) and data.get("schema") == COMPARISON_SCHEMA:
        return _read(data, os.fspath(path))
    check(data, os.fspath(path))
    return Report(data)


def _read(data: Any, where: str) -> Comparison:
    if not isinstance(data, Mapping) or data.get("schema") != COMPARISON_SCHEMA:
        raise DiagnosticsError(f'{where}: no comparison of the schema "{COMPARISON_SCHEMA}".')
    reports, names = data.get("reports"), data.get("names")
    if not isinstance(reports, list) or len(reports) < 2:
        raise DiagnosticsError(f"{where}.reports: expected a list of two reports at least.")
    if not isinstance(names, list) or len(names) != len(reports) or not all(isinstance(name, str) for name in names):
        raise DiagnosticsError(f"{where}.names: expected a list of {len(reports)} strings, one for each report.")
    for i, report in enumerate(reports):
        check(report, f"{where}.reports[{i}]")
    return compare([Report(report) for report in reports], names)


def short_quantity(name: str) -> str:
    """A quantity that leaves room for four columns."""
    return name if len(name) <= 24 else name[:23] + "…"


def _significant(before: Figure, after: Figure) -> bool:
    (a, error_a, probes_a), (b, error_b, probes_b) = before, after
    if not math.isfinite(b - a):
        return not (math.isnan(a) or math.isnan(b)) and a != b
    combined = math.hypot((reach(probes_a) or 1.0) * error_a, (reach(probes_b) or 1.0) * error_b)
    return abs(b - a) > max(combined, 1e-6 * max(abs(a), abs(b)))
