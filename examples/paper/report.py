"""Writes docs/paper.md and its figures from the results, and from nothing else.

python examples/paper/report.py [--results DIR …] [--docs DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name
matplotlib.use("Agg")

from paper.figures import draw_all
from paper.page import write
from paper.run import RESULTS
from paper.store import chosen, read

DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[RESULTS], help="folders of results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of paper.md and images")
    options = parser.parse_args(arguments)
    rows = chosen(row for folder in options.results for row in read(folder))
    figures = draw_all(rows, options.docs / "images")
    write(rows, figures, options.docs / "paper.md")
    print(f"{options.docs / 'paper.md'}: {len(rows)} values, {len(figures)} figures")


if __name__ == "__main__":
    main()
