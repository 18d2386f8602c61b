"""Reports: they come back from JSON as they were, print within the page, and refuse what is not of the schema."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.errors import DiagnosticsError
from diagnostics.reporting.values import encode, number
from tests.reporting_networks import labelled, small_report


@pytest.fixture(scope="module")
def report() -> diagnostics.Report:
    return small_report()


@pytest.fixture(scope="module")
def estimated() -> diagnostics.Report:
    return small_report(exact=False, probes=5)


class LongNames(nn.Module):
    """Deep, with names longer than a column."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(9):
            self.add_module(f"an_exceedingly_long_name_of_a_layer_that_nobody_would_choose_{i}", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = x + torch.tanh(layer(x))
        return x


def test_json_round_trip(report: diagnostics.Report, estimated: diagnostics.Report, tmp_path: Path) -> None:
    for found in (report, estimated):
        found.save(tmp_path / "report.json")
        again = diagnostics.Report.load(tmp_path / "report.json")
        assert again.data == found.data == found.to_dict()
        assert str(again) == str(found)
        assert again.verdicts == found.verdicts
        assert "NaN" not in (tmp_path / "report.json").read_text()
        assert diagnostics.Report.from_dict(found.to_dict()).data == found.data


def test_values_of_json() -> None:
    assert encode({"a": torch.tensor([math.nan, math.inf, -math.inf, 1.5])}) == {
        "a": [None, "Infinity", "-Infinity", 1.5]
    }
    assert [number("Infinity"), number("-Infinity"), number(2)] == [math.inf, -math.inf, 2.0]
    json.dumps(encode((1, True, None, "x", math.nan)), allow_nan=False)


def test_table_of_a_report_is_the_table(report: diagnostics.Report, estimated: diagnostics.Report) -> None:
    table = report.table()
    assert table.standard_errors is None
    assert table.by_distance().rows[1].coupling == report.sections["metrics"]["by_distance"][1]["coupling"]
    errors = estimated.table().standard_errors
    assert errors is not None
    assert errors.probes == 5
    assert report.table("parameters").nodes == ("0", "1", "2")
    with pytest.raises(DiagnosticsError, match="no section 'metrics'"):
        small_report(sections=["network"]).table()


def test_csv_has_every_pair(estimated: diagnostics.Report, tmp_path: Path) -> None:
    estimated.save(tmp_path / "pairs.csv")
    rows = list(csv.DictReader((tmp_path / "pairs.csv").read_text().splitlines()))
    assert [(r["table"], r["v"], r["w"]) for r in rows[:4]] == [
        ("metrics", "0", "0"),
        ("metrics", "0", "1"),
        ("metrics", "1", "1"),
        ("parameters", "0", "0"),
    ]
    assert float(rows[1]["coupling"]) == estimated.sections["metrics"]["coupling"][0][1]
    assert float(rows[1]["coupling_error"]) == estimated.sections["metrics"]["errors"]["coupling"][0][1]


def test_text_fits_the_page_and_says_what_it_is(report: diagnostics.Report, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = torch.randn(3, 4), torch.randn(3, 4)
    wide = diagnostics.diagnose(LongNames(), batch, F.mse_loss, exact=False, probes=4)
    for found in (report, wide):
        text = str(found)
        assert max(map(len, text.splitlines())) <= 100
        for title in ("Verdicts", "Network", "Metrics", "Sources", "Bounds", "Spectrum", "Discarded"):
            assert f"\n{title}" in text
    assert "exact" in str(report)
    assert "estimated, 4 probes" in str(wide)
    report.save(tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text() == f"{report}\n"


def test_unknown_suffix_lists_the_formats(report: diagnostics.Report, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.json, \.csv, \.txt"):
        report.save(tmp_path / "report.xls")


def _set(data: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", "hessopt-diagnostics/9", "schema is 'hessopt-diagnostics/9'"),
        ("name", 3, r"report\.name: expected a string, got 3"),
        ("model.parameters", True, r"report\.model\.parameters: expected an integer"),
        ("sections.metrics.coupling", [[1.0]], r"report\.sections\.metrics\.coupling: expected 2 × 2"),
        ("sections.metrics.coupling", [[1.0, 1.0]], r"report\.sections\.metrics\.coupling: expected 2 × 2"),
        ("sections.metrics.gap_ratio", "big", r"sections\.metrics\.gap_ratio: expected a number or null"),
        ("sections.spectrum.H.converged", 1, r"sections\.spectrum\.H\.converged: expected true or false"),
        ("sections.sources.share", 2.0, r"sections\.sources\.share: expected a list"),
        ("sections.plots", {}, r"report\.sections\.plots: no such key"),
        ("verdicts", [{"rule": "x"}], r"report\.verdicts\[0\]\.wording: missing"),
    ],
)
def test_loading_names_the_wrong_key(report: diagnostics.Report, path: str, value: Any, message: str) -> None:
    data = report.to_dict()
    _set(data, path, value)
    with pytest.raises(DiagnosticsError, match=message):
        diagnostics.Report(data)


def test_loading_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(DiagnosticsError, match="there is no report"):
        diagnostics.Report.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(DiagnosticsError, match="is no JSON"):
        diagnostics.Report.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DiagnosticsError, match=r"list\.json: no report"):
        diagnostics.Report.load(tmp_path / "list.json")


def test_zero_curvature_is_a_report_as_well() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    flat = diagnostics.diagnose(model, labelled(4, 2), lambda z, _: z.mean())
    assert "NaN" not in json.dumps(flat.data)
    assert flat.sections["metrics"]["coupling"] == [[None]]
    assert str(flat)
