"""Time to target, verdicts and the page, from hand-made curves and a small study."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from examples.studies.ablation.page import Page
from examples.studies.ablation.parts import main_rows, part_tables
from examples.studies.ablation.results import Entry, entries, standing, to_target, verdicts
from examples.studies.ablation.table import Table
from tests.examples.ablation.toys import BATCHES, FULL, NEVER, OURS, SGD, session

CURVE = [[0.0, 0, 0, 8.0], [1.0, 10, 1, 4.0], [3.0, 30, 2, 6.0], [5.0, 60, 3, 2.0], [7.0, 90, 4, 1.0]]


@pytest.mark.parametrize(
    ("target", "seconds", "work"),
    [(9.0, 0.0, 0.0), (8.0, 0.0, 0.0), (6.0, 0.5, 5.0), (4.0, 1.0, 10.0), (3.0, 4.5, 52.5), (1.0, 7.0, 90.0)],
)
def test_time_to_target(target: float, seconds: float, work: float) -> None:
    assert to_target(CURVE, target) == pytest.approx(seconds)
    assert to_target(CURVE, target, 1) == pytest.approx(work)


def test_a_target_below_the_curve_is_not_reached() -> None:
    assert to_target(CURVE, 0.99) == float("inf")


def entry(
    problem: str, name: str, *curves: list[tuple[float, float]], ours: bool = False, role: str = "tuned"
) -> Entry:
    full = tuple([[t, 10 * t, i, f] for i, (t, f) in enumerate(curve)] for curve in curves)
    finals = tuple(curve[-1][3] for curve in full)
    return Entry(problem, problem[0], name, role, "", ours, {}, finals, full, ())


def test_verdict_by_hand() -> None:
    slow = [entry("x", "slow", [(0, 9), (8, 1)], [(0, 9), (6, 2)], [(0, 9), (10, 3)])]
    worse = [entry("x", "worse", [(0, 9), (1, 5)])]
    ours = [
        entry("x", "ours", [(0, 9), (1, 2)], [(0, 9), (3, 1)], [(0, 9), (4, 5)], ours=True, role="default"),
        entry("x", "ours", [(0, 9), (1, 8)], [(0, 9), (1, 1)], [(0, 9), (1, 8)], ours=True),
    ]
    (verdict,) = verdicts([*slow, *worse, *ours])
    assert (verdict.best_peer.contender, verdict.target) == ("slow", 2)
    assert verdict.seconds == pytest.approx(7)  # 7 and 6, and not reached: the median is 7
    assert verdict.work == pytest.approx(70)
    # 1, 3 · 7/8 and not reached
    assert verdict.ratios == {
        ("ours", "default", ""): pytest.approx(3 * 7 / 8 / 7),
        ("ours", "tuned", ""): float("inf"),
    }


def test_rounding_errors_do_not_decide() -> None:
    peer = entry("x", "peer", [(0, 1.0), (4, 1e-17)])
    ours = entry("x", "ours", [(0, 1.0), (2, 1e-11)], ours=True)
    (verdict,) = verdicts([peer, ours])
    assert verdict.target == 1e-10
    assert verdict.ratios["ours", "tuned", ""] == pytest.approx(0.5, rel=1e-6)


def test_standing_by_hand() -> None:
    def problem(name: str, time: float | None) -> list[Entry]:
        end = (1.0, 7.0) if time is None else (time, 1.0)
        peer = entry(name, "peer", [(0, 9.0), (10.0, 1.0)])
        return [peer, entry(name, "ours", [(0, 9.0), end], ours=True)]

    # Families a: 0.2 and never (half of them are enough); b: never; c: 3.
    found = verdicts([*problem("a1", 2.0), *problem("a2", None), *problem("b1", None), *problem("c1", 30.0)])
    standings = standing(found, [("ours", "tuned", "")])
    assert (standings.families, standings.reached, standings.ratio) == (3, 2, pytest.approx(3))
    assert standing(found, [("ours", "default", "")]).reached == 0


def test_what_does_not_apply_has_an_entry_with_the_reason(tmp_path: Path) -> None:
    rows = session(tmp_path / "table.jsonl").run().rows
    found = entries(rows, {c.name: c for c in (SGD, OURS, NEVER)})
    (never,) = [e for e in found if e.contender == "never" and e.problem == "full"]
    assert never.role == "tuned"
    assert not never.curves
    assert never.final == float("inf")
    assert never.reasons[0].startswith("does not apply: ValueError: schedule must be")


def page(rows: list[dict[str, Any]]) -> Page:
    return Page(rows, {c.name: c for c in (SGD, OURS, NEVER)}, {p.name: p for p in (FULL, BATCHES)})


def test_the_page_is_made_from_the_table_alone(tmp_path: Path) -> None:
    table = session(tmp_path / "table.jsonl").run()
    page(table.rows).write(tmp_path / "one" / "ablation.md", tmp_path / "one" / "images")
    page(Table(table.path).rows).write(tmp_path / "two" / "ablation.md", tmp_path / "two" / "images")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert [path.name for path in files] == ["ablation.md", "batches.png", "full.png"]
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_the_page_shows_every_entry_and_who_wins(tmp_path: Path) -> None:
    rows = session(tmp_path / "table.jsonl").run().rows
    text = page(rows).text()
    for problem in ("Full batch", "Mini-batches"):
        _, _, rest = text.partition(f"### {problem}")
        section = rest.split("### ")[0].split("\n## ")[0]
        for name in ("| sgd (lr 0.3) |", "**ours, tuned** (lr 0.3)", "**ours, defaults**"):
            assert name in section
        assert "- never, tuned: ValueError: schedule must be" in section
        assert "(images/ablation/" in section
        assert "ours: fast" not in section
    parts = text.partition("## What the parts contribute")[2].partition("\n## ")[0]
    assert "| | Full batch | Mini-batches |" in parts
    fast = {
        name: median(row["final"] for row in rows if row["label"] == "fast" and row["problem"] == name)
        for name in ("full", "batches")
    }
    line, _ = (line for line in parts.splitlines() if line.startswith("| ours: fast |"))  # in time, and in work
    assert [float(cell.strip(" *")) for cell in line.split("|")[2:4]] == [
        pytest.approx(fast[name], rel=5e-3) for name in ("full", "batches")
    ]
    # Of two numbers of steps at one learning rate, the more steps win: ours has one more.
    best = median(row["final"] for row in rows if row["contender"] == "sgd" and row["role"] == "tuned"
                  and row["problem"] == "full")  # fmt: skip
    assert f"- **Full batch**: the best peer is sgd ({best:.3g}). ours, tuned gets there in" in text
    assert "| ours, tuned | 2 of 2 |" in text
    assert "seeds 1, 2, 3; 3 trials" in text


def test_figures_of_held_out_data_have_a_column(tmp_path: Path) -> None:
    rows = session(tmp_path / "table.jsonl").run().rows
    assert "test rmse" not in page(rows).text()
    for row in rows:
        if row["problem"] == "full" and row["contender"] != "never":
            row["measured"] = {**row["measured"], "test_loss": 7.0, "test_rmse": float(row["seed"])}
    _, _, rest = page(rows).text().partition("### Full batch")
    section, _, others = rest.partition("### Mini-batches")
    assert "| reached | test rmse: median (range) |" in section
    assert "| 2 (1 to 3) |" in section
    assert "test loss" not in section
    assert "test rmse" not in others


def test_a_loss_is_told(tmp_path: Path) -> None:
    rows = session(tmp_path / "table.jsonl").run().rows
    for row in rows:
        if row["contender"] == "ours":
            row["curve"] = row["curve"][:1]
            row["final"] = row["curve"][-1][3] if row["curve"] else None
    text = page(rows).text()
    assert text.count("None of ours gets there: the best, ours") == 2
    assert "| ours, tuned | 0 of 2 | ∞ |" in text


def test_no_rows_no_claims() -> None:
    text = page([]).text()
    assert "There are no runs yet." in text
    assert "|" not in text


def test_of_several_studies_of_a_problem_the_one_with_most_time_counts(tmp_path: Path) -> None:
    rows = session(tmp_path / "table.jsonl").run().rows
    longer = [
        {**row, "study": "longer", "budget": {**row["budget"], "seconds": 10 * row["budget"]["seconds"]}}
        for row in rows
        if row["problem"] == "full" and row["role"] != "variant"
    ]
    # Ours takes no part in this one: it does not count, however long it is.
    peers = [
        {**row, "study": "peers", "budget": {**row["budget"], "seconds": 100 * row["budget"]["seconds"]}}
        for row in rows
        if row["contender"] == "sgd"
    ]
    # Nor does one of equal steps.
    counted = [{**row, "study": "steps", "budget": {**row["budget"], "seconds": 1e9, "steps": 5}} for row in rows]
    found = main_rows([*rows, *longer, *peers, *counted], {c.name: c for c in (SGD, OURS, NEVER)})
    assert {(row["problem"], row["study"]) for row in found} == {("full", "longer"), ("batches", rows[0]["study"])}
    assert not [row for row in found if row["role"] == "variant"]


def test_notes_are_part_of_the_page(tmp_path: Path) -> None:
    rows = session(tmp_path / "table.jsonl").run().rows
    by_name = {c.name: c for c in (SGD, OURS, NEVER)}
    assert "## What was learned" in Page(rows, by_name, {}, "## What was learned\n\nNothing.").text()


def test_parts_at_equal_work_by_hand(tmp_path: Path) -> None:
    rows = session(tmp_path / "table.jsonl").run().rows
    (row,) = [row for row in rows if row["label"] == "fast" and row["problem"] == "full" and row["seed"] == 1]
    base = {**row, "seed": 1}
    short = [[0.0, 0, 0, 9.0], [1.0, 10, 1, 5.0]]
    long = [[0.0, 0, 0, 9.0], [1.0, 8, 1, 7.0], [2.0, 11, 2, 3.0]]
    made = [
        {**base, "label": "short", "curve": short, "final": 5.0},
        {**base, "label": "long", "curve": long, "final": 3.0},
    ]
    (parts,) = part_tables(made, {c.name: c for c in (SGD, OURS, NEVER)}, {})
    (_, ends), (_, equal) = parts.tables
    assert ends.splitlines()[2:] == ["| ours: long | **3** |", "| ours: short | 5 |"]
    assert equal.splitlines()[2:] == ["| ours: long | 7 |", "| ours: short | **5** |"]


def test_parts_at_equal_steps_by_hand(tmp_path: Path) -> None:
    rows = session(tmp_path / "table.jsonl").run().rows
    (row,) = [row for row in rows if row["label"] == "fast" and row["problem"] == "full" and row["seed"] == 1]
    base = {**row, "seed": 1, "budget": {**row["budget"], "steps": 7}}
    made = [
        {**base, "label": "dear", "curve": [[0.0, 0, 0, 9.0], [4.0, 10, 7, 3.0]], "final": 3.0},
        {**base, "label": "cheap", "curve": [[0.0, 0, 0, 9.0], [1.0, 8, 7, 5.0]], "final": 5.0},
        {**base, "label": "unfinished", "curve": [[0.0, 0, 0, 9.0], [0.5, 8, 6, 6.0]], "final": 6.0},
    ]
    (parts,) = part_tables(made, {c.name: c for c in (SGD, OURS, NEVER)}, {})
    (_, ends), (_, seconds) = parts.tables
    assert "full, after 7 steps" in ends
    assert ends.splitlines()[2:] == ["| ours: cheap | 5 |", "| ours: dear | **3** |", "| ours: unfinished | 6 |"]
    assert seconds.splitlines()[2:] == ["| ours: cheap | **1** |", "| ours: dear | 4 |"]
