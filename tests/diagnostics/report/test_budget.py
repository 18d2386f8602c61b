"""A diagnosis within given seconds: what is long is shortened, what does not fit is left out, and both are said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diagnostics
from diagnostics import DiagnosisSettings
from diagnostics.report import budget as module
from diagnostics.report.budget import Budget, Cost, Costs, Share
from tests.helpers.reporting_networks import chain, labelled


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module, "time", type("", (), {"perf_counter": lambda: self.now}))


class Known:
    """Costs by section."""

    def __init__(self, **costs: Cost) -> None:
        self.costs = costs

    def of(self, section: str, left: float) -> Cost:
        return self.costs[section]


def _share(budget: Budget, section: str, rest: list[str], **costs: Cost) -> Share:
    return budget.share(section, rest, Known(**costs))  # type: ignore[arg-type]


def test_what_fits_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    metrics, spectrum = Cost(1.0, 0.1, 30, 3), Cost(0.0, 0.1, 30, 3)
    assert _share(Budget(None), "metrics", [], metrics=metrics) == Share()
    assert _share(Budget(8.0), "metrics", ["spectrum"], metrics=metrics, spectrum=spectrum) == Share()


def test_what_is_long_gets_what_later_sections_can_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    budget = Budget(6.0)
    clock.now = 2.0
    metrics, spectrum, bounds = Cost(1.0, 0.125, 30, 3), Cost(0.0, 0.125, 30, 8), Cost(9.0)
    share = _share(budget, "metrics", ["spectrum", "bounds"], metrics=metrics, spectrum=spectrum, bounds=bounds)
    # 4 s are left, 1 s is kept for the spectrum, nothing for bounds that do not fit anyway, and 1 s is fixed
    assert share == Share(16)
    # what is less valuable does not take the place of what is more valuable
    assert _share(budget, "metrics", ["spectrum"], metrics=Cost(1, 0.25, 30, 10), spectrum=Cost(1.0)) == Share(12)


def test_what_does_not_fit_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    budget = Budget(6.0)
    clock.now = 4.5
    refused = _share(budget, "metrics", [], metrics=Cost(1.0, 0.5, 30, 3)).refused
    assert refused == "it takes about 2.5 s at least, and 1.5 s of 6 s were left"
    assert _share(budget, "network", []) == Share()
    clock.now = 7.0
    assert _share(budget, "metrics", [], metrics=Cost(0.0)).refused == "the 6 s were over"


@pytest.mark.parametrize("exact", [None, False], ids=["exact", "estimated"])
def test_enough_time_changes_no_figure(exact: bool | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = labelled(6, 3)
    state = torch.get_rng_state()
    found = [
        diagnostics.diagnose(
            model, batch, F.cross_entropy, exact=exact, settings=DiagnosisSettings(probes=4), seconds=seconds
        )
        for seconds in (None, 1e6)
    ]
    assert found[0].sections == found[1].sections
    assert list(found[0].sections) == list(found[1].sections)
    assert found[1].data["options"]["seconds"] == 1e6
    assert not found[1].data["shortened"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("exact", [None, False], ids=["exact", "estimated"])
def test_no_time_leaves_the_network(exact: bool | None) -> None:
    report = diagnostics.diagnose(chain([6, 7, 5, 3]), labelled(6, 3), F.cross_entropy, exact=exact, seconds=1e-9)
    assert list(report.sections) == ["network"]
    assert list(report.data["skipped"]) == ["metrics", "spectrum", "parameters", "sources", "bounds"]
    assert "metrics: left out. no time: the 1e-09 s were over" in str(report)


def test_sections_are_shortened_in_the_order_of_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def of(self: Costs, section: str, left: float) -> Cost:
        order.append(section)
        if section == "sources":
            return Cost(1e9)
        return Cost(0.0) if section == "bounds" else Cost(0.0, 1e8, 30, 5)

    monkeypatch.setattr(Costs, "of", of)
    monkeypatch.setattr(Budget, "left", 2e9)
    model, batch = chain([20, 32, 33, 34, 4], nn.GELU), labelled(20, 4, 8)
    report = diagnostics.diagnose(model, batch, F.cross_entropy, exact=False, seconds=2e9)
    assert list(dict.fromkeys(order)) == ["metrics", "spectrum", "parameters", "sources", "bounds"]
    assert list(report.sections) == ["network", "metrics", "sources", "bounds", "spectrum", "parameters"]
    # of 20e8 s, 5e8 are kept for the spectrum and 5e8 for the parameters; then there is no room for the sources' 10e8
    assert report.sections["metrics"]["probes"] == 10
    assert report.sections["parameters"]["probes"] == 10  # here 10e8 are kept for the sources
    assert report.sections["spectrum"]["products"] <= 50  # instead of some 1500
    assert report.data["shortened"]["metrics"] == "10 probes, to fit into 2e+09 s"
    assert "metrics: shortened. 10 probes, to fit into 2e+09 s" in str(report)
    again: Any = diagnostics.Report.from_dict(report.to_dict())
    assert str(again) == str(report)


def test_predictions_are_positive_and_smaller_for_less_work() -> None:
    from diagnostics.report.workbench import Workbench

    model, batch = chain([20, 32, 33, 34, 4], nn.GELU), labelled(20, 4, 8)
    for exact in (None, False):
        bench = Workbench(model, batch, F.cross_entropy, DiagnosisSettings(memory_limit=2**30), exact=exact)
        costs = Costs(bench)
        for section in module.VALUE[1:]:
            short, whole = costs.of(section, 1e3).seconds
            assert 0 <= short <= whole < 1e3
            if section in ("metrics", "sources", "parameters") and exact is False:
                assert 0 < short < whole
