"""Files are there as a whole or not at all, whatever interrupts the write."""

from __future__ import annotations

import csv
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import diagnostics
from diagnostics.results.files import check_writable, replacing, write_text
from tests.helpers.reporting_networks import small_report


@pytest.fixture(scope="module")
def report() -> diagnostics.Report:
    return small_report()


def _interrupt(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Let the next write stop half way."""

    def half(path: Any, text: str = "half", *args: Any, **kwargs: Any) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    class Half:
        def __init__(self, file: Any) -> None:
            self.writerow = csv.writer(file).writerow

        def writerows(self, rows: Any) -> None:
            raise KeyboardInterrupt

    if kind == "csv":
        monkeypatch.setattr("diagnostics.report.report.csv", type("", (), {"writer": Half}))
    elif kind == "png":
        figure = pytest.importorskip("matplotlib.figure")
        monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: half(path))
    else:
        if kind == "html":
            pytest.importorskip("plotly")
            pytest.importorskip("jinja2")
        monkeypatch.setattr(Path, "write_text", half)


@pytest.mark.parametrize(
    ("kind", "several"),
    [(kind, False) for kind in ("json", "csv", "txt", "html", "png")]
    + [(kind, True) for kind in ("json", "txt", "html", "png")],
)
def test_interrupted_save_leaves_the_file_as_it_was(
    report: diagnostics.Report, kind: str, several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = diagnostics.compare([report, report]) if several else report
    path = tmp_path / f"report.{kind}"
    path.write_bytes(b"of yesterday")
    _interrupt(monkeypatch, kind)
    with pytest.raises(KeyboardInterrupt):
        saved.save(path)
    assert path.read_bytes() == b"of yesterday"
    assert os.listdir(tmp_path) == [path.name]


def test_link_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real.txt").stat().st_mode) == 0o640
    with replacing(tmp_path / "other.txt") as file:
        assert file.suffix == ".txt"
        file.write_text("x")
    (tmp_path / "usual.txt").write_text("x")
    assert (tmp_path / "other.txt").stat().st_mode == (tmp_path / "usual.txt").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["link.txt", "other.txt", "real.txt", "usual.txt"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe)
        write_text(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_bad_places_are_known_before_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    for path, kind in {tmp_path: IsADirectoryError, tmp_path / "no" / "x.txt": FileNotFoundError}.items():
        for use in (check_writable, lambda path: write_text(path, "x")):
            with pytest.raises(kind, match=path.name):
                use(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for use in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(PermissionError, match=r"kept\.txt"):
            use(tmp_path / "kept.txt")
    assert (tmp_path / "kept.txt").read_text() == "kept"
    assert os.listdir(tmp_path) == ["kept.txt"]
