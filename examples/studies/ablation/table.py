"""The results table: one JSON object a line and a run, appended as runs end."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from diagnostics.results.files import write_text

Row: TypeAlias = dict[str, Any]


class Table:
    """Rows in a file, found by their key.

    Args:
        path: Is made where it does not exist. A last line that an interruption cut short is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            text = path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                text = text[: text.rfind("\n") + 1]
                write_text(path, text)
            self.rows = [json.loads(line) for line in text.splitlines()]
        self._by_key = {row["key"]: row for row in self.rows}

    def find(self, key: str) -> Row | None:
        return self._by_key.get(key)

    def append(self, row: Row) -> Row:
        """Add a row to the file at once, its numbers rounded to five digits."""
        row = _rounded(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self.rows.append(row)
        self._by_key[row["key"]] = row
        return row

    def drop(self, names: list[str]) -> int:
        """Remove the rows of these contenders or problems, to run them again; returns their number."""
        kept = [row for row in self.rows if not {row["contender"], row["problem"]} & set(names)]
        dropped = len(self.rows) - len(kept)
        if dropped:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            write_text(self.path, lines)
        self.rows, self._by_key = kept, {row["key"]: row for row in kept}
        return dropped


def key_of(facts: Mapping[str, Any]) -> str:
    """Short hash of all that a run's result depends on."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
