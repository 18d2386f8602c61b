"""One tidy file of results, a line for each trained network; what is in it is not computed again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diagnostics.results.files import write_text

KEY = ("experiment", "variant", "seed", "epochs", "data")


class Store:
    """Runs in a JSONL file; each is written as a whole, so an interrupted one is done again from its start.

    A line has the fields of :data:`KEY` and ``values``: ``{phase: {quantity: value}}``, or ``{phase: {quantity:
    {distance: value}}}``, with six digits.

    Attributes:
        rows: A value each: the fields of :data:`KEY`, ``phase``, ``quantity``, ``distance`` or None, ``value``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        runs = list(_read(path)) if path.exists() else []
        if runs:
            write_text(path, "".join(json.dumps(run) + "\n" for run in runs))  # without a line that was cut off
        self.done = {_key(run) for run in runs}
        for run in runs:
            self.rows += _rows(run)

    def has(self, run: Mapping[str, Any]) -> bool:
        return _key(run) in self.done

    def add(self, run: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
        values: dict[str, dict[str, Any]] = {}
        for row in rows:
            phase, value = values.setdefault(row["phase"], {}), float(f"{row['value']:.6g}")
            if row["distance"] is None:
                phase[row["quantity"]] = value
            else:
                phase.setdefault(row["quantity"], {})[str(row["distance"])] = value
        line = {**{name: run[name] for name in KEY}, "values": values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.rows += _rows(line)
        self.done.add(_key(run))


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of all files of a folder."""
    return [row for path in sorted(folder.glob("*.jsonl")) for run in _read(path) for row in _rows(run)]


def chosen(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each experiment and variant the rows to report: those of real data, of these those of most epochs."""
    rows = list(rows)
    best: dict[str, tuple[bool, int]] = {}
    for row in rows:
        best[_network(row)] = max(_rank(row), best.get(_network(row), (False, -1)))
    return [row for row in rows if _rank(row) == best[_network(row)]]


def _rank(row: Mapping[str, Any]) -> tuple[bool, int]:
    return not row["data"].startswith("generated images"), row["epochs"]


def _network(row: Mapping[str, Any]) -> str:
    return json.dumps([row["experiment"], row["variant"]], sort_keys=True)


def _read(path: Path) -> Iterable[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            run: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            break  # cut off while being written
        yield run


def _rows(run: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    about = {name: run[name] for name in KEY}
    for phase, quantities in run["values"].items():
        for quantity, value in quantities.items():
            by_distance = value if isinstance(value, dict) else {None: value}
            for distance, number in by_distance.items():
                at = None if distance is None else int(distance)
                yield {**about, "phase": phase, "quantity": quantity, "distance": at, "value": number}


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row[name] for name in KEY], sort_keys=True)
