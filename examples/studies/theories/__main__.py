"""Tests the claims of one of the three other theories, beside their controls.

python -m examples.studies.theories {alignment,spectral_newton,conservation,null_cone,continual} [--help]
"""

from __future__ import annotations

import argparse
import importlib

NAMES = ("alignment", "spectral_newton", "conservation", "null_cone", "continual")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.theories", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of that comparison: --help lists them")
    given = parser.parse_args()
    importlib.import_module(f"examples.studies.theories.{given.name}").main(given.options)  # of five, the one asked for


if __name__ == "__main__":
    main()
