"""Errors raised by this package: each message names the cause and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diagnostics.compare import Comparison
    from diagnostics.report import Report


class DiagnosticsError(RuntimeError):
    """Base class of the errors of this package."""


class CaptureError(DiagnosticsError):
    """The model, its inputs or its loss cannot be captured."""


class StaleGraphError(DiagnosticsError):
    """The parameters changed after the capture, so the recorded graph describes another network."""


class MemoryBudgetError(DiagnosticsError):
    """The computation needs more memory than it was allowed."""


class SectionFailedWarning(UserWarning):
    """Sections of a report failed; the report has the others, and the errors as ``report.failures``."""


class DiagnosisInterrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`diagnostics.diagnose`.

    Attributes:
        report: The sections that were finished, and the verdicts on them; of several checkpoints, those diagnosed.
    """

    def __init__(self, report: Report | Comparison) -> None:
        super().__init__("the diagnosis was interrupted; the finished sections are in the attribute `report`")
        self.report = report
