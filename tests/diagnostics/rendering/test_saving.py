"""What is saved takes the writer that the suffix says, and no other suffix."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from diagnostics.rendering.saving import Saved


class Note(Saved):
    _KIND, _FORMATS = "note", (".json", ".txt", ".svg")

    def __str__(self) -> str:
        return "seen"

    def to_json(self, path: Path) -> None:
        Path(path).write_text('"seen"')

    def plot(self) -> Figure:
        return Figure(figsize=(1, 1))


@pytest.mark.parametrize(("suffix", "start"), [(".json", '"seen"'), (".TXT", "seen\n"), (".svg", "<?xml")])
def test_the_suffix_says_the_format(tmp_path: Path, suffix: str, start: str) -> None:
    Note().save(tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").read_text().startswith(start)


@pytest.mark.parametrize("name", ["a.html", "a", "json"])
def test_another_suffix_is_refused_and_nothing_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"a note is saved as \.json, \.txt, \.svg; '.*{name}' has another suffix"):
        Note().save(tmp_path / name)
    assert not list(tmp_path.iterdir())
