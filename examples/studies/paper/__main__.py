"""Reproduces one of the paper's experiments, or without a name all, or all tables and figures from the results.

python -m examples.studies.paper exp3 --data DIR [--seeds 42 43 44] [--epochs N] [--only activation=gelu]
python -m examples.studies.paper exp3 --quick
python -m examples.studies.paper --data DIR
python -m examples.studies.paper report [--results DIR …] [--docs DIR]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from examples.studies.paper.run import main as run


def main(arguments: Sequence[str] | None = None) -> None:
    """The report for ``report``, the experiments otherwise."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["report"]:
        from examples.studies.paper.report import main as report  # with matplotlib

        report(given[1:])
    else:
        run(__doc__, given)


if __name__ == "__main__":
    main()
