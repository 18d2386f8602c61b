"""The files that reports are saved as, and the libraries of the extra that some need."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diagnostics.errors import DiagnosticsError
from diagnostics.results.files import check_writable

PAGES, IMAGES = (".html",), (".png", ".svg", ".pdf")
REPORT_FORMATS = (".json", ".csv", ".txt", *PAGES, *IMAGES)
COMPARISON_FORMATS = (".json", ".txt", *PAGES, *IMAGES)
EXTRA = "report"


def library(name: str) -> Any:
    """A module of the extra ``report``, imported when it is first needed.

    Raises:
        DiagnosticsError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DiagnosticsError(
            f"pages and figures need {name.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'hessopt[{EXTRA}]'."
        ) from error


def check_out(out: str | os.PathLike[str], formats: Sequence[str]) -> None:
    """Raise a DiagnosticsError if a file cannot be written, for any reason known before: minutes of work are not lost.

    Args:
        out: The file.
        formats: Suffixes that it may have.
    """
    place = Path(out)
    if place.is_dir():
        raise DiagnosticsError(f"--out {out} is a folder: name a file in it, such as {place / f'report{formats[0]}'}.")
    if place.suffix.lower() not in formats:
        raise DiagnosticsError(f"--out {out}: reports are written as {', '.join(formats)}.")
    check_place("--out", place)
    check_libraries(place)


def check_place(option: str, place: Path) -> None:
    """Raise a DiagnosticsError if there is no folder to write a file into, or it may not be written."""
    if not place.parent.is_dir():
        raise DiagnosticsError(f"{option} {place}: there is no folder {place.parent}.")
    try:
        check_writable(place)
    except OSError as error:
        raise DiagnosticsError(f"{option} {place} cannot be written: {error.strerror}.") from error


def check_libraries(path: Path) -> None:
    """Raise a DiagnosticsError if what a file of this suffix needs is missing: before minutes of work, not after."""
    suffix = path.suffix.lower()
    needed = {**dict.fromkeys(PAGES, ("jinja2", "plotly")), **dict.fromkeys(IMAGES, ("matplotlib",))}
    for name in needed.get(suffix, ()):
        library(name)
