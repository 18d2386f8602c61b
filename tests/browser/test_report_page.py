"""The page of a report in a real headless browser; `make test-browser`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

import diagnostics
from diagnostics import DiagnosisSettings
from tests.helpers.reporting_networks import bottleneck_verdict, chain, labelled, small_report

pytest.importorskip("jinja2")
pytest.importorskip("plotly")
playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
METRICS = ("coupling", "resonance", "gn_norm", "tensor_norm", "stable_rank", "gn_gap")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as runner:
        started = runner.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if as_root else [])
        yield started
        started.close()


@pytest.fixture(scope="module")
def comparison() -> diagnostics.Comparison:
    exact = diagnostics.Report(small_report(name="exact").data | {"verdicts": [bottleneck_verdict()]})
    other = diagnostics.diagnose(
        chain([6, 7, 5, 3], gain=1.7),
        labelled(6, 3),
        F.cross_entropy,
        exact=False,
        settings=DiagnosisSettings(probes=5),
    )
    return diagnostics.compare([exact, other], names=["first", "second"])


@pytest.fixture(scope="module")
def path(comparison: diagnostics.Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    comparison.save(path)
    return path


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing was written to the console, and nothing asked of the network."""
    complaints: list[str] = []
    contexts = []

    def open_page(width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: _asked(request.url, complaints))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def _asked(url: str, complaints: list[str]) -> None:
    if not url.startswith(("file:", "data:", "blob:")):
        complaints.append(f"request: {url}")


def _drawn(page: Any, name: str) -> Any:
    return page.evaluate("name => document.getElementById(name).data[0].z", name)


def _background(page: Any) -> float:
    """Mean of red, green and blue of the page's background."""
    color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_heat_maps_show_the_values_of_the_document(
    opened: Callable[..., Any], comparison: diagnostics.Comparison
) -> None:
    page = opened()
    for section in ("metrics", "parameters"):
        for metric in METRICS:
            assert _drawn(page, f"r0-{section}-{metric}") == comparison.reports[0].sections[section][metric]
            image = page.locator(f"#r0-{section}-{metric} .heatmaplayer image")
            assert image.count() == 1
    assert page.evaluate("JSON.parse(document.getElementById('documents').textContent)") == [
        report.data for report in comparison.reports
    ]


def test_pointing_at_a_cell_tells_the_figures_of_the_pair(
    opened: Callable[..., Any], comparison: diagnostics.Comparison
) -> None:
    page = opened()
    box = page.locator("#r0-metrics-coupling .nsewdrag")
    box.scroll_into_view_if_needed()
    area = box.bounding_box()
    n = len(comparison.reports[0].sections["metrics"]["nodes"])
    page.mouse.move(area["x"] + area["width"] * (1 - 0.5 / n), area["y"] + area["height"] * 0.5 / n)  # top right
    told = page.locator("#r0-metrics-coupling .hoverlayer .hovertext")
    told.wait_for()
    text = told.inner_text() if told.evaluate("e => e instanceof HTMLElement") else told.text_content()
    section = comparison.reports[0].sections["metrics"]
    assert f"{section['nodes'][0]} × {section['nodes'][-1]}" in text
    for symbol, metric in {"C": "coupling", "R": "resonance", "D": "stable_rank"}.items():
        assert f"{symbol} = {section[metric][0][-1]:.3g}" in text


def test_network_has_one_element_a_node_and_tells_its_pairs(
    opened: Callable[..., Any], comparison: diagnostics.Comparison
) -> None:
    page = opened()
    for i, report in enumerate(comparison.reports):
        names = page.locator(f"#r{i} [data-node]").evaluate_all("all => all.map(e => e.dataset.node)")
        assert sorted(names) == sorted(node["name"] for node in report.sections["network"]["nodes"])
    told = page.locator("#r0 .told")
    page.locator("#r0 [data-node]").first.hover()
    assert "parameters" in told.inner_text()
    arc = page.locator("#r0 [data-pair]").first
    arc.dispatch_event("pointerenter")
    value = comparison.reports[0].sections["metrics"]["coupling"][0][1]
    assert told.inner_text().splitlines()[:3] == ["0 × 1", "distance 1", f"C = {value:.3g}"]
    assert page.locator("#r0 [data-node].on").count() == 2


def test_slider_switches_the_checkpoint(opened: Callable[..., Any], comparison: diagnostics.Comparison) -> None:
    page = opened()
    slider = page.locator("#checkpoint")
    assert page.locator("#r1 .chart svg").count() == 0
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "1"
    assert slider.get_attribute("aria-valuetext") == "second"
    assert page.locator("article:not([hidden]) h1").inner_text() == "second"
    assert _drawn(page, "r1-metrics-coupling") == comparison.reports[1].sections["metrics"]["coupling"]
    assert page.locator("#r1-metrics-distance-coupling .errorbar").count() > 0
    page.keyboard.press("Home")
    assert page.locator("article:not([hidden]) h1").inner_text() == "first"
    charts = page.locator("#r0 .chart").count()
    assert page.locator("#r0 .chart > .plot-container").count() == charts > 12


def test_everything_is_reached_by_keyboard(opened: Callable[..., Any]) -> None:
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"checkpoint", "theme", "SUMMARY"} <= set(seen)
    summary = page.locator("#r0 .verdicts summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("#r0 .verdicts .behind").first.is_visible()
    page.locator("#r0 [data-node]").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.node") == "1"
    assert "with 0" in page.locator("#r0 .told").inner_text()
    values = page.locator("#r0 details.values").first
    values.locator("summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(opened: Callable[..., Any], scheme: str) -> None:
    page = opened(color_scheme=scheme)
    dark = scheme == "dark"
    assert (_background(page) < 60) is dark
    scale = "document.getElementById('r0-metrics-coupling').data[0].colorscale[0][1]"
    before = page.evaluate(scale)
    page.locator("#theme").click()
    assert (_background(page) < 60) is not dark
    assert page.evaluate(scale) != before
    page.emulate_media(color_scheme="light" if dark else "dark")
    assert (_background(page) < 60) is not dark


def _contrast(page: Any, selector: str) -> float:
    """WCAG 2 contrast of an element's text with the page."""
    return float(
        page.evaluate(
            """selector => {
      const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
      const pair = [getComputedStyle(document.querySelector(selector)).color,
                    getComputedStyle(document.body).backgroundColor].map(rgb).map(light).sort((a, b) => b - a);
      return (pair[0] + 0.05) / (pair[1] + 0.05);
    }""",
            selector,
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(opened: Callable[..., Any], scheme: str) -> None:
    page = opened(color_scheme=scheme)
    for selector in ("h1", ".lead", ".mark", "section > details > summary", ".changed", "footer"):
        assert _contrast(page, selector) >= 4.5, selector


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_page_fits_its_width(opened: Callable[..., Any], width: int) -> None:
    page = opened(width=width)
    page.evaluate("document.querySelectorAll('details').forEach((entry) => { entry.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in page.locator("#r0 .chart").all():
        svg = box.locator("svg.main-svg").first.bounding_box()
        assert svg["x"] >= 0
        assert svg["x"] + svg["width"] <= width + 1


def test_print_opens_details_on_white(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(color_scheme="dark")
    assert page.locator("#r0 details[open]").count() == 0
    page.emulate_media(media="print")
    playwright.expect(page.locator("#r0 details:not([open])")).to_have_count(0)
    assert _background(page) == 255
    assert page.locator(".bar").is_hidden()
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    page.emulate_media(media="screen", color_scheme="dark")
    playwright.expect(page.locator("#r0 details[open]")).to_have_count(0)
    assert _background(page) < 60
