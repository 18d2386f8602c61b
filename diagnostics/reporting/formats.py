"""The files that reports are saved as, and the libraries of the extra that some need."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from diagnostics.errors import DiagnosticsError

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


def check_libraries(path: Path) -> None:
    """Raise a DiagnosticsError if what a file of this suffix needs is missing: before minutes of work, not after."""
    suffix = path.suffix.lower()
    needed = {**dict.fromkeys(PAGES, ("jinja2", "plotly")), **dict.fromkeys(IMAGES, ("matplotlib",))}
    for name in needed.get(suffix, ()):
        library(name)
