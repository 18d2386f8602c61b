"""The reproduction's page: from a few results, and from none; what it says of runs that differ from the paper's."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from examples.studies.paper.comparison import NOT_RUN, OUTSIDE, PUBLISHED, TABLES, WITHIN, compare, coverage, elsewhere
from examples.studies.paper.facts import Facts
from examples.studies.paper.figures import FIGURES
from examples.studies.paper.page import tables
from examples.studies.paper.report import main
from examples.studies.paper.run import RESULTS
from examples.studies.paper.store import Store, chosen, read

CIFAR = "CIFAR-10, 50000 training images"


def published(file: str, **where: str) -> dict[str, float]:
    """The means and deviations of one row of a published table."""
    with (PUBLISHED / file).open(newline="") as stream:
        for row in csv.DictReader(stream):
            if all(row[key] == value for key, value in where.items()):
                return {key: float(value) for key, value in row.items() if key.endswith(("_mean", "_std"))}
    raise AssertionError(f"{file} has no row with {where}")


def table_5(store: Store, seed: int, gap: float, *, epochs: int = 20, data: str = CIFAR) -> None:
    run = {"experiment": "exp3", "variant": {"activation": "silu"}, "seed": seed, "epochs": epochs, "data": data}
    rows = [
        {"phase": phase, "quantity": "gap_global", "distance": None, "value": gap} for phase in ("init", "mid", "final")
    ]
    store.add(run, rows)


def verdicts(rows: Any) -> dict[tuple[str, str], str]:
    lines = compare("exp3", TABLES["exp3"][0], rows)
    return {(line.phase, line.quantity): line.verdict for line in lines if line.variant == ("silu",)}


def test_page_of_a_few_results(tmp_path: Path) -> None:
    theirs = published("table5_exp3_gngap_isolation.csv", activation="silu", phase="init")
    assert theirs["gap_global_mean"] == pytest.approx(0.225, abs=5e-4)
    for seed in (42, 43):
        table_5(Store(tmp_path / "results" / "exp3.jsonl"), seed, 0.225)
    main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert "| silu | `gap_global` | 0.225 ± 0.0053 | 0.225 ± 0 ✓ |" in page
    assert f"Ran: {CIFAR}, 20 epochs, seeds 42, 43: 1 of 5 variants (silu)." in page
    assert "Nothing of it was run yet." in page
    assert "{{" not in page
    assert "{%" not in page
    shown = {path.name for path in (tmp_path / "docs" / "images").iterdir()}
    assert shown == {"paper_gap.png"}
    assert "](images/paper_gap.png)" in page
    assert "](images/paper_decay.png)" not in page


def test_page_of_no_results(tmp_path: Path) -> None:
    main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert "](images/" not in page
    assert f"| silu | `gap_global` | 0.225 ± 0.0053 | {NOT_RUN} |" in page


def test_committed_results_are_read(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert "not what the published code gives" in page  # Table 7
    assert len(list((tmp_path / "docs" / "images").iterdir())) > 1


def test_every_figure_needs_data() -> None:
    assert [draw([]) for draw in FIGURES.values()] == [None] * len(FIGURES)


def test_other_training_is_not_comparable(tmp_path: Path) -> None:
    store = Store(tmp_path / "exp3.jsonl")
    table_5(store, 42, 0.5, epochs=2)
    found = verdicts(store.rows)
    assert found["init", "gap_global"] == OUTSIDE  # as initialised in the paper too
    assert found["final", "gap_global"] == "not comparable: 2 of 20 epochs"
    assert found["init", "test_acc"] == NOT_RUN


def test_the_paper_s_training_is_compared(tmp_path: Path) -> None:
    store = Store(tmp_path / "exp3.jsonl")
    table_5(store, 42, 0.219)
    found = verdicts(store.rows)
    assert found["final", "gap_global"] == WITHIN


def test_a_subset_is_not_comparable() -> None:
    row = {"epochs": 50, "data": "CIFAR-100, a subset of 10000 training images"}
    assert elsewhere("exp2", "final", row) == "a subset of the images"
    assert elsewhere("exp2", "init", row) == ""


def test_real_data_and_most_epochs_are_chosen(tmp_path: Path) -> None:
    store = Store(tmp_path / "exp3.jsonl")
    table_5(store, 42, 1.0, epochs=0, data="generated images")
    table_5(store, 42, 2.0, epochs=0)
    table_5(store, 43, 3.0, epochs=20)
    table_5(store, 44, 4.0, epochs=2)
    assert {row["value"] for row in chosen(read(tmp_path))} == {3.0}
    assert coverage("exp3", chosen(read(tmp_path))) == [f"{CIFAR}, 20 epochs, seeds 43: 1 of 5 variants (silu)"]


def test_reasons_stand_below_the_table(tmp_path: Path) -> None:
    store = Store(tmp_path / "exp5.jsonl")
    run = {
        "experiment": "exp5",
        "variant": {"model": "relu_mlp"},
        "seed": 42,
        "epochs": 30,
        "data": "generated sequences",
    }
    store.add(run, [{"phase": "final", "quantity": "test_loss", "distance": None, "value": 0.2}])
    text = "\n".join(tables("exp5", store.rows))
    assert "0.2 ± 0 †" in text
    assert "† paper inconsistent: the published error lies below" in text


def test_curves_are_counted(tmp_path: Path) -> None:
    theirs = published("fig2_fig3_exp1_R_C_curves.csv", L="8", arch="plain", phase="init", d="3")
    store = Store(tmp_path / "exp1.jsonl")
    run = {"experiment": "exp1", "variant": {"L": 8, "arch": "plain"}, "seed": 42, "epochs": 0, "data": CIFAR}
    rows = [
        {"phase": "init", "quantity": "R", "distance": d, "value": value}
        for d, value in ((3, theirs["R_mean"]), (4, 10.0))
    ]
    store.add(run, rows)
    assert "| `R(d)` | init | 1 of 2 |" in "\n".join(tables("exp1", store.rows))


def test_facts() -> None:
    row = {"experiment": "exp4", "phase": "final", "quantity": "R_cross_AB"}
    rows = [
        {**row, "variant": {"k": 2, "merge": merge, "activation": activation}, "distance": d, "value": value, "seed": 1}
        for merge in ("sum", "cat")
        for activation in ("relu", "silu")
        for d, value in ((2, 1.0), (3, 2.0), (4, 6.0 if merge == "cat" else 5.0))
    ]
    facts = Facts(rows)
    assert facts.branch_ratios("final", (2,)) == "5.00 to 6.00"
    assert facts.branch_ratios("final") == f"({NOT_RUN})"  # k = 3 is missing
    assert facts.say("exp4", "2 sum relu", "final", "R_cross_AB", 4) == "5"
    assert (
        facts.ratio(("exp4", "2 cat relu", "final", "R_cross_AB", 4), ("exp4", "2 cat relu", "final", "R_cross_AB", 3))
        == "3"
    )


def test_decay_of_exponentials() -> None:
    row = {"experiment": "exp1", "phase": "init", "quantity": "R", "seed": 1}
    facts = Facts(
        [
            {**row, "variant": {"L": 8, "arch": arch}, "distance": d, "value": base**-d}
            for d in range(8)
            for arch, base in (("plain", 2.0), ("residual", 2.0**0.25))
        ]
    )
    assert facts.decay("8 plain", "init") == "0.693 (R² 1.00)"
    assert facts.slower("8 residual", "8 plain", "init") == "4"
    assert facts.slower("8 residual", "8 plain", "final") == f"({NOT_RUN})"


def test_coupling_of_one_of_the_two_networks_is_drawn(tmp_path: Path) -> None:
    run = {"experiment": "unet", "variant": {"skips": True}, "seed": 42, "epochs": 1, "data": "CIFAR-10 at 16×16"}
    pairs = {"C bottom bottom": 1.0, "C bottom decoder.2": 0.5, "C decoder.2 decoder.2": 1.0}
    rows = [{"phase": "final", "quantity": q, "distance": None, "value": value} for q, value in pairs.items()]
    Store(tmp_path / "r" / "architectures.jsonl").add(run, rows)
    main(["--results", str(tmp_path / "r"), "--docs", str(tmp_path / "docs")])
    assert [path.name for path in (tmp_path / "docs" / "images").iterdir()] == ["paper_unet.png"]
    assert "1 epoch, seeds 42: 1 of 2 variants (True)" in (tmp_path / "docs" / "paper.md").read_text()
