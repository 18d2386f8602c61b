"""A study runs what it says, once, and goes on where it was interrupted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from examples.studies.ablation import runner
from examples.studies.ablation.optimizers import CONTENDERS
from examples.studies.ablation.study import Session, Study
from examples.studies.ablation.table import Table
from tests.examples.ablation.toys import session, timeless


def test_a_study_runs_what_it_says(tmp_path: Path) -> None:
    here = session(tmp_path / "table.jsonl")
    runs, seconds = here.estimate()
    rows = here.run().rows
    count = {(c, role): 0 for c in ("sgd", "ours", "never") for role in ("tuning", "tuned", "default", "variant")}
    for row in rows:
        count[row["contender"], row["role"]] += 1
    assert count.pop(("sgd", "tuning")) == count.pop(("ours", "tuning")) == count.pop(("never", "tuning")) == 2 * 3
    assert count.pop(("sgd", "tuned")) == count.pop(("ours", "tuned")) == 2 * 3
    assert count.pop(("ours", "default")) == count.pop(("ours", "variant")) == 2 * 3
    assert set(count.values()) == {0}
    assert runs == len(rows) + 2 * 3  # all but the seeds of what does not apply
    assert seconds == 1e6 * (0.5 * 18 + 30)
    assert {row["seed"] for row in rows if row["role"] == "tuning"} == {0}
    assert {row["seed"] for row in rows if row["role"] != "tuning"} == {1, 2, 3}
    tuned = {row["contender"]: row["settings"] for row in rows if row["role"] == "tuned" and row["problem"] == "full"}
    best = {
        name: min((r for r in rows if (r["role"], r["contender"], r["problem"]) == ("tuning", name, "full")),
                  key=lambda r: r["final"])["settings"]
        for name in ("sgd", "ours")
    }  # fmt: skip
    assert tuned == best
    assert all(row["settings"] == {} for row in rows if row["role"] == "default")
    assert here.estimate() == (0, 0)


def test_an_interrupted_study_goes_on_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = session(tmp_path / "whole.jsonl").run().rows
    path = tmp_path / "parts.jsonl"
    made = itertools.count(1)
    real = runner.run

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(made) == 11:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("examples.studies.ablation.study.run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session(path).run()
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    assert len(Table(path).rows) == 10
    parts = session(path).run().rows
    assert timeless(parts) == timeless(whole)
    assert timeless(Table(path).rows) == timeless(whole)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("everything is there")

    monkeypatch.setattr("examples.studies.ablation.study.run", forbidden)
    session(path).run()
    monkeypatch.setattr("examples.studies.ablation.study.run", real)
    more = session(path, seeds=[1, 2, 3, 4]).run().rows
    assert {row["seed"] for row in more[len(whole) :]} == {4}


def test_dropped_rows_are_run_again(tmp_path: Path) -> None:
    here = session(tmp_path / "table.jsonl")
    before = len(here.run().rows)
    ours = sum(row["contender"] == "ours" for row in here.table.rows)
    assert here.table.drop(["ours"]) == ours > 0
    assert len(Table(tmp_path / "table.jsonl").rows) == before - ours
    assert len(session(tmp_path / "table.jsonl").run().rows) == before


def test_bad_studies(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tuning seed 0 is one of the seeds"):
        session(tmp_path / "table.jsonl", seeds=[0, 1])
    with pytest.raises(ValueError, match="there is no contender 'adma'"):
        session(tmp_path / "table.jsonl", contenders=["adma"])
    with pytest.raises(ValueError, match="sgd has 3 settings, and the study has 4 trials"):
        session(tmp_path / "table.jsonl", trials=4)
    file = tmp_path / "study.toml"
    file.write_text("problems = []\ncontenders = []\nseeds = [1]\nsecond = 3\n")
    with pytest.raises(ValueError, match="unknown settings \\['second'\\]"):
        Study.load(file)


@pytest.mark.parametrize(
    "path", sorted((Path(runner.__file__).parent / "studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_studies_are_valid(path: Path) -> None:
    pytest.importorskip("sklearn")
    from examples.shared.problems import PROBLEMS

    study = Study.load(path)
    runs, seconds = Session(study, Table(path.with_suffix(".none")), PROBLEMS, CONTENDERS).estimate()
    assert runs > 0
    assert seconds < 3 * 3600 or set(study.steps) == set(study.problems)  # there seconds are no more than a guard
    assert len(study.seeds) >= 3
