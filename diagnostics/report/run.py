"""Sections one after another: those that are finished are a report, whatever becomes of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diagnostics.document.judge import judge
from diagnostics.document.values import encode
from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.report.budget import Budget, Costs
from diagnostics.report.partial import Partial
from diagnostics.report.report import Report
from diagnostics.report.workbench import Workbench

Section = Callable[[Workbench], dict[str, Any]]

KEPT = (
    DiagnosticsError,
    ArithmeticError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    np.linalg.LinAlgError,
    NotImplementedError,
    torch.OutOfMemoryError,
    MemoryError,
)
"""Errors that cost a report one section: what this package refuses, a numerical failure, an operation of the network
without the derivative that the section takes, memory that ran out. Any other is a fault, and is raised."""


class Run:
    """The sections of one diagnosis.

    Args:
        bench: The network on its data.
        header: What the report says beside its sections.
        partial: What an earlier run has finished, and where to keep what this one does.
        budget: The seconds that it may take.
    """

    def __init__(self, bench: Workbench, header: Mapping[str, Any], partial: Partial, budget: Budget) -> None:
        self._bench, self._header, self._partial, self._budget = bench, header, partial, budget
        self._costs = Costs(bench)
        self._wanted: list[str] = []
        self._done: set[str] = set()
        self._skipped: dict[str, str] = {}
        self._shortened: dict[str, str] = {}
        self.failures: dict[str, dict[str, str]] = {}

    def sections(self, wanted: Mapping[str, Section], progress: bool) -> None:
        """Run sections, in the order of the mapping, or by value where seconds are limited."""
        self._wanted = list(wanted)
        self._done = {name for name in wanted if name in self._partial.sections}
        order = [name for name in self._budget.order(self._wanted) if name not in self._done]
        with tqdm(order, desc="diagnose", leave=False, disable=None if progress else True) as bar:
            for i, name in enumerate(bar):
                bar.set_postfix_str(name)
                self._run(name, wanted[name], order[i + 1 :])

    def report(self) -> Report:
        """A report of what is finished by now; at least ``network`` is.

        Sections not reached yet count as left out by an interruption.
        """
        done = {name: self._partial.sections[name] for name in self._wanted if name in self._done}
        known = {*done, *self._skipped, *self.failures}
        interrupted = {name: "interrupted before it was finished" for name in self._wanted if name not in known}
        data: dict[str, Any] = encode(
            {
                **self._header,
                "sections": {name: result["figures"] for name, result in done.items()},
                "skipped": self._skipped | interrupted,
                "shortened": self._shortened,
                "failures": self.failures,
                "seconds": {name: result["seconds"] for name, result in done.items()},
            }
        )
        data["verdicts"] = [encode(verdict.to_dict()) for verdict in judge(data)]
        return Report(data)

    @property
    def begun(self) -> bool:
        """Whether there is a section without which there is no report."""
        return "network" in self._done

    def _run(self, name: str, section: Section, rest: Sequence[str]) -> None:
        start = time.perf_counter()
        try:
            share = self._budget.share(name, rest, self._costs)
            if share.refused is not None:
                self._skipped[name] = f"no time: {share.refused}"
                return
            if share.probes is not None:
                self._bench.cut[name] = share.probes
            result = section(self._bench)
        except MemoryBudgetError as error:
            self._skipped[name] = str(error)
            return
        except KEPT as error:
            if name == "network":
                raise
            self.failures[name] = {"error": type(error).__name__, "text": str(error)}
            return
        if name in self._bench.cut:
            probes = "fewer products" if name == "spectrum" else f"{self._bench.cut[name]} probes"
            self._shortened[name] = f"{probes}, to fit into {self._budget.seconds:g} s"
        if name in self._bench.reduced:
            memory = f"{self._bench.reduced[name]}, to fit into the memory limit"
            self._shortened[name] = "; ".join([*filter(None, [self._shortened.get(name)]), memory])
        self._partial.add(name, {"figures": encode(result), "seconds": time.perf_counter() - start})
        self._done.add(name)
