"""Files in the format that their suffix says."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diagnostics.rendering.formats import IMAGES
from diagnostics.results.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Saved(ABC):
    """Base class of what is printed, plotted and saved: a report, and reports side by side.

    A subclass has a method ``to_json``, ``to_html`` … for every format that is neither text nor an image.
    """

    _KIND: ClassVar[str]
    """What it is, in messages."""

    _FORMATS: ClassVar[tuple[str, ...]]
    """The suffixes it is saved with."""

    @abstractmethod
    def plot(self) -> Figure:
        """A figure of its own, that pyplot does not hold; needs matplotlib."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file in the format that the suffix says; an interrupted write leaves what was there before.

        ``.json``, ``.txt`` and, of a report, ``.csv`` need nothing; the page ``.html`` and the figure of :meth:`plot`
        as ``.png``, ``.svg`` or ``.pdf`` need the extra ``report``.

        Raises:
            ValueError: another suffix.
            DiagnosticsError: a library of the extra is missing.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in self._FORMATS:
            known = ", ".join(self._FORMATS)
            raise ValueError(f"a {self._KIND} is saved as {known}; {os.fspath(path)!r} has another suffix.")
        if suffix == ".txt":
            write_text(path, f"{self}\n")
        elif suffix in IMAGES:
            from diagnostics.rendering.plot import save_figure

            save_figure(self.plot(), path)
        else:
            getattr(self, f"to_{suffix[1:]}")(path)
