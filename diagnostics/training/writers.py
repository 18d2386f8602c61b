"""A measurement of a monitor, and where it is written."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from diagnostics.results.metric_table import MetricTable
from diagnostics.training.change_points import Change


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a :class:`Monitor` found at one step.

    Attributes:
        step: Number of steps before it.
        due: The step at which it was due. An earlier one than ``step`` where it was put off, see ``MonitorLimits``;
            measurements that would have been due between the two were not made.
        seconds: How long the measurement took.
        values: Summaries by name: ``resonance``, ``coupling`` (between different nodes) and ``stable_rank`` as means
            over pairs, ``gn_gap`` as the ratio of sums Σ‖H^T‖ / Σ‖H^GN‖, ``sharpness`` (λ_max of the Hessian with
            respect to the parameters), ``sharpness_to_limit`` (λ_max · lr / 2, where lr is known), ``negative``
            (−λ_min, or 0). Where iterations have not converged, ``sharpness`` and ``negative`` are lower bounds.
        relative_errors: Standard errors divided by values, for values that are estimates from random probes.
        changes: Which of them have changed abruptly.
        notes: What was put off, not converged, or left out to fit into the memory, in words.
        table: All pairs of nodes, if asked for.
    """

    step: int
    due: int
    seconds: float
    values: dict[str, float]
    relative_errors: dict[str, float]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    table: MetricTable | None

    def to_dict(self) -> dict[str, Any]:
        """Steps, seconds, values, changes and notes, ready for JSON (but for NaN and infinity)."""
        numbers = {"step": self.step, "due": self.due, "seconds": self.seconds, **self.values}
        return {**numbers, "changes": [vars(change) for change in self.changes], "notes": list(self.notes)}


class ScalarWriter(Protocol):
    """What is used of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


Writer: TypeAlias = "str | pathlib.Path | ScalarWriter | Callable[[Measurement], Any]"
"""A path to which one JSON object a line is appended, a TensorBoard ``SummaryWriter``, or a function."""


def writer_to(target: Any) -> Callable[[Measurement], Any]:
    """What writes a measurement to ``target``, a :data:`Writer`.

    Raises:
        ValueError: the folder of a path does not exist.
        TypeError: it is none of these.
    """
    if isinstance(target, (str, pathlib.Path)):
        path = pathlib.Path(target)
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to.")

        def append(measurement: Measurement) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(measurement.to_dict()) + "\n")

        return append
    if hasattr(target, "add_scalar"):

        def add_scalars(measurement: Measurement) -> None:
            for name, value in measurement.values.items():
                target.add_scalar(f"curvature/{name}", value, measurement.step)

        return add_scalars
    if callable(target):
        return target  # type: ignore[no-any-return]
    raise TypeError(f"a writer is a path, a SummaryWriter or a function, got {type(target).__name__}.")
