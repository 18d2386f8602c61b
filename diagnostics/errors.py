"""Errors raised by this package: each message names the cause and the way out."""

from __future__ import annotations


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
