"""The report of a diagnosis: figures as one JSON document, verdicts, text, and files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.document.schema import SCHEMA, TABLE_METRICS, check
from diagnostics.document.values import number, tensor
from diagnostics.document.verdict import Verdict
from diagnostics.errors import DiagnosticsError
from diagnostics.rendering.formats import REPORT_FORMATS
from diagnostics.rendering.saving import Saved
from diagnostics.results.files import replacing, write_text
from diagnostics.results.metric_table import MetricErrors, MetricTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCHEMA", "Report"]


class Report(Saved):
    """What :func:`diagnostics.diagnose` found; it prints in at most 100 columns.

    Args:
        data: The document, of the schema ``"hessopt-diagnostics/1"`` (docs/report.md): nothing but what JSON has, NaN
            as None.

    Attributes:
        data: The document.

    Raises:
        DiagnosticsError: ``data`` is not of the schema; the message names the key.
    """

    _KIND, _FORMATS = "report", REPORT_FORMATS

    def __init__(self, data: Mapping[str, Any]) -> None:
        check(data, "report")
        self.data: dict[str, Any] = dict(data)

    @property
    def name(self) -> str:
        """What the report is of: a model's class or a checkpoint."""
        return str(self.data["name"])

    @property
    def exact(self) -> bool:
        """Whether the blocks between nodes are exact."""
        return bool(self.data["plan"]["exact"])

    @property
    def sections(self) -> dict[str, Any]:
        """The figures, by section."""
        return dict(self.data["sections"])

    @property
    def failures(self) -> dict[str, str]:
        """Of each section that failed its error, type and text; empty where none did."""
        return {name: f"{why['error']}: {why['text']}" for name, why in self.data.get("failures", {}).items()}

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What the figures mean, in words."""
        return tuple(Verdict(**{**entry, "nodes": tuple(entry["nodes"])}) for entry in self.data["verdicts"])

    def table(self, section: str = "metrics") -> MetricTable:
        """The metrics of all pairs of nodes (``"metrics"``) or of their parameters (``"parameters"``) as a table.

        Tensors are in float64. Samples of the jackknife are not kept in reports.
        """
        if section not in ("metrics", "parameters"):
            raise ValueError(f'there are tables of "metrics" and "parameters", got {section!r}.')
        if section not in self.data["sections"]:
            raise DiagnosticsError(f"the report has no section {section!r}: it was not asked for, left out, or failed.")
        found = self.data["sections"][section]
        errors = None
        if found["errors"] is not None:
            kept = {name: tensor(found["errors"][name]) for name in TABLE_METRICS}
            errors = MetricErrors(
                **kept, probes=found["probes"], products=found["products"], passes=0, leave_one_out={}
            )
        columns = {name: tensor(found[name]) for name in (*TABLE_METRICS, "distance")}
        return MetricTable(tuple(found["nodes"]), **columns, standard_errors=errors)

    def to_dict(self) -> dict[str, Any]:
        """The document: a copy of ``data``."""
        copy: dict[str, Any] = json.loads(json.dumps(self.data, allow_nan=False))
        return copy

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the document."""
        write_text(path, json.dumps(self.data, allow_nan=False, indent=1) + "\n")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the metrics of all pairs v ≤ w of nodes and of their parameters, one row a pair.

        Columns: ``report``, ``table`` (``"metrics"`` or ``"parameters"``), ``v``, ``w``, ``distance``, the metrics, and
        their standard errors as ``resonance_error`` …; empty where a number is not defined, 0 where it is exact.
        """
        with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            errors = [f"{metric}_error" for metric in TABLE_METRICS]
            writer.writerow(["report", "table", "v", "w", "distance", *TABLE_METRICS, *errors])
            for name in ("metrics", "parameters"):
                found = self.data["sections"].get(name)
                if found is not None:
                    writer.writerows([self.name, name, *row] for row in _pairs(found))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """A report of the document that :meth:`to_dict` gives."""
        return cls(data)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Report:
        """A report from the file that :meth:`to_json` wrote.

        Raises:
            DiagnosticsError: the file cannot be read, or is not of the schema; the message names the key.
        """
        data = read_document(path)
        check(data, os.fspath(path))
        return cls(data)

    load = from_json

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page (docs/report.md): one file, that needs no network; needs the extra ``report``."""
        from diagnostics.rendering.html_page import page

        write_text(path, page([self.data], [self.name]))

    def plot(self) -> Figure:
        """Heat maps of C, R, D and Gap, metrics by distance with bounds, the spectral density; needs matplotlib.

        Returns:
            A figure of its own, that pyplot does not hold.

        Raises:
            DiagnosticsError: the report has neither metrics nor a spectral density, or matplotlib is missing.
        """
        from diagnostics.rendering.plot import plot_report

        return plot_report(self.data)

    def __str__(self) -> str:
        from diagnostics.rendering.text import text_of

        return text_of(self.data)

    def __repr__(self) -> str:
        how = "exact" if self.exact else "estimated"
        return f"Report({self.name!r}, {how}, {len(self.data['verdicts'])} verdicts)"


def read_document(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds; a DiagnosticsError that says why it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DiagnosticsError(f"there is no report {os.fspath(path)}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DiagnosticsError(f"{os.fspath(path)} cannot be read: {error}") from error
    except ValueError as error:
        raise DiagnosticsError(f"{os.fspath(path)} is no JSON: {error}") from error
    except RecursionError:
        raise DiagnosticsError(f"{os.fspath(path)} is nested too deeply for a report.") from None


def _pairs(found: Mapping[str, Any]) -> list[list[Any]]:
    nodes, errors = found["nodes"], found["errors"]
    rows = []
    for i, v in enumerate(nodes):
        for j in range(i, len(nodes)):
            values = [found[c][i][j] for c in TABLE_METRICS]
            uncertain = [0.0 if errors is None else errors[c][i][j] for c in TABLE_METRICS]
            shown = ["" if value is None else number(value) for value in (found["distance"][i][j], *values, *uncertain)]
            rows.append([v, nodes[j], *shown])
    return rows
