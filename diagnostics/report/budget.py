"""The seconds that a diagnosis may take: what each section needs, and what it gets of what is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diagnostics.matrix_free.injections import Injections
from diagnostics.matrix_free.pair_products import PairProducts
from diagnostics.matrix_free.routing import route
from diagnostics.report.parameter_sections import by_node
from diagnostics.report.workbench import Workbench

VALUE = ("network", "metrics", "spectrum", "parameters", "sources", "bounds")
"""Sections in the order of what they tell; those at the end are the first to be left out."""
LEAST_PROBES = 3
_LONG_SPECTRUM, _SHORT_SPECTRUM = 1500, 50
"""Products of an estimated spectrum with all probes and steps, and with as few as for large networks."""
_COLUMNS = 4
"""Vectors at a node of which the time of one is measured: together they take less than alone."""
_FURTHER = 15
"""Vectors a node that estimated metrics multiply beside the probes: deflated directions and some rounds for ‖H‖₂."""


@dataclass(frozen=True)
class Cost:
    """What a section is predicted to take.

    Attributes:
        fixed: Seconds whatever the number of probes.
        each: Seconds a probe.
        most: Probes without a limit; 0: the section cannot be shortened.
        least: Fewest probes.
    """

    fixed: float
    each: float = 0.0
    most: int = 0
    least: int = 0

    @property
    def seconds(self) -> tuple[float, float]:
        """Shortened as far as it can be, and whole."""
        return self.fixed + self.each * self.least, self.fixed + self.each * self.most

    def probes(self, seconds: float) -> int:
        """As many as there is time for, at least the fewest and at most all."""
        fitting = self.most if self.each == 0 else int(min((seconds - self.fixed) / self.each, self.most))
        return max(self.least, fitting)


@dataclass(frozen=True)
class Share:
    """What a section gets.

    Attributes:
        probes: How many; None: all.
        refused: Why there is no time for it.
    """

    probes: int | None = None
    refused: str | None = None


class Budget:
    """Seconds from now on, and how they are shared out among sections, in the order :data:`VALUE`.

    Args:
        seconds: None: no limit.

    Raises:
        ValueError: it is not positive and finite.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"seconds must be positive and finite, or None, got {seconds}.")
        self.seconds = seconds
        self._end = math.inf if seconds is None else time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.perf_counter()

    def order(self, sections: Sequence[str]) -> list[str]:
        """As they are, or by value where seconds are limited."""
        return list(sections) if self.seconds is None else [section for section in VALUE if section in sections]

    def share(self, section: str, rest: Sequence[str], costs: Costs) -> Share:
        """What a section gets of the seconds that are left.

        Args:
            section: The one to come.
            rest: Those after it. What they take when shortened is kept back as long as it fits beside this one.
            costs: What they take.
        """
        if self.seconds is None or section == "network":
            return Share()
        if self.left <= 0:
            return Share(refused=f"the {self.seconds:g} s were over")
        cost = costs.of(section, self.left)
        short, whole = cost.seconds
        left = self.left
        if short > left:
            of = f"{_shown(left)} s of {self.seconds:g} s were left"
            return Share(refused=f"it takes about {_shown(short)} s at least, and {of}")
        available = left
        for other in rest:
            needed = costs.of(other, self.left).seconds[0]
            if available - needed >= short:
                available -= needed
        probes = cost.probes(available)
        return Share(probes) if whole > available and probes < cost.most else Share()


class Costs:
    """Predictions for the sections of a network, from the time that one product of each kind takes.

    Args:
        bench: The network on its data.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self._found: dict[str, float] = {}

    def of(self, section: str, left: float) -> Cost:
        """Seconds that a section takes, to within a small factor. Measures at most what ``left`` seconds allow."""
        bench = self.bench
        if section == "network":
            return Cost(0.0)
        if section in ("metrics", "sources", "bounds") and bench.plan.exact:
            # blocks are made once, by whichever of them comes first; bounds take norms and ranks of all of them
            return Cost({"metrics": 3, "sources": 1, "bounds": 10}[section] * bench.plan.operations / self._rate())
        if section == "bounds":
            return Cost(0.0)
        if section == "metrics":
            each = len(bench.graph.chosen) * self._measured("columns", self._columns, left) / _COLUMNS
            return Cost(_FURTHER * each, each, bench.probes_of("metrics"), LEAST_PROBES)
        if section == "sources":
            return Cost(0.0, self._measured("route", self._route, left), bench.probes_of("sources"), LEAST_PROBES)
        if bench.dense:
            return self._dense(section, left)
        columns = 1 if bench.light else 10  # as many as advance together
        product = self._measured("product", lambda: self._product(columns), left) / columns
        if section == "spectrum":
            return Cost(0.0, product, _SHORT_SPECTRUM if bench.light else _LONG_SPECTRUM, _SHORT_SPECTRUM)
        return Cost(0.0, product * len(by_node(bench)[0]), bench.probes_of("parameters"), LEAST_PROBES)

    def _dense(self, section: str, left: float) -> Cost:
        size = self.bench.operator.shape[0]
        matrices = 0.0
        if "matrices" not in vars(self.bench):  # made once, by the first section that needs them
            columns = min(10, size)
            matrices = size / columns * self._measured("product", lambda: self._product(columns), left)
        return Cost(matrices + (20 if section == "spectrum" else 10) * size**3 / self._rate())

    def _measured(self, name: str, run: Callable[[], object], left: float) -> float:
        """Seconds of a call; of the faster of two where these are short, since the first one warms up."""
        if name not in self._found:
            seconds = self._timed(run)
            self._found[name] = min(seconds, self._timed(run)) if seconds < 0.05 * left else seconds
        return self._found[name]

    def _timed(self, run: Callable[[], object]) -> float:
        with self.bench.seeded():
            self._synchronise()
            start = time.perf_counter()
            run()
            self._synchronise()
            return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.bench.device.type == "cuda":  # kernels run behind the clock
            torch.cuda.synchronize(self.bench.device)

    def _rate(self) -> float:
        """Multiplications a second, of matrices of a few hundred rows."""
        dtype, device = self.bench.graph.loss.dtype, self.bench.device
        matrix = torch.ones(256, 256, dtype=dtype, device=device)
        return 256**3 / max(self._measured("matrix", lambda: torch.mm(matrix, matrix).mul_(1), math.inf), 1e-9)

    def _columns(self) -> None:
        graph = self.bench.graph
        injections = Injections(graph)
        name = graph.chosen[0]
        vectors = injections.signs(name, torch.Generator()).expand(-1, -1, _COLUMNS)
        with torch.no_grad():
            PairProducts(graph, graph.chosen, injections, None, 2**30).respond(name, vectors)

    def _route(self) -> None:
        graph = self.bench.graph
        injections = Injections(graph)
        tangents = {name: injections.spread(name, injections.signs(name, torch.Generator())) for name in graph.chosen}
        route(graph, tangents, by_source=True)

    def _product(self, columns: int) -> None:
        op = self.bench.operator
        op.products(torch.ones(op.shape[0], columns, dtype=op.dtype, device=op.device))


def _shown(seconds: float) -> str:
    return f"{max(seconds, 0.0):.2g}" if seconds < 100 else f"{seconds:.0f}"
