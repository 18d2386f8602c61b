"""Verdicts: each rule on a network built for it, none on one that is not, and all of them in the docs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.document.judge import RULES, judge
from tests.helpers.reporting_networks import chain, labelled

DOCS = Path(__file__).parents[3] / "docs" / "verdicts.md"
Report = diagnostics.Report


def _report(model: nn.Module, batch: Any = None, loss: Any = F.cross_entropy, **options: Any) -> Report:
    return diagnostics.diagnose(model, labelled(6, 3) if batch is None else batch, loss, **options)


def _tiny_linear(loss: Any = F.mse_loss) -> Report:
    """Two linear layers next to the saddle at zero: the gradient is as small as the weights, the curvature is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e-3
    x = torch.randn(16, 6).double()
    return _report(model, (x, x[:, :3] - x[:, 3:]), loss)


def _almost_linear_loss() -> Report:
    """Smooth layers behind a loss that hardly curves: the tensor part is all there is."""
    return _report(chain([6, 7, 7, 7, 7, 3], gain=1.5), loss=lambda z, _: z.sum() + 1e-4 * z.square().sum())


class _Unused(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class _Spare(nn.Module):
    """A second output, behind a layer of its own, that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.second = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.head(h), self.second(h)


class _Dead(nn.Module):
    """One of two branches is switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.off, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.out(torch.tanh(self.on(x)) + torch.relu(self.off(x) - 1e6))
        return z


def _scaled(factor: float) -> Report:
    """Five linear layers that each multiply by ``factor``: R(v,v) falls by its square from layer to layer."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5))).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(factor * torch.eye(4))
    return _report(model, (torch.randn(8, 4).double(), torch.randn(8, 4).double()), F.mse_loss)


def _linear_widths(*widths: int) -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))).double()
    return _report(model, labelled(widths[0], widths[-1], 32))


def _decoupled() -> Report:
    """A layer whose output hardly matters beyond the next: coupling falls below ε at distance 2."""
    torch.manual_seed(0)
    model = chain([12, 12, 12, 12, 3])
    with torch.no_grad():
        for i in range(1, 3):  # nearly orthogonal directions: most of what comes in is mapped to almost nothing
            model[i][0].weight.copy_(torch.diag(torch.tensor([1e-3] * 11 + [1.0])).roll(i, 0))
    return _report(model, labelled(12, 3, 64))


def _fitted(noise: float) -> Report:
    """Targets that are the model's outputs, up to noise."""
    model, x = chain([6, 6, 6, 3], gain=3.0), labelled(6, 3, 64)[0]
    return _report(model, (x, model(x).detach() + noise * torch.ones(64, 3)), F.mse_loss)


def _dying(share: float) -> Report:
    """A layer of 10 ReLUs of which a share never switches on."""
    model = chain([6, 10, 10, 3], nn.ReLU)
    with torch.no_grad():
        model[1][0].bias[: int(10 * share)] -= 100
    return _report(model, labelled(6, 3, 64))


def _orthogonal(gain: float) -> Report:
    model = chain([8] * 9, nn.ReLU)
    for parameter in model.parameters():
        nn.init.orthogonal_(parameter, gain) if parameter.ndim == 2 else nn.init.zeros_(parameter)
    return _report(model, labelled(8, 8, 64))


class _Split(nn.Module):
    """Two layers in a row of which the second reads little of the first, so that blocks are almost block-diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], 1)


CASES: dict[tuple[str, str], Callable[[], Report]] = {
    ("coupled-samples", "batch_norm"): lambda: _report(_normed()),
    ("coupled-samples", "other"): lambda: _report(chain([6, 5, 3]), loss=lambda z, _: (z @ z.T).square().mean()),
    ("unused-parameters", "unused"): lambda: _report(_Unused().double()),
    ("dead-units", "dead"): lambda: _dying(0.7),
    ("unread-output", "unread"): lambda: _report(_Spare().double(), loss=lambda z, y: F.cross_entropy(z[0], y)),
    ("no-curvature", "linear"): lambda: _report(chain([6, 7, 5, 3]), loss=lambda z, _: z.sum()),
    ("resonance-over-depth", "vanishing"): lambda: _scaled(0.3),
    ("resonance-over-depth", "exploding"): lambda: _scaled(4.0),
    ("saddle", "saddle"): _tiny_linear,
    ("gauss-newton-misses", "misses"): _almost_linear_loss,
    ("one-source", "source"): _almost_linear_loss,
    ("piecewise-linear", "flat"): lambda: _report(chain([6, 7, 5, 3], nn.ReLU)),
    ("piecewise-linear", "no_signal"): lambda: _fitted(0.0),
    ("bottleneck", "bottleneck"): lambda: _linear_widths(6, 12, 2, 12, 3),
    ("bandwidth", "banded"): _decoupled,
    ("block-diagonal", "loses"): lambda: _orthogonal(2**0.5),
    ("block-diagonal", "suffices"): lambda: _report(
        _Split().double(), (torch.randn(8, 6).double(), torch.randn(8, 8).double()), F.mse_loss
    ),
}

QUIET: dict[str, dict[str, Callable[[], Report]]] = {
    "coupled-samples": {"running statistics": lambda: _report(_normed().eval())},
    "unused-parameters": {
        "frozen ones": lambda: _report(_Unused().double().requires_grad_(False).apply(_trained_head)),
        "an output that is not used": CASES["unread-output", "unread"],
    },
    "dead-units": {
        "a third of them": lambda: _dying(0.3),
        "an output that is not used": CASES["unread-output", "unread"],
        "no curvature": CASES["no-curvature", "linear"],
        "a batch of four": lambda: _report(_Dead().double(), labelled(6, 3, 4)),
    },
    "unread-output": {"dead units": lambda: _report(_Dead().double())},
    "no-curvature": {
        "dead units": lambda: _report(_Dead().double()),
        "an output that is not used": CASES["unread-output", "unread"],
    },
    "resonance-over-depth": {
        "three layers of a default initialisation": lambda: _scaled(0.5),
        "orthogonal weights": CASES["block-diagonal", "loses"],
    },
    "saddle": {
        "negative curvature on a slope": lambda: _report(chain([6, 7, 5, 3], gain=0.7)),
        "a minimum": lambda: _fitted(0.0),
    },
    "gauss-newton-misses": {"one node of two": lambda: _report(chain([6, 7, 7, 3], nn.GELU))},
    "one-source": {
        "two that bend": lambda: _report(chain([6, 7, 7, 7, 3], nn.GELU)),
        "a small tensor part": lambda: _fitted(0.02),
    },
    "piecewise-linear": {
        "gelu": lambda: _report(chain([6, 7, 5, 3], nn.GELU)),
        "a single node": lambda: _report(nn.Linear(6, 3).double()),
    },
    "bottleneck": {"no wider layer behind": lambda: _linear_widths(12, 6, 3, 3)},
    "bandwidth": {"coupled from end to end": lambda: _scaled(1.0)},
    "block-diagonal": {"in between": lambda: _fitted(0.02)},
}


def _trained_head(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.requires_grad_()


def _normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize(("rule", "wording"), CASES, ids=["/".join(case) for case in CASES])
def test_a_network_for_each_wording(rule: str, wording: str) -> None:
    report = CASES[rule, wording]()
    found = {(verdict.rule, verdict.wording): verdict for verdict in report.verdicts}
    assert (rule, wording) in found, str(report)
    verdict = found[rule, wording]
    assert verdict.text in " ".join(str(report).split())
    assert verdict.significant
    assert all(node in {n["name"] for n in report.sections["network"]["nodes"]} for node in verdict.nodes)


@pytest.mark.parametrize(("rule", "name"), [(r, n) for r, cases in QUIET.items() for n in cases])
def test_a_network_that_each_rule_passes_over(rule: str, name: str) -> None:
    report = QUIET[rule][name]()
    assert all(section in report.sections for r in RULES if r.id == rule for section in r.needs)
    assert rule not in {verdict.rule for verdict in report.verdicts}, str(report)


def test_every_wording_has_a_network_and_every_rule_one_that_it_passes_over() -> None:
    assert set(CASES) == {(rule.id, wording) for rule in RULES for wording in rule.wordings}
    assert set(QUIET) == {rule.id for rule in RULES}


def test_the_gain_of_a_saddle_is_that_of_the_loss() -> None:
    """Measured again by moving the parameters, which the report has left as they were."""
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)).double(), labelled(6, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e-3
    before = [parameter.detach().clone() for parameter in model.parameters()]
    versions = [parameter._version for parameter in model.parameters()]

    def loss(z: Tensor, y: Tensor) -> Tensor:  # with a penalty on the parameters themselves
        return F.mse_loss(z, y) + 1e-2 * torch.cat([p.flatten() for p in model.parameters()]).square().sum()

    report = _report(model, (x, x[:, :3]), loss, sections=["spectrum"])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert versions == [parameter._version for parameter in model.parameters()]
    (verdict,) = report.verdicts
    matrix = diagnostics.HessianOperator(model, (x, x[:, :3]), loss).to_dense()
    values, vectors = torch.linalg.eigh(matrix)
    gains = []
    for sign in (1, -1):
        with torch.no_grad():
            move = sign * verdict.figures["length"] * vectors[:, 0]
            for p, q, part in zip(model.parameters(), before, move.split([q.numel() for q in before]), strict=True):
                p.copy_(q + part.reshape(q.shape))
            gains.append(report.sections["spectrum"]["loss"] - loss(model(x), x[:, :3]).item())
    assert verdict.figures["gain"] == pytest.approx(max(gains), rel=1e-6)
    assert verdict.figures["step"] == pytest.approx(
        report.sections["spectrum"]["gradient_norm"] ** 2 / (2 * values.abs().max().item()), rel=1e-9
    )


def test_an_error_in_the_loss_leaves_the_parameters_where_they_were() -> None:
    torch.manual_seed(0)
    model, (x, _) = nn.Linear(6, 3).double(), labelled(6, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def loss(z: Tensor, _: Tensor) -> Tensor:
        if not torch.equal(model.weight, before[0]):
            raise KeyError("a loss that looks at the parameters")
        return -z.square().mean()

    with pytest.raises(KeyError, match="looks at"):
        _report(model, (x, x), loss, sections=["spectrum"])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_network_without_verdicts() -> None:
    report = _fitted(0.02)
    assert len(report.sections) == 6
    assert report.verdicts == (), [str(verdict) for verdict in report.verdicts]


def test_the_figures_are_those_of_the_sections() -> None:
    report = _linear_widths(6, 12, 2, 12, 3)
    (verdict,) = [v for v in report.verdicts if v.rule == "bottleneck"]
    assert verdict.nodes == ("1",)
    assert verdict.figures["width"] == 2
    measured = report.table().stable_rank[1]
    assert verdict.figures["measured"] == pytest.approx(measured.max().item())
    assert measured.max() <= 2
    missed = _almost_linear_loss()
    (verdict,) = [v for v in missed.verdicts if v.rule == "gauss-newton-misses"]
    gap = missed.table().gn_gap.diagonal()
    assert verdict.figures["share"] == pytest.approx((1 / (1 + gap.square())).min().item())
    assert set(verdict.nodes) == {missed.table().nodes[i] for i in range(len(gap)) if gap[i] > 1}


def _with_errors(report: Report, name: str, error: float) -> dict[str, Any]:
    """The report as an estimate with 10 probes, one metric of which has this standard error."""
    data = copy.deepcopy(report.data)
    metrics = data["sections"]["metrics"]
    n = len(metrics["nodes"])
    zeros = {m: [[0.0] * n for _ in range(n)] for m in ("resonance", "coupling", "stable_rank", "gn_gap")}
    metrics |= {
        "exact": False,
        "probes": 10,
        "errors": zeros | {"gn_norm": zeros["gn_gap"], "tensor_norm": zeros["gn_gap"]},
    }
    metrics["errors"] = copy.deepcopy(metrics["errors"])
    metrics["errors"][name] = [[error] * n for _ in range(n)]
    return data


@pytest.mark.parametrize(
    ("rule", "wording", "metric"),
    [
        ("gauss-newton-misses", "misses", "gn_gap"),
        ("resonance-over-depth", "vanishing", "resonance"),
        ("bandwidth", "banded", "coupling"),
    ],
)
def test_what_is_within_the_interval_is_marked(rule: str, wording: str, metric: str) -> None:
    report = CASES[rule, wording]()
    for error, significant in ((1e-9, True), (1e6, False)):
        verdicts = [v for v in judge(_with_errors(report, metric, error)) if v.rule == rule]
        assert verdicts
        for verdict in verdicts:
            assert verdict.significant == significant
            assert ("not significant" in str(verdict)) != significant


def test_uncertain_shares_are_marked() -> None:
    for case, keys in ((("block-diagonal", "loses"), ("parameters", "discarded")), (("one-source", "source"), ())):
        data = copy.deepcopy(CASES[case]().data)
        if keys:
            data["sections"]["parameters"]["probes"] = 3
            data["sections"]["parameters"]["discarded"][0]["gn_error"] = 1.0
        else:
            section = data["sections"]["sources"]
            section |= {"probes": 3, "share_error": [1.0] * len(section["sources"])}
        (verdict,) = [v for v in judge(data) if v.rule == case[0]]
        assert not verdict.significant


def test_rules_whose_sections_are_missing_are_passed_over() -> None:
    report = _report(chain([6, 7, 5, 3], nn.GELU), sections=["network"])
    assert report.verdicts == ()
    assert "none of the rules applies" in str(report)


def test_docs_state_every_rule_with_its_condition_and_reference() -> None:
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    for rule in RULES:
        assert f"## {rule.id}" in text
        part = text.split(f"## {rule.id} ", 1)[1].split(" ## ", 1)[0]
        assert rule.condition in part, rule.id
        assert rule.reference in part, rule.id
        for wording in rule.wordings.values():
            assert " ".join(wording.split()) in part, rule.id


def test_order_is_by_level() -> None:
    levels = [verdict.level for verdict in _dying(0.7).verdicts]
    assert len(set(levels)) > 1
    assert levels == sorted(levels, key=["warning", "advice", "note"].index)
