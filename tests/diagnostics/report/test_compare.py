"""Comparisons: differences, which of them are significant, and what only one report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diagnostics
from diagnostics import DiagnosisSettings
from diagnostics.errors import DiagnosticsError
from diagnostics.report.compare import load
from tests.helpers.reporting_networks import chain, labelled, small_report


def _row(comparison: diagnostics.Comparison, quantity: str) -> dict[str, Any]:
    (row,) = [row for row in comparison.rows if row["quantity"] == quantity]
    return row


def test_changes_of_exact_figures() -> None:
    before = small_report(name="before")
    model = chain([6, 7, 5, 3], gain=1.1)
    after = diagnostics.diagnose(model, labelled(6, 3), F.cross_entropy, name="after")
    comparison = diagnostics.compare([before, before, after], names=["a", "b", "c"])
    row = _row(comparison, "R of 1")
    values = [report.sections["metrics"]["resonance"][1][1] for report in comparison.reports]
    assert row["values"] == values
    assert row["changes"][1:] == [0.0, values[2] - values[1]]
    assert row["significant"] == [False, False, True]
    assert max(map(len, str(comparison).splitlines())) <= 100
    assert "*" in str(comparison)


def test_noise_is_not_significant_and_a_change_is() -> None:
    model, batch = chain([20, 40, 44, 36, 4], gain=2.0), labelled(20, 4, 8)
    options: dict[str, Any] = {"exact": False, "sections": ["metrics"]}
    one, two = (
        diagnostics.diagnose(model, batch, F.cross_entropy, settings=DiagnosisSettings(probes=12, seed=seed), **options)
        for seed in (1, 2)
    )
    noise = diagnostics.compare([one, two])
    assert noise.names == ("Sequential 1", "Sequential 2")
    flagged = [row["quantity"] for row in noise.rows if row["significant"][1]]
    assert len(flagged) <= len(noise.rows) // 5
    assert any(row["changes"][1] != 0 for row in noise.rows)
    with torch.no_grad():
        model[-1].weight *= 1.5
    changed = diagnostics.compare(
        [
            one,
            diagnostics.diagnose(
                model, batch, F.cross_entropy, settings=DiagnosisSettings(probes=12, seed=1), **options
            ),
        ]
    )
    assert _row(changed, "R of 0")["significant"][1]


def test_verdicts_that_not_all_have() -> None:
    tanh, relu = (
        small_report(),
        diagnostics.diagnose(chain([6, 7, 5, 3], torch.nn.ReLU), labelled(6, 3), F.cross_entropy, name="relu"),
    )
    only = {entry["text"]: entry["reports"] for entry in diagnostics.compare([tanh, relu]).verdicts}
    flat = [names for text, names in only.items() if "piecewise linear" in text]
    assert flat == [["relu"]]


def test_verdicts_with_other_figures_are_the_same_verdict() -> None:
    model, batch = chain([6, 4, 4, 4, 4, 3], torch.nn.Sigmoid), labelled(6, 3)
    one = diagnostics.diagnose(model, batch, F.cross_entropy, name="one", sections=["metrics"])
    with torch.no_grad():
        model[-1].weight *= 1.1
    two = diagnostics.diagnose(model, batch, F.cross_entropy, name="two", sections=["metrics"])
    keys = [[(v.rule, v.wording, v.nodes) for v in report.verdicts] for report in (one, two)]
    assert keys[0] == keys[1] != []
    assert [v.text for v in one.verdicts] != [v.text for v in two.verdicts]
    assert diagnostics.compare([one, two]).verdicts == []


def test_round_trip_and_files(tmp_path: Path) -> None:
    report = small_report()
    comparison = diagnostics.compare([report, report])
    comparison.save(tmp_path / "two.json")
    again = load(tmp_path / "two.json")
    assert isinstance(again, diagnostics.Comparison)
    assert again.to_dict() == comparison.to_dict()
    assert str(again) == str(comparison)
    report.save(tmp_path / "one.json")
    assert isinstance(load(tmp_path / "one.json"), diagnostics.Report)
    comparison.save(tmp_path / "two.txt")
    assert (tmp_path / "two.txt").read_text() == f"{comparison}\n"
    with pytest.raises(ValueError, match=r"\.json, \.txt"):
        comparison.save(tmp_path / "two.csv")


def test_missing_quantities_are_null() -> None:
    full, part = small_report(), small_report(sections=["network"])
    row = next(row for row in diagnostics.compare([full, part]).to_dict()["rows"] if row["quantity"] == "trace")
    assert row["values"][1] is None
    assert row["significant"] == [False, False]


def test_bad_arguments() -> None:
    report = small_report(sections=["network"])
    with pytest.raises(ValueError, match="at least two reports"):
        diagnostics.compare([report])
    with pytest.raises(ValueError, match="as many names"):
        diagnostics.compare([report, report], names=["a"])
    with pytest.raises(DiagnosticsError, match="comparison: no comparison of the schema"):
        diagnostics.Comparison.from_dict(report.data)
