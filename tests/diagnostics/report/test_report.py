"""Reports: they come back from JSON as they were, print within the page, and refuse what is not of the schema."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics import DiagnosisSettings
from diagnostics.document.values import encode, number
from diagnostics.errors import DiagnosticsError
from diagnostics.report.compare import load
from tests.helpers.reporting_networks import bottleneck_verdict, labelled, small_report


@pytest.fixture(scope="module")
def report() -> diagnostics.Report:
    return small_report()


@pytest.fixture(scope="module")
def estimated() -> diagnostics.Report:
    return small_report(exact=False, settings=DiagnosisSettings(probes=5))


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
    wide = diagnostics.diagnose(LongNames(), batch, F.mse_loss, exact=False, settings=DiagnosisSettings(probes=4))
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
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        data = data[key]
    data[last] = value


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a document, lists and objects too."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from _leaves(child, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


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
        ("verdicts.0.level", "x", r"verdicts\[0\]\.level: expected one of note, advice, warning, got 'x'"),
        (
            "sections.sources.share",
            [1.0] * 4,
            r"sources\.share: expected . entries, as many as sources has, got 4",
        ),
        ("sections.parameters.sizes", [1], r"sections\.parameters\.sizes: expected 3 entries, as many as nodes has"),
        (
            "sections.spectrum.H.density.weights",
            [],
            r"H\.density\.weights: expected 107 entries, as many as",
        ),
        ("sections.metrics.gap_ratio", 10**400, r"gap_ratio: expected a number that a float holds .*hundred digits"),
        pytest.param("sections.metrics.gap_ratio", 10**9999, r"gap_ratio: expected .*got a huge integer", id="huge"),
        ("sections.metrics.coupling.0.1", math.nan, r"metrics\.coupling\[0\]\[1\]: NaN is written as null"),
        ("sections.metrics.coupling.0.1", math.inf, r'coupling\[0\]\[1\]: .*infinity is written as "Infinity"'),
        ("model.parameters", 2**64, r"report\.model\.parameters: expected an integer of 64 bits"),
        ("sections.network.edges.0", ["1"], r"network\.edges\[0\]: expected the names of two nodes, the parent first"),
        ("sections.network.edges.0", ["1", "0"], r"network\.edges\[0\]: expected the names of two nodes"),
        ("sections.network.nodes.1.name", "0", r"network\.nodes\[1\]\.name: '0' is the name of another node too"),
        ("sections.network.nodes.1.parents", ["2"], r"network\.nodes\[1\]\.parents: '2' is no node before this one"),
        ("name", [[1]], r"report\.name: expected a string, got a list of 1"),
    ],
)
def test_loading_names_the_wrong_key(report: diagnostics.Report, path: str, value: Any, message: str) -> None:
    data = report.to_dict() | {"verdicts": [bottleneck_verdict()]}
    _set(data, path, value)
    with pytest.raises(DiagnosticsError, match=message):
        diagnostics.Report(data)


def test_loading_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(DiagnosticsError, match="there is no report"):
        diagnostics.Report.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(DiagnosticsError, match="is no JSON"):
        diagnostics.Report.load(tmp_path / "half.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DiagnosticsError, match=r"deep\.json is nested too deeply"):
        diagnostics.Report.load(tmp_path / "deep.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DiagnosticsError, match=r"list\.json: no report"):
        diagnostics.Report.load(tmp_path / "list.json")


@pytest.mark.parametrize("value", [None, "Infinity", "-Infinity", 1e308, -1e308])
def test_whatever_the_numbers_are_the_report_is_written(
    report: diagnostics.Report, estimated: diagnostics.Report, value: Any, tmp_path: Path
) -> None:
    for found in (report, estimated):
        data = found.to_dict()
        for path in _leaves(data["sections"]):
            if isinstance(_at(data["sections"], path), float):
                _at(data["sections"], path[:-1])[path[-1]] = value
        odd = diagnostics.Report(data)
        assert max(map(len, str(odd).splitlines())) <= 100
        odd.save(tmp_path / "odd.csv")
        assert str(diagnostics.compare([odd, found]))


def test_any_edit_gives_a_report_or_an_error_with_file_and_key(
    report: diagnostics.Report, estimated: diagnostics.Report, tmp_path: Path
) -> None:
    random, path = Random(0), tmp_path / "edited.json"
    values = [None, 0, -1, 10**400, 1e308, math.nan, math.inf, "x", "Infinity", True, [], [1], [[1]], {}, {"a": 1}]
    refused: list[tuple[bool, bool]] = []
    for _ in range(100):
        data = random.choice([report, estimated]).to_dict()
        short = [p for p in _leaves(data) if "density" not in p or p[-1] == "values"]
        *parents, last = random.choice(short)
        parent = _at(data, tuple(parents))
        if random.random() < 0.2:
            del parent[last]
        else:
            parent[last] = random.choice(values)
        path.write_text(json.dumps(data))
        try:
            edited = diagnostics.Report.load(path)
        except DiagnosticsError as error:
            key = next(key for key in (*parents, last) if isinstance(key, str))
            refused.append((str(error).startswith(f"{path}"), key in str(error)))
        else:
            assert str(edited)
            assert len(edited.verdicts) == len(data["verdicts"])
    assert 30 < len(refused) < 100
    assert set(refused) == {(True, True)}


def test_comparisons_name_the_wrong_key_of_which_report(report: diagnostics.Report, tmp_path: Path) -> None:
    document = diagnostics.compare([report, report]).to_dict()
    for path, value, message in (
        ("reports.1.sections.metrics.gap_ratio", "x", r"c\.json\.reports\[1\]\.sections\.metrics\.gap_ratio: expected"),
        ("reports", [report.to_dict()], r"c\.json\.reports: expected a list of two"),
        ("names", ["a", 3], r"c\.json\.names: expected a list of 2 strings"),
    ):
        edited = json.loads(json.dumps(document))
        _set(edited, path, value)
        (tmp_path / "c.json").write_text(json.dumps(edited))
        with pytest.raises(DiagnosticsError, match=message):
            load(tmp_path / "c.json")


def test_zero_curvature_is_a_report_as_well() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    flat = diagnostics.diagnose(model, labelled(4, 2), lambda z, _: z.mean())
    assert "NaN" not in json.dumps(flat.data)
    assert flat.sections["metrics"]["coupling"] == [[None]]
    assert str(flat)
