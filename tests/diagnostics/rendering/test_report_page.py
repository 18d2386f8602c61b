"""The page and the figures of a report, without a browser: complete, self-contained, safe with any names."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics import DiagnosisSettings
from diagnostics.errors import DiagnosticsError
from diagnostics.report.cli import main
from tests.helpers.reporting_networks import bottleneck_verdict, chain, labelled, small_report

pytest.importorskip("jinja2")
pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

HOSTILE = """</script><script>alert("x")</script>&'"<b>"""


class Elements(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles, by place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.words.append(data)
        elif self.found[-1][0] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data

    def having(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.found if name in attributes]

    def json(self, name: str) -> Any:
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(text)


def _page(report: diagnostics.Report | diagnostics.Comparison, folder: Path) -> str:
    report.save(folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def exact() -> diagnostics.Report:
    return small_report()


@pytest.fixture(scope="module")
def estimated() -> diagnostics.Report:
    return small_report(exact=False, settings=DiagnosisSettings(probes=5), name="estimated")


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        left, right = self.b(x).tanh(), self.c(x).sigmoid()
        y: Tensor = self.d(left * right) + x
        return y


def test_page_needs_no_network(exact: diagnostics.Report, tmp_path: Path) -> None:
    elements = Elements(_page(exact, tmp_path))
    assert not [tag for tag, _ in elements.found if tag in ("link", "img", "iframe", "object", "base")]
    assert elements.having("src") == []
    assert all(str(target).startswith("#") for target in elements.having("href"))
    (policy,) = [a["content"] for t, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    css = (Path(diagnostics.__file__).parent / "rendering" / "page" / "page.css").read_text(encoding="utf-8")
    assert "url(" not in css
    assert "@import" not in css


def test_page_is_the_same_twice(exact: diagnostics.Report, tmp_path: Path) -> None:
    assert _page(exact, tmp_path) == _page(diagnostics.Report.from_dict(exact.to_dict()), tmp_path)


@pytest.mark.parametrize("kind", ["exact", "estimated"])
def test_heat_maps_hold_the_values_of_the_document(kind: str, request: Any, tmp_path: Path) -> None:
    report: diagnostics.Report = request.getfixturevalue(kind)
    elements = Elements(_page(report, tmp_path))
    found = elements.json("figures")
    charts = {chart["id"]: chart for chart in found["charts"]}
    for section in ("metrics", "parameters"):
        for metric in ("coupling", "resonance", "gn_norm", "tensor_norm", "stable_rank", "gn_gap"):
            chart = charts[f"r0-{section}-{metric}"]
            assert chart["data"][0]["z"] == report.sections[section][metric]
            assert chart["hover"] == f"r0-{section}"
        means = charts[f"r0-{section}-distance-coupling"]["data"][1]
        rows = report.sections[section]["by_distance"]
        assert means["y"] == [row["coupling"] for row in rows]
        if report.sections[section]["errors"] is not None:
            assert means["error_y"]["array"] == [row["errors"]["coupling"] for row in rows]
            assert means["error_y"]["visible"]
    assert elements.json("documents") == [report.data]
    places = [a["id"] for _, a in elements.found if a.get("class") == "chart"]
    assert sorted(filter(None, places)) == sorted(charts)
    c, error = report.sections["metrics"]["coupling"][0][1], report.sections["metrics"]["errors"]
    text = found["hover"]["r0-metrics"][0][1]
    assert text.startswith("0 × 1<br>distance 1<br>")
    assert f"C = {c:.3g}" + ("" if error is None else f" ± {error['coupling'][0][1]:.1g}") in text


def test_bounds_lie_above_what_they_bound(exact: diagnostics.Report, tmp_path: Path) -> None:
    charts = {chart["id"]: chart for chart in Elements(_page(exact, tmp_path)).json("figures")["charts"]}
    _, mean, *bounds = charts["r0-metrics-distance-resonance"]["data"]
    assert len(bounds) == 5
    for bound in bounds:
        assert bound["x"] == mean["x"]
        assert all(b >= m * (1 - 1e-9) for b, m in zip(bound["y"], mean["y"], strict=True))


def test_spectrum_adds_up_and_counts(exact: diagnostics.Report, tmp_path: Path) -> None:
    charts = {chart["id"]: chart for chart in Elements(_page(exact, tmp_path)).json("figures")["charts"]}
    for trace in charts["r0-spectrum-density"]["data"]:
        assert sum(y or 0.0 for y in trace["y"]) == pytest.approx(1.0, abs=1e-9)
    values = exact.sections["spectrum"]["H"]["density"]["values"]
    share = sum(y or 0.0 for x, y in zip(*(charts["r0-spectrum-density"]["data"][0][k] for k in "xy"), strict=True)
                if x > values[-1] / 2)  # fmt: skip
    counted = sum(v > values[-1] / 2 for v in values) / len(values)
    assert share == pytest.approx(counted, abs=2.5 / len(values))  # a bin may lie across the limit


def test_network_has_one_element_a_node(tmp_path: Path) -> None:
    report = diagnostics.diagnose(Skip().double(), (labelled(4, 4)[0], labelled(4, 4)[0]), F.mse_loss)
    elements = Elements(_page(report, tmp_path))
    nodes = [node["name"] for node in report.sections["network"]["nodes"]]
    assert sorted(filter(None, elements.having("data-node"))) == sorted(nodes)
    metrics = report.sections["metrics"]
    names, c = metrics["nodes"], metrics["coupling"]
    coupled = {(v, w) for i, v in enumerate(names) for j, w in enumerate(names) if i < j and c[i][j] >= 0.05}
    highways = [a for _, a in elements.found if "data-pair" in a]
    assert {(a["data-v"], a["data-w"]) for a in highways} == coupled
    widths = {(a["data-v"], a["data-w"]): float(a["stroke-width"] or 0) for a in highways}
    strongest = max(coupled, key=lambda pair: c[names.index(pair[0])][names.index(pair[1])])
    assert widths[strongest] == max(widths.values())


def test_layers_of_the_drawing_follow_the_data() -> None:
    from diagnostics.rendering.graph_drawing import drawing

    report = diagnostics.diagnose(Skip().double(), (labelled(4, 4)[0], labelled(4, 4)[0]), F.mse_loss)
    found = drawing(report.sections)
    at = {node.name: node for node in found.nodes}
    assert all(at[a].y < at[b].y for a, b in report.sections["network"]["edges"])
    assert len(found.edges) == len(report.sections["network"]["edges"])
    for one in found.nodes:
        assert found.left <= one.left <= one.right <= found.left + found.width
        assert 0 < one.y < found.height
        assert not [
            o for o in found.nodes if o is not one and o.y == one.y and o.left < one.right and one.left < o.right
        ]


def test_arcs_side_by_side_are_seen() -> None:
    from diagnostics.rendering.graph_drawing import drawing

    report = diagnostics.diagnose(Skip().double(), (labelled(4, 4)[0], labelled(4, 4)[0]), F.mse_loss)
    found = drawing(report.sections)
    y = {node.name: node.y for node in found.nodes}
    for arc in found.highways:
        heights = {float(h) for h in re.findall(r"[-\d.]+ ([-\d.]+)", arc.path)}
        assert len(heights) == 2, (arc.start, arc.end)
    assert [arc for arc in found.highways if y[arc.start] == y[arc.end]]


def test_hostile_names_stay_text(exact: diagnostics.Report, tmp_path: Path) -> None:
    data = json.loads(json.dumps(exact.data).replace('"0"', json.dumps(HOSTILE)))
    data["name"] = data["model"]["class"] = HOSTILE
    data["skipped"] = {HOSTILE: HOSTILE}
    data["verdicts"] = [bottleneck_verdict(HOSTILE) | {"text": HOSTILE, "rule": HOSTILE}]
    report = diagnostics.Report(data)
    for saved in (report, diagnostics.compare([report, report], names=[HOSTILE, HOSTILE])):
        text = _page(saved, tmp_path)
        elements = Elements(text)
        assert len(elements.scripts) == 4
        assert 'alert("x")</script>' not in text
        assert "b" not in {tag for tag, _ in elements.found}
        assert HOSTILE in elements.having("data-node")
        assert any(HOSTILE in word for word in elements.words)
        found = elements.json("figures")
        assert "<script>" not in found["hover"]["r0-metrics"][0][1]
        assert "&lt;script&gt;" in found["hover"]["r0-metrics"][0][1]
        assert elements.json("documents")[0] == data
        saved.save(tmp_path / "page.svg")
    data["name"] = r"$\frac$"  # no mathematics, and no error of what would be
    figure = diagnostics.Report(data).plot()
    figure.draw_without_rendering()


def test_numbers_that_are_none(exact: diagnostics.Report, tmp_path: Path) -> None:
    data = copy.deepcopy(exact.data)
    section = data["sections"]["metrics"]
    section["coupling"][0][1], section["resonance"][0][1], section["gn_gap"][1][1] = None, "Infinity", "-Infinity"
    section["by_distance"][1]["coupling"], section["gap_ratio"] = None, "Infinity"
    data["sections"]["spectrum"]["stable_lr"] = "Infinity"
    report = diagnostics.Report(data)
    elements = Elements(_page(report, tmp_path))
    found = elements.json("figures")
    charts = {chart["id"]: chart["data"] for chart in found["charts"]}
    assert charts["r0-metrics-coupling"][0]["z"][0][1] is None
    assert charts["r0-metrics-resonance"][0]["z"][0][1] is None
    assert math.isfinite(charts["r0-metrics-resonance"][0]["zmax"])
    assert "C = –<br>R = ∞" in found["hover"]["r0-metrics"][0][1]
    assert "Gap = −∞" in found["hover"]["r0-metrics"][1][1]
    words = " ".join(elements.words)
    assert re.search(r"learning rate\s+of ∞", words)
    assert not re.search(r"\bnan\b|\bNaN\b|\bNone\b|\binf\b", words)
    report.save(tmp_path / "page.png")


@pytest.mark.parametrize("value", [None, "Infinity", "-Infinity", 1e308, -1e308])
def test_whatever_the_numbers_are_the_page_is_written(
    exact: diagnostics.Report, estimated: diagnostics.Report, value: Any, tmp_path: Path
) -> None:
    def replaced(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: replaced(child) for key, child in entry.items()}
        if isinstance(entry, list):
            return [replaced(child) for child in entry]
        return value if isinstance(entry, float) else entry

    for report in (exact, estimated):
        odd = diagnostics.Report(report.to_dict() | {"sections": replaced(report.sections)})
        Elements(_page(odd, tmp_path)).json("figures")
        _page(diagnostics.compare([odd, report]), tmp_path)


class TwoOutputs(nn.Module):
    """A node that nothing leads to the loss from."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.head = nn.Linear(4, 5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return torch.as_tensor(self.head(x).tanh())


def test_nodes_that_are_not_connected(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = TwoOutputs().double(), labelled(4, 3)
    for report in (
        diagnostics.diagnose(model, batch, F.cross_entropy),
        diagnostics.diagnose(model, batch, F.cross_entropy, exact=False, settings=DiagnosisSettings(probes=4)),
    ):
        assert "Infinity" in report.sections["metrics"]["distance"][0]
        charts = {chart["id"]: chart for chart in Elements(_page(report, tmp_path)).json("figures")["charts"]}
        assert charts["r0-metrics-distance-coupling"]["data"][2]["x"] == [0.0, 0.0]
        assert "no path leads from aside to the loss" in str(report)


def test_page_says_what_is_missing(exact: diagnostics.Report, tmp_path: Path) -> None:
    data = exact.to_dict()
    del data["sections"]["spectrum"]
    data |= {
        "failures": {"spectrum": {"error": "DiagnosticsError", "text": "a product overflows <b>"}},
        "skipped": {"bounds": "no time: the 3 s were over"},
        "shortened": {"metrics": "5 probes, to fit into 3 s"},
    }
    report = diagnostics.Report(data)
    for saved in (report, diagnostics.compare([report, exact])):
        elements = Elements(_page(saved, tmp_path))
        words = " ".join(elements.words)
        for said in (
            "DiagnosticsError: a product overflows <b>",
            "no time: the 3 s were over",
            "5 probes, to fit into",
        ):
            assert said in words
        assert words.index("Failed sections") < words.index("Verdicts")
        assert "b" not in {tag for tag, _ in elements.found}
    old = {key: value for key, value in data.items() if key not in ("failures", "shortened")}
    assert "Failed sections" not in _page(diagnostics.Report(old), tmp_path)  # of a file from before there were any


def test_tables_have_every_pair(estimated: diagnostics.Report, tmp_path: Path) -> None:
    estimated = diagnostics.Report(estimated.data | {"verdicts": [bottleneck_verdict()]})
    text = _page(estimated, tmp_path)
    c, error = (estimated.sections["metrics"][k] for k in ("coupling", "errors"))
    row = (
        f'<th scope="row">0</th><th scope="row">1</th><td>1</td><td>{c[0][1]:.3g} ± {error["coupling"][0][1]:.1g}</td>'
    )
    assert row in text
    for verdict in estimated.verdicts:
        assert verdict.text in " ".join(Elements(text).words)


def test_every_part_may_be_absent(tmp_path: Path) -> None:
    for sections in (["network"], ["spectrum"], ["sources", "bounds"], ["parameters"]):
        report = small_report(sections=sections)
        _page(report, tmp_path)
        if sections == ["spectrum"]:
            report.save(tmp_path / "figure.pdf")
        elif sections == ["network"]:
            with pytest.raises(DiagnosticsError, match="nothing to plot"):
                report.plot()
    flat = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    zero = diagnostics.diagnose(flat, labelled(4, 2), lambda z, _: z.mean())
    _page(zero, tmp_path)
    zero.save(tmp_path / "figure.svg")


def test_pages_of_several(exact: diagnostics.Report, estimated: diagnostics.Report, tmp_path: Path) -> None:
    comparison = diagnostics.compare([exact, estimated], names=["one", "two"])
    elements = Elements(_page(comparison, tmp_path))
    (slider,) = [a for _, a in elements.found if a.get("type") == "range"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "1", "0")
    articles = [a for tag, a in elements.found if tag == "article"]
    assert [(a["aria-label"], "hidden" in a) for a in articles] == [("one", False), ("two", True)]
    charts = {chart["id"]: chart["data"][0] for chart in elements.json("figures")["charts"]}
    for metric in ("coupling", "resonance"):
        one, two = (charts[f"r{i}-metrics-{metric}"] for i in range(2))
        assert one["zmax"] == two["zmax"] == max(v for t in (one, two) for row in t["z"] for v in row)
    words = " ".join(elements.words)
    assert all(row["quantity"] in words for row in comparison.rows)
    changed = sum(mark for row in comparison.rows for mark in row["significant"])
    assert sum(a.get("class") == "changed" for _, a in elements.found) == changed


def test_figures_of_matplotlib(exact: diagnostics.Report, estimated: diagnostics.Report, tmp_path: Path) -> None:
    figure = exact.plot()
    images = [ax.images[0] for ax in figure.axes if ax.images]
    shown = [image.get_array().tolist() for image in images]  # type: ignore[union-attr]
    assert shown == [exact.sections["metrics"][m] for m in ("coupling", "resonance", "stable_rank", "gn_gap")]
    both = diagnostics.compare([exact, estimated]).plot()
    (ax,) = [ax for ax in both.axes if "Coupling" in ax.get_title()]
    lines = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) > 1 and line.get_marker() == "o"]
    means = [[row["coupling"] for row in r.sections["metrics"]["by_distance"]] for r in (exact, estimated)]
    assert [list(line) for line in lines] == means
    for suffix, head in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        exact.save(tmp_path / f"a.{suffix}")
        first = (tmp_path / f"a.{suffix}").read_bytes()
        assert first.startswith(head)
        exact.save(tmp_path / f"a.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes() == first


@pytest.mark.parametrize(
    ("suffix", "missing"), [("html", "jinja2"), ("html", "plotly.offline"), ("png", "matplotlib.figure")]
)
def test_a_missing_library_is_named(
    exact: diagnostics.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    name = missing.partition(".")[0]
    with pytest.raises(DiagnosticsError, match=rf"need {name}.*pip install 'hessopt\[report\]'"):
        exact.save(tmp_path / f"page.{suffix}")
    assert not (tmp_path / f"page.{suffix}").exists()


def test_saving_numbers_imports_no_page(tmp_path: Path) -> None:
    code = f"""
import sys, torch, diagnostics, diagnostics.report.report, diagnostics.report.compare, diagnostics.report.cli
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
report = diagnostics.diagnose(model, (torch.randn(4, 3), torch.randn(4, 2)), torch.nn.functional.mse_loss)
report.save({str(tmp_path / "a.json")!r})
print([m for m in ("jinja2", "matplotlib", "plotly", "hessopt") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[3])  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr


def test_command_writes_pages(
    exact: diagnostics.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exact.save("a.json")
    Path("net.py").write_text(
        "from tests.helpers.reporting_networks import chain, labelled\n"
        "def make(): return chain([6, 5, 3])\n"
        "def data(): return labelled(6, 3)\n"
    )
    assert main(["show", "a.json", "--out", "a.html"]) == 0
    assert main(["compare", "a.json", "a.json", "--names", "x", "y", "--out", "two.html"]) == 0
    assert main(["compare", "a.json", "a.json", "--out", "two.png"]) == 0
    run = [
        "report",
        "net.py:make",
        "--data",
        "net.py:data",
        "--loss",
        "cross_entropy",
        "--quiet",
        "--sections",
        "metrics",
    ]
    assert main([*run, "--out", "r.html"]) == 0
    for page in ("a.html", "two.html", "r.html"):
        assert Path(page).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    run[run.index("net.py:data")] = "net.py:absent"  # what is missing is found before anything is loaded
    assert main([*run, "--out", "late.html"]) == 1
    assert "hessopt[report]" in capsys.readouterr().err


def test_deep_networks_keep_their_size(tmp_path: Path) -> None:
    model = chain([4] * 31)
    report = diagnostics.diagnose(model, labelled(4, 4), F.cross_entropy, sections=["metrics"])
    elements = Elements(_page(report, tmp_path))
    assert 0 < len([a for _, a in elements.found if "data-pair" in a]) <= 60
    assert len(elements.having("data-node")) == 30
    ticks = elements.json("figures")["charts"][0]["layout"]["xaxis"]["tickvals"]
    assert len(ticks) <= 15
