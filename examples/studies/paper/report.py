"""Writes docs/paper.md and its figures from the results, and from nothing else.

python -m examples.studies.paper report [--results DIR …] [--docs DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from examples.studies.paper.figures import draw_all
from examples.studies.paper.page import write
from examples.studies.paper.run import RESULTS
from examples.studies.paper.store import chosen, read

DOCS = Path(__file__).parents[3] / "docs"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.paper report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, nargs="+", default=[RESULTS], help="folders of results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of paper.md and images")
    options = parser.parse_args(arguments)
    rows = chosen(row for folder in options.results for row in read(folder))
    figures = draw_all(rows, options.docs / "images")
    write(rows, figures, options.docs / "paper.md")
    print(f"{options.docs / 'paper.md'}: {len(rows)} values, {len(figures)} figures")
