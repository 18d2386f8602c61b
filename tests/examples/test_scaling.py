from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.benchmarks import scaling

WIDE = 1024


def _tiny() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_counts_of_a_tiny_network_by_hand() -> None:
    """Factors of 4 and 4, 5 and 2 dimensions, biases included; all of it too little for owners."""
    model, tokens = _tiny(), 80
    received = 2 * (2 / 3) * 4  # bytes a number of an all-reduce on three
    parameters, numbers = 4 * 4 + 2 * 5, 4**2 + 4**2 + 5**2 + 2**2
    assert scaling.gradients(model, 3) == scaling.Load(received * parameters, 0)
    column = tokens * (3 * 4 + 4 * 2)

    kept = {4: tokens // min(tokens // (4 * 4), tokens // 8), 5: tokens // min(tokens // (4 * 5), tokens // 8)}
    update = column + kept[4] * (4**2 + 4**2) + kept[5] * (5**2 + 2**2)
    refresh = 25 * (4**3 + 4**3 + 5**3 + 2**3)
    first = 4 * 4 * (2 * 4 + 4) + 4**2 * (14 * 4 + 4 * 4)  # of products with factors whose powers are full
    second = 2 * 5 * (2 * 2 + 5) + 2**2 * (14 * 2 + 4 * 2)
    found = scaling.spectral(model, 3, tokens)
    assert found.computed == pytest.approx(update / 10 + refresh / 40 + first + second, rel=1e-12)
    assert found.received == pytest.approx(received * (parameters + numbers / 10 + 2**2 / 10), rel=1e-12)

    update = column + tokens * numbers
    refresh = 4 * (4**3 + 4**3 + 5**3 + 2**3)
    solve = 4 * 4 * (4 + 4) + 2 * 5 * (2 + 5)
    found = scaling.kronecker(model, 3, tokens)
    assert found.computed == pytest.approx(update / 10 + refresh / 40 + solve, rel=1e-12)
    assert found.received == pytest.approx(received * (parameters + numbers / 10), rel=1e-12)


def test_owners_share_what_is_large() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(4)))
    matrix = WIDE * WIDE
    ns = 5 * 3 * WIDE**3
    assert scaling.muon(model, 2, 1) == scaling.Load(4 * matrix * 4 + 2 * matrix * 4, 2 * ns)
    alone, two, four = (scaling.spectral(model, n, 1).computed for n in (1, 2, 4))
    assert alone - two == pytest.approx(2 * (two - four), rel=1e-12)  # halves, and what all do for themselves
    # of eight processes four own nothing and receive everything
    eight = scaling.shared([scaling.Work(1e9, 10)] * 4, 8)
    assert eight == scaling.Load(40 * scaling.BYTES, 1e9)


def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(scaling.SIZES, "124M", (1, 8, 2, 4))
    path = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["scaling", "--sizes", "124M", "--processes", "1", "2", "--json", str(path)])
    scaling.main()
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * len(scaling.OPTIMIZERS)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
    assert [row["received"] for row in rows if row["processes"] == 1] == [0] * len(scaling.OPTIMIZERS)
    assert all(row["received"] > 0 for row in rows if row["processes"] == 2)
