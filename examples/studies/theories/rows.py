"""Finished runs in a file of one JSON object a line, so that a comparison that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Key: TypeAlias = "str | int | float"


class Rows:
    """What runs gave, by what they were.

    Args:
        path: Read if it exists, extended by every new run. None: nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
        self.rows: list[dict[str, Key]] = [json.loads(line) for line in text.splitlines()]

    def get(self, run: Callable[[], dict[str, float]], **key: Key) -> dict[str, float]:
        """The values of the run with this key; ``run`` gives them, if it has not been run."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return {name: float(value) for name, value in row.items() if name not in key}
        values = {name: round(value, 4) for name, value in run().items()}
        self.rows.append({**key, **values})
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        return values
