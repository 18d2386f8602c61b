"""One tidy file of results, a line for each measured value; what is in it is not computed again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KEY = ("experiment", "variant", "seed", "epochs", "data")


class Store:
    """Rows in a JSONL file; a run is appended as a whole, so an interrupted one is done again from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break  # cut off while being written
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.done = {_key(row) for row in self.rows}

    def has(self, run: Mapping[str, Any]) -> bool:
        return _key(run) in self.done

    def add(self, run: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
        new = [{**run, **row} for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
        self.rows += new
        self.done.add(_key(run))


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row[name] for name in KEY], sort_keys=True)
