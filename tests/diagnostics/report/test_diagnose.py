"""diagnose: its figures are those of the functions it calls, estimates are near them, and nothing is left changed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics import DiagnosisSettings
from diagnostics.bounds.gains import local_gains
from diagnostics.bounds.ranks import rank_bounds
from diagnostics.bounds.resonance import resonance_bounds
from diagnostics.document.values import number, tensor
from diagnostics.errors import CaptureError, DiagnosticsError, MemoryBudgetError
from diagnostics.report import workbench
from diagnostics.report.node_sections import by_distance
from diagnostics.report.plan import coarser
from tests.helpers.networks import CalledTwice, Diamond
from tests.helpers.reporting_networks import chain, labelled, small_report


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, tuple[Tensor, Tensor], diagnostics.Report]:
    model, batch = chain([6, 7, 5, 3], nn.GELU, gain=1.5), labelled(6, 3)
    return model, batch, diagnostics.diagnose(model, batch, F.cross_entropy)


def _close(found: Any, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(tensor(found), expected.double(), rtol=rtol, atol=1e-13, equal_nan=True)


def test_node_figures_are_those_of_the_functions(case: Any) -> None:
    model, (x, y), report = case
    graph = diagnostics.capture(model, x, lambda z: F.cross_entropy(z, y))
    blocks = diagnostics.hessian_blocks(graph, by_source=True)
    table, sources = diagnostics.metrics(blocks), diagnostics.curvature_sources(blocks)
    found = report.sections
    assert report.exact
    for name in ("resonance", "coupling", "stable_rank", "gn_gap", "gn_norm", "tensor_norm", "distance"):
        _close(found["metrics"][name], getattr(table, name))
    assert found["metrics"]["gap_ratio"] == pytest.approx(table.gap_ratio)
    for row, expected in zip(found["metrics"]["by_distance"], table.by_distance().rows, strict=True):
        assert row["coupling"] == pytest.approx(expected.coupling)
    _close(found["sources"]["share"], sources.share)
    _close(found["sources"]["negative_share"], sources.negative_share, rtol=1e-6)
    assert found["sources"]["sources"] == list(sources.sources)
    assert found["bounds"]["gains"]["rho"] == pytest.approx(local_gains(graph).rho)
    _close(found["bounds"]["resonance"]["path"], resonance_bounds(graph).path)
    _close(found["bounds"]["ranks"]["bound"], rank_bounds(graph).bound)
    assert [node["name"] for node in found["network"]["nodes"]] == [node.name for node in graph]
    assert found["network"]["loss"] == pytest.approx(graph.loss.item())


def test_parameter_figures_are_those_of_the_dense_hessian(case: Any) -> None:
    model, (x, y), report = case
    graph = diagnostics.capture(model, x, lambda z: F.cross_entropy(z, y))
    for name, part in (("H", "total"), ("GN", "gn"), ("T", "tensor")):
        values = torch.linalg.eigvalsh(diagnostics.parameter_hessian(graph, part))  # type: ignore[arg-type]
        found = report.sections["spectrum"][name]
        _close([found["smallest"], found["largest"]], values[[0, -1]], rtol=1e-7)
        assert found["trace"] == pytest.approx(values.sum().item())
        assert found["negative_mass"] == pytest.approx(-values[values < 0].sum().item(), abs=1e-9)
    hessian = diagnostics.parameter_hessian(graph)
    edges = [0, *torch.tensor([p.numel() for p in model.parameters()]).cumsum(0)[1::2].tolist()]
    at = [slice(a, b) for a, b in pairwise(edges)]
    norms = torch.tensor([[hessian[v, w].norm() for w in at] for v in at])
    _close(report.sections["parameters"]["resonance"], norms)
    kept = norms.diagonal().square().sum() / norms.square().sum()
    assert report.sections["parameters"]["discarded"][0]["total"] == pytest.approx(1 - kept.item())
    largest = torch.linalg.matrix_norm(hessian[at[0], at[1]], 2)
    assert report.sections["parameters"]["stable_rank"][0][1] == pytest.approx(((norms[0, 1] / largest) ** 2).item())


def test_spectrum_is_of_all_batches() -> None:
    model, (x, y) = chain([4, 5, 3]), labelled(4, 3)
    whole = diagnostics.diagnose(model, (x, y), F.cross_entropy, sections=["spectrum"])
    parted = diagnostics.diagnose(model, [(x[:6], y[:6]), (x[6:], y[6:])], F.cross_entropy, sections=["spectrum"])
    assert parted.data["data"]["batches"] == 2
    assert parted.sections["spectrum"]["sharpness"] == pytest.approx(whole.sections["spectrum"]["sharpness"])
    assert parted.sections["network"]["loss"] != pytest.approx(whole.sections["network"]["loss"])


def test_estimates_are_within_their_errors_of_exact_figures() -> None:
    model, batch = chain([20, 40, 44, 36, 4], nn.GELU, gain=2.0), labelled(20, 4, 8)
    exact = diagnostics.diagnose(model, batch, F.cross_entropy, sections=["metrics", "sources"])
    deviations = []
    for seed in range(6):
        found = diagnostics.diagnose(
            model,
            batch,
            F.cross_entropy,
            exact=False,
            settings=DiagnosisSettings(probes=20, seed=seed),
            sections=["metrics", "sources"],
        )
        assert not found.exact
        for name in ("resonance", "gn_gap", "coupling"):
            error = tensor(found.sections["metrics"]["errors"][name])
            off = tensor(found.sections["metrics"][name]) - tensor(exact.sections["metrics"][name])
            known = (error > 1e-12) & ~torch.eye(len(error), dtype=torch.bool)
            deviations += (off[known] / error[known]).tolist()
        shares = dict(zip(exact.sections["sources"]["sources"], exact.sections["sources"]["share"], strict=True))
        for i, node in enumerate(found.sections["sources"]["sources"]):
            error = found.sections["sources"]["share_error"][i]
            deviations.append((found.sections["sources"]["share"][i] - shares[node]) / error)
    spread = torch.tensor(deviations)
    assert len(spread) > 60
    assert spread.abs().median() < 1.3  # of a normal distribution 0.67
    assert spread.square().mean().sqrt() < 2.0  # 1, but for the heavier tails of Student's t


def test_estimated_spectrum_and_discarded_share_are_near_the_exact_ones() -> None:
    model, batch = chain([6, 8, 8, 3]), labelled(6, 3)
    exact = diagnostics.diagnose(model, batch, F.cross_entropy).sections
    found = diagnostics.diagnose(model, batch, F.cross_entropy, exact=False).sections
    assert not found["spectrum"]["exact"]
    for end in ("largest", "smallest"):
        assert found["spectrum"]["H"][end] == pytest.approx(exact["spectrum"]["H"][end], rel=1e-2)
    mass, error = found["spectrum"]["H"]["negative_mass"], found["spectrum"]["H"]["negative_mass_error"]
    assert abs(mass - exact["spectrum"]["H"]["negative_mass"]) < 4 * error
    for row, expected in zip(found["parameters"]["discarded"], exact["parameters"]["discarded"], strict=True):
        assert abs(row["total"] - expected["total"]) <= 4 * row["total_error"] + 1e-12


def test_errors_of_distance_rows_match_the_spread_over_seeds() -> None:
    model, batch = chain([20, 40, 44, 36, 4], nn.GELU, gain=2.0), labelled(20, 4, 8)
    rows = [
        diagnostics.diagnose(
            model,
            batch,
            F.cross_entropy,
            exact=False,
            settings=DiagnosisSettings(probes=12, seed=seed),
            sections=["metrics"],
        ).sections["metrics"]["by_distance"][0]
        for seed in range(12)
    ]
    for name in ("resonance", "gn_gap", "gap_ratio"):
        spread = torch.tensor([row[name] for row in rows]).std().item()
        stated = torch.tensor([row["errors"][name] for row in rows]).mean().item()
        assert stated / 2.5 < spread < 2.5 * stated, name


def test_error_of_the_ratio_of_sums_is_the_jackknife_s() -> None:
    model, (x, y) = chain([20, 40, 44, 36, 4], nn.GELU, gain=2.0), labelled(20, 4, 8)
    table = diagnostics.estimate_metrics(
        diagnostics.capture(model, x, lambda z: F.cross_entropy(z, y)), 6, exact_gn=False
    )
    assert table.standard_errors is not None
    t, g = (table.standard_errors.leave_one_out[name] for name in ("tensor_norm", "gn_norm"))
    for row in by_distance(table):
        here = (table.distance == row["distance"]).triu()
        ratios = torch.stack([t[here][:, k].sum() / g[here][:, k].sum() for k in range(6)])
        expected = (5 / 6 * (ratios - ratios.mean()).square().sum()).sqrt().item()
        assert row["errors"]["gap_ratio"] == pytest.approx(expected)


def test_estimated_shares_and_weights_add_up_to_one() -> None:
    model, batch = chain([20, 32, 33, 34, 4], nn.GELU), labelled(20, 4, 8)
    found = diagnostics.diagnose(
        model, batch, F.cross_entropy, exact=False, settings=DiagnosisSettings(probes=5)
    ).sections
    # Σ_u ⟨H^T(u) r, H^T r⟩ = ‖H^T r‖² for every probe
    assert sum(found["sources"]["share"]) == pytest.approx(1.0)
    for part in ("H", "GN", "T"):
        assert sum(found["spectrum"][part]["density"]["weights"]) == pytest.approx(1.0)


def test_nothing_of_the_model_or_the_random_state_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = labelled(6, 3)
    F.cross_entropy(model(x), y).backward()
    other = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = torch.get_rng_state()
    report = diagnostics.diagnose(model, (x, y), F.cross_entropy, checkpoint=tmp_path / "other.pt")
    assert report.name == "other.pt"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))  # type: ignore[arg-type]
    assert report.sections["network"]["loss"] != pytest.approx(
        diagnostics.diagnose(model, (x, y), F.cross_entropy, sections=["network"]).sections["network"]["loss"]
    )


def test_dropout_and_shuffling_follow_from_the_seed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.utils.data.TensorDataset(*labelled(6, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        found.append(diagnostics.diagnose(model, loader, F.cross_entropy, sections=["metrics", "spectrum"]).sections)
    assert found[0] == found[1]


def test_interrupted_run_resumes_with_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = chain([20, 32, 33, 34, 4], nn.GELU), labelled(20, 4, 8)
    options: dict[str, Any] = {"exact": False, "settings": DiagnosisSettings(probes=5)}
    whole = diagnostics.diagnose(model, batch, F.cross_entropy, **options)
    module = __import__("sys").modules["diagnostics.report.diagnose"]

    def interrupted(bench: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    kept = tmp_path / "kept.json"
    with monkeypatch.context() as patch:
        patch.setitem(module.SECTIONS, "spectrum", interrupted)
        with pytest.raises(KeyboardInterrupt):
            diagnostics.diagnose(model, batch, F.cross_entropy, resume=kept, **options)
    assert list(json.loads(kept.read_text())["sections"]) == ["network", "metrics", "sources", "bounds"]
    with monkeypatch.context() as patch:
        patch.setitem(module.SECTIONS, "metrics", interrupted)  # must not be computed again
        resumed = diagnostics.diagnose(model, batch, F.cross_entropy, resume=kept, **options)
    assert resumed.sections == whole.sections
    assert resumed.verdicts == whole.verdicts


def _raising(error: BaseException) -> Any:
    def section(bench: Any) -> dict[str, Any]:
        raise error

    return section


def test_failed_section_costs_the_report_nothing_else(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, whole = case
    module = __import__("sys").modules["diagnostics.report.diagnose"]
    why = "a product\noverflows when it is squared"
    with monkeypatch.context() as patch:
        patch.setitem(module.SECTIONS, "spectrum", _raising(DiagnosticsError(why)))
        with pytest.warns(diagnostics.SectionFailedWarning, match="spectrum: DiagnosticsError: a product"):
            report = diagnostics.diagnose(model, batch, F.cross_entropy, resume=tmp_path / "part.json")
    assert report.failures == {"spectrum": f"DiagnosticsError: {why}"}
    assert report.sections == {name: found for name, found in whole.sections.items() if name != "spectrum"}
    assert {v.rule for v in report.verdicts} == {v.rule for v in whole.verdicts} - {"saddle"}
    text = str(report)
    assert "! spectrum: DiagnosticsError: a product overflows when it is squared" in text
    assert text.index("Failed sections") < text.index("\nVerdicts")
    assert "b: spectrum failed: DiagnosticsError" in str(diagnostics.compare([whole, report], names=["a", "b"]))
    report.save(tmp_path / "report.json")
    assert diagnostics.Report.load(tmp_path / "report.json").failures == report.failures
    with pytest.raises(DiagnosticsError, match="no section 'parameters'"):
        diagnostics.diagnose(model, batch, F.cross_entropy, sections=["metrics"]).table("parameters")
    again = diagnostics.diagnose(model, batch, F.cross_entropy, resume=tmp_path / "part.json")
    assert again.sections == whole.sections  # what failed is tried again
    assert again.failures == {}


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("overflow"),
        torch.linalg.LinAlgError("no convergence"),  # type: ignore[attr-defined]
        NotImplementedError("no second derivative"),
        torch.OutOfMemoryError("out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_numerical_failures_cost_a_section(error: Exception, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = case
    monkeypatch.setitem(__import__("sys").modules["diagnostics.report.diagnose"].SECTIONS, "sources", _raising(error))
    with pytest.warns(diagnostics.SectionFailedWarning, match=str(error)):
        report = diagnostics.diagnose(model, batch, F.cross_entropy, sections=["sources", "spectrum"])
    assert list(report.sections) == ["network", "spectrum"]


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shape"), AssertionError(), TypeError("x")], ids=repr)
def test_faults_are_raised(error: Exception, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = case
    monkeypatch.setitem(__import__("sys").modules["diagnostics.report.diagnose"].SECTIONS, "sources", _raising(error))
    with pytest.raises(type(error)):
        diagnostics.diagnose(model, batch, F.cross_entropy)


def test_interruption_hands_over_what_is_finished(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, whole = case
    sections = __import__("sys").modules["diagnostics.report.diagnose"].SECTIONS
    monkeypatch.setitem(sections, "bounds", _raising(KeyboardInterrupt()))
    with pytest.raises(diagnostics.DiagnosisInterrupted) as stop:
        diagnostics.diagnose(model, batch, F.cross_entropy)
    report = stop.value.report
    assert isinstance(stop.value, KeyboardInterrupt)
    assert isinstance(report, diagnostics.Report)
    assert report.sections == {name: whole.sections[name] for name in ("network", "metrics", "sources")}
    assert list(report.data["skipped"]) == ["bounds", "spectrum", "parameters"]
    assert "spectrum: left out. interrupted" in str(report)
    monkeypatch.setitem(sections, "network", _raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as bare:
        diagnostics.diagnose(model, batch, F.cross_entropy)
    assert type(bare.value) is KeyboardInterrupt


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    model, batch = chain([6, 5, 3]), labelled(6, 3)
    run: Any = {"resume": tmp_path, "sections": ["metrics"]}
    diagnostics.diagnose(model, batch, F.cross_entropy, **run)
    assert (tmp_path / "partial.json").is_file()
    with pytest.raises(DiagnosticsError, match="other settings"):
        diagnostics.diagnose(model, batch, F.cross_entropy, settings=DiagnosisSettings(seed=3), **run)
    with pytest.raises(DiagnosticsError, match="other data"):
        diagnostics.diagnose(model, (batch[0] + 1, batch[1]), F.cross_entropy, **run)
    with pytest.raises(DiagnosticsError, match="other loss"):
        diagnostics.diagnose(model, batch, lambda z, t: F.cross_entropy(z, t) * 2, **run)
    with torch.no_grad():
        model[0][0].bias += 1e-12
    with pytest.raises(DiagnosticsError, match="other parameters"):
        diagnostics.diagnose(model, batch, F.cross_entropy, **run)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DiagnosticsError, match="does not hold the sections"):
        diagnostics.diagnose(model, batch, F.cross_entropy, resume=tmp_path / "bad.json")


@pytest.mark.parametrize("model", [Diamond(), CalledTwice()], ids=["branches", "called twice"])
def test_any_graph(model: nn.Module) -> None:
    batch = torch.randn(5, 5), torch.randint(3, (5,))
    for exact in (None, False):
        report = diagnostics.diagnose(model, batch, F.cross_entropy, exact=exact, settings=DiagnosisSettings(probes=4))
        assert not report.data["skipped"]
        assert len(report.sections) == 6
        assert report.exact == (exact is None)


def test_devices(device: torch.device) -> None:
    model, (x, y) = chain([6, 7, 5, 3]).to(device), labelled(6, 3)
    found = diagnostics.diagnose(model, (x, y), F.cross_entropy)  # data are moved to the parameters' device
    expected = small_report()
    assert torch.device(found.data["model"]["device"]).type == device.type
    _close(found.sections["metrics"]["resonance"], tensor(expected.sections["metrics"]["resonance"]), rtol=1e-8)


def test_size_decides_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = chain([6, 7, 5, 3]), labelled(6, 3)
    assert diagnostics.diagnose(model, batch, F.cross_entropy, sections=["metrics"]).exact
    small = diagnostics.diagnose(
        model, batch, F.cross_entropy, settings=DiagnosisSettings(memory_limit=10_000), sections=["metrics"]
    )
    assert not small.exact
    assert "exceed" in small.data["plan"]["reason"]
    with pytest.raises(MemoryBudgetError, match="exact blocks of 2 nodes"):
        diagnostics.diagnose(model, batch, F.cross_entropy, settings=DiagnosisSettings(memory_limit=100), exact=True)
    skipped = diagnostics.diagnose(
        model, batch, F.cross_entropy, settings=DiagnosisSettings(memory_limit=100), exact=False
    )
    assert "parameters" in skipped.data["skipped"]
    assert "parameters" not in skipped.sections
    assert "left out" in str(skipped)
    assert small.data["options"]["probes"] == 30
    monkeypatch.setattr(workbench, "LIGHT_ABOVE", 10)
    light = diagnostics.diagnose(model, batch, F.cross_entropy, exact=False)
    assert light.data["options"]["probes"] == 10
    assert light.sections["spectrum"]["T"]["density"] is None


def test_nodes_of_deep_models_are_stages_or_spaced_evenly() -> None:
    class Staged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.a, self.b = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))) for _ in range(2))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.stem(x))))

    staged = Staged()
    graph = diagnostics.capture(staged, torch.randn(2, 4), lambda z: z.square().mean())
    assert coarser(staged, graph) == (["stem", "a", "b"], "the 3 stages that hold the 9 layers")
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(40)))
    graph = diagnostics.capture(deep, torch.randn(2, 4), lambda z: z.square().mean())
    chosen = coarser(deep, graph)
    assert chosen is not None
    assert len(chosen[0]) == 12
    assert (chosen[0][0], chosen[0][-1]) == ("0", "38")
    report = diagnostics.diagnose(
        staged, (torch.randn(2, 4), None), lambda z, _: z.square().mean(), exact=False, sections=["metrics"]
    )
    assert report.sections["metrics"]["nodes"] == ["stem", "a", "b"]
    assert "stages" in report.data["plan"]["nodes"]


def test_bad_arguments() -> None:
    model, batch = chain([6, 5, 3]), labelled(6, 3)
    with pytest.raises(DiagnosticsError, match="sections must be some of network, metrics"):
        diagnostics.diagnose(model, batch, F.cross_entropy, sections=["metric"])
    with pytest.raises(ValueError, match="probes must be at least 3"):
        DiagnosisSettings(probes=2)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        DiagnosisSettings(epsilon=0.0)
    for wrong in (
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"memory_limit": float("nan")},
        {"memory_limit": 0},
        {"seed": 2**63},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DiagnosisSettings(**wrong)  # type: ignore[arg-type]
    for seconds in (0, float("nan")):
        with pytest.raises(ValueError, match="seconds must be positive"):
            diagnostics.diagnose(model, batch, F.cross_entropy, seconds=seconds)
    with pytest.raises(ValueError, match="exact must be"):
        diagnostics.diagnose(model, batch, F.cross_entropy, exact="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be"):
        diagnostics.diagnose("model", batch, F.cross_entropy)  # type: ignore[arg-type]
    with pytest.raises(DiagnosticsError, match="batches is empty"):
        diagnostics.diagnose(model, [], F.cross_entropy)
    with pytest.raises(CaptureError, match="no module"):
        diagnostics.diagnose(model, batch, F.cross_entropy, nodes=["layer1"])
    assert number(None) != number(None)
