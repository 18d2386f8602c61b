"""Ctrl-C in the middle of a diagnosis."""

from __future__ import annotations

from diagnostics.report.compare import Comparison
from diagnostics.report.report import Report


class DiagnosisInterrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`diagnostics.diagnose`.

    Attributes:
        report: The sections that were finished, and the verdicts on them; of several checkpoints, those diagnosed.
    """

    def __init__(self, report: Report | Comparison) -> None:
        super().__init__("the diagnosis was interrupted; the finished sections are in the attribute `report`")
        self.report = report
