"""Single figures of the results, as the text of the page quotes them; "not run" where they are missing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from examples.studies.paper.comparison import NOT_RUN
from examples.studies.paper.measurement import log_linear


class Facts:
    """Looks up means over seeds.

    Args:
        rows: Of the results, chosen.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._values: dict[tuple[Any, ...], list[float]] = {}
        for row in rows:
            variant = tuple(str(value) for value in row["variant"].values())
            key = (row["experiment"], variant, row["phase"], row["quantity"], row["distance"])
            self._values.setdefault(key, []).append(row["value"])

    def mean(self, experiment: str, variant: str, phase: str, quantity: str, distance: int | None = None) -> float:
        """Of all seeds; ``variant``: its values, separated by spaces. Raises KeyError where nothing ran."""
        return statistics.fmean(self._values[experiment, tuple(variant.split()), phase, quantity, distance])

    def say(self, *key: Any, digits: int = 3) -> str:
        """The mean as text."""
        return self._or_not_run(lambda: f"{self.mean(*key):.{digits}g}")

    def ratio(self, above: Sequence[Any], below: Sequence[Any]) -> str:
        """Of two means."""
        return self._or_not_run(lambda: f"{self.mean(*above) / self.mean(*below):.3g}")

    def seconds(self, experiment: str, variant: str) -> str:
        """Median time of the curvature of a checkpoint."""
        key = (experiment, tuple(variant.split()))
        found = [v for k, values in self._values.items() if (*k[:2], k[3]) == (*key, "seconds") for v in values]
        return f"{statistics.median(found):.2g}" if found else NOT_RUN

    def branch_ratios(self, phase: str, depths: Sequence[int] = (2, 3)) -> str:
        """Smallest and largest R(d+2)/R(d) between the branches of the diamonds."""

        def compute() -> str:
            found = [
                self.mean("exp4", variant, phase, "R_cross_AB", d + 2)
                / self.mean("exp4", variant, phase, "R_cross_AB", d)
                for k in depths
                for variant in (f"{k} {merge} {act}" for merge in ("sum", "cat") for act in ("relu", "silu"))
                for d in range(2, 2 * k - 1)
            ]
            return f"{min(found):.2f} to {max(found):.2f}"

        return self._or_not_run(compute)

    def gap_slope(self, activation: str) -> str:
        """Gap per norm of the mean error signal, and the correlation of the two over labellings and seeds."""
        errors, gaps = [], []
        for (experiment, variant, _, quantity, distance), values in self._values.items():
            if (experiment, variant) == ("labels", (activation,)) and quantity.startswith("gap "):
                errors += self._values[experiment, variant, "init", quantity.replace("gap", "error"), distance]
                gaps += values
        if not gaps:
            return NOT_RUN
        slope, _ = statistics.linear_regression(errors, gaps, proportional=True)
        return f"{slope:.2f} (correlation {statistics.correlation(errors, gaps):.3f})"

    def decay(self, variant: str, phase: str) -> str:
        """Slope and R² of log R(d) of Experiment 1."""
        depth = int(variant.split()[0])

        def compute() -> str:
            slope, r2 = log_linear(self.mean("exp1", variant, phase, "R", d) for d in range(depth))
            return f"{-slope:.3f} (R² {r2:.2f})"

        return self._or_not_run(compute)

    def slower(self, variant: str, than: str, phase: str) -> str:
        """How many times smaller the slope of log R(d) of Experiment 1 is than another variant's."""

        def slope(name: str) -> float:
            return log_linear(self.mean("exp1", name, phase, "R", d) for d in range(int(name.split()[0])))[0]

        return self._or_not_run(lambda: f"{slope(than) / slope(variant):.2g}")

    def sources(self, experiment: str, variant: str, phase: str, of: str = "") -> str:
        """Shares of ‖H^T‖² by source, of all pairs or of one (``"v w"``), the largest first."""
        found = {}
        for (e, v, p, quantity, _), values in self._values.items():
            if (e, v, p) == (experiment, tuple(variant.split()), phase) and quantity.startswith("share "):
                source, _, pair = quantity.removeprefix("share ").partition(" | ")
                if pair == of:
                    found[source] = statistics.fmean(values)
        order = sorted(found.items(), key=lambda item: -abs(item[1]))
        return ", ".join(f"`{source}` {share:.0%}" for source, share in order) or NOT_RUN

    @staticmethod
    def _or_not_run(compute: Callable[[], str]) -> str:
        try:
            return compute()
        except KeyError:
            return f"({NOT_RUN})"
