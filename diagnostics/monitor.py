"""Curvature metrics during training: every so many steps, within a stated overhead, without a trace in the training."""

from __future__ import annotations

import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.capture import capture
from diagnostics.change_points import Change, ChangeDetector
from diagnostics.errors import DiagnosticsError
from diagnostics.estimated_metrics import estimate_metrics
from diagnostics.lanczos import extreme_eigenpairs
from diagnostics.operators import HessianOperator
from diagnostics.refusals import check_model
from diagnostics.selection import Selection
from diagnostics.tables import MetricTable

Metric: TypeAlias = Literal["resonance", "coupling", "stable_rank", "gn_gap", "sharpness", "negative"]
METRICS: tuple[Metric, ...] = ("resonance", "coupling", "stable_rank", "gn_gap", "sharpness", "negative")
_TABLE = METRICS[:4]
_logger = logging.getLogger(__name__)


class ScalarWriter(Protocol):
    """What is used of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a :class:`Monitor` found at one step.

    Attributes:
        step: Number of steps before it.
        seconds: How long the measurement took.
        values: Summaries by name: ``resonance``, ``coupling`` (between different nodes) and ``stable_rank`` as means
            over pairs, ``gn_gap`` as the ratio of sums Σ‖H^T‖ / Σ‖H^GN‖, ``sharpness`` (λ_max of the Hessian with
            respect to the parameters), ``sharpness_to_limit`` (λ_max · lr / 2, where lr is known), ``negative``
            (−λ_min, or 0).
        relative_errors: Standard errors divided by values, for values that are estimates from random probes.
        changes: Which of them have changed abruptly.
        table: All pairs of nodes, if asked for.
    """

    step: int
    seconds: float
    values: dict[str, float]
    relative_errors: dict[str, float]
    changes: tuple[Change, ...]
    table: MetricTable | None

    def to_dict(self) -> dict[str, Any]:
        """Step, seconds, values and changes, ready for JSON (but for NaN and infinity)."""
        changes = [vars(change) for change in self.changes]
        return {"step": self.step, "seconds": self.seconds, **self.values, "changes": changes}


class Monitor:
    """Measures the curvature of a model while it is trained.

    Call :meth:`step` once a training step with the batch; every ``every``-th call measures. Or :meth:`attach` it to an
    optimizer with one batch that is measured throughout. Training is left bit for bit as it would be: parameters,
    ``.grad``, buffers (batch statistics), modes and the global random state are those before the call.

    Abrupt changes of a summary are flagged by the rule of :class:`diagnostics.change_points.ChangeDetector`, and so is
    a sharpness beyond 2/lr, where gradient descent of step size lr diverges on the quadratic model (for momentum β the
    limit is 2(1 + β)/lr; for preconditioned methods it says nothing). Both are logged as warnings.

    Args:
        model: The network.
        loss_fn: ``loss_fn(z, targets) -> scalar``.
        every: Measure at every so many steps, the first one included.
        metrics: Which of ``"resonance"``, ``"coupling"``, ``"stable_rank"``, ``"gn_gap"`` (of pairs of nodes, by
            :func:`diagnostics.estimate_metrics`), ``"sharpness"`` and ``"negative"`` (extreme eigenvalues of the
            Hessian with respect to the parameters, by Lanczos iterations that start from the last eigenvectors).
        nodes: As in :func:`diagnostics.capture`.
        probes: Random probes at each node, the same ones at every measurement, so that noise does not look like change.
        max_products: Products that the eigenvalues may take in one measurement.
        training_mode: Measure the model in the mode that it is in (with batch statistics and dropout), instead of in
            evaluation mode.
        overhead: The share of the time since the first step that measurements may take: one that is due and would go
            beyond (by the duration of the last) is put off to the next step. None: no limit.
        lr: The step size that sharpness is compared with. None: that of the attached optimizer's first group, if it is
            a ``torch.optim.SGD``; its momentum is taken into account.
        keep_tables: Keep the table of all pairs in each measurement.
        writers: Where measurements go: a path (one JSON object a line is appended), a TensorBoard ``SummaryWriter``, or
            a function of the :class:`Measurement`.
        detector: The rule for abrupt changes.

    Attributes:
        history: The measurements, in order.

    Raises:
        ValueError: An argument is out of range.
        CaptureError: As in :func:`diagnostics.capture`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        every: int = 100,
        metrics: Sequence[Metric] = METRICS,
        nodes: Selection = None,
        probes: int = 10,
        max_products: int = 30,
        training_mode: bool = False,
        overhead: float | None = None,
        lr: float | None = None,
        keep_tables: bool = True,
        writers: Sequence[str | pathlib.Path | ScalarWriter | Callable[[Measurement], Any]] = (),
        detector: ChangeDetector | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        if overhead is not None and not 0 < overhead <= 1:
            raise ValueError(f"overhead is a share of the time, in (0, 1], got {overhead}.")
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {list(metrics)}.")
        check_model(model)
        self.model = model
        self.loss_fn = loss_fn
        self.every = every
        self.metrics = tuple(metrics)
        self.nodes = nodes
        self.probes = probes
        self.max_products = max_products
        self.training_mode = training_mode
        self.overhead = overhead
        self.lr = lr
        self.keep_tables = keep_tables
        self.detector = ChangeDetector() if detector is None else detector
        self.history: list[Measurement] = []
        self._writers = [_writer(writer) for writer in writers]
        self._optimizer: torch.optim.Optimizer | None = None
        self._vectors: dict[str, Tensor] = {}
        self._steps = 0
        self._due = 0
        self._started = time.perf_counter()
        self._spent = 0.0

    def step(self, batch: Any) -> Measurement | None:
        """Count a training step, and measure on ``batch`` = ``(inputs, targets)`` if one is due.

        Returns:
            The measurement; None where none was due.
        """
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise DiagnosticsError(f"a batch is a pair (inputs, targets), got {type(batch).__name__}.")
        step, self._steps = self._steps, self._steps + 1
        if step == 0:
            self._started = time.perf_counter()
        if step < self._due or not self._affordable():
            return None
        self._due = step - step % self.every + self.every
        return self.measure(batch, step)

    def measure(self, batch: Any, step: int | None = None) -> Measurement:
        """Measure now, whether it is due or not.

        Args:
            batch: ``(inputs, targets)``.
            step: What to call the step; None: the number of steps so far.
        """
        start = time.perf_counter()
        inputs, targets = batch
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        table: MetricTable | None = None
        with _mode(self.model, self.training_mode):
            if any(name in _TABLE for name in self.metrics):
                graph = capture(self.model, inputs, lambda z: self.loss_fn(z, targets), self.nodes)
                table = estimate_metrics(graph, self.probes, spectral_rounds=20 if "stable_rank" in self.metrics else 0)
                del graph
                _summarise(table, self.metrics, values, errors)
            if any(name in self.metrics for name in ("sharpness", "negative")):
                values.update(self._eigenvalues((inputs, targets)))
        limit = self._limit()
        if limit is not None and "sharpness" in values:
            values["sharpness_to_limit"] = values["sharpness"] / limit
        step = self._steps if step is None else step
        found = [self.detector.update(name, step, value, errors.get(name, 0.0)) for name, value in values.items()]
        changes = tuple(change for change in found if change is not None)
        seconds = time.perf_counter() - start
        self._spent += seconds
        measurement = Measurement(step, seconds, values, errors, changes, table if self.keep_tables else None)
        self._report(measurement)
        return measurement

    def attach(self, optimizer: torch.optim.Optimizer, batch: Any) -> Callable[[], None]:
        """Measure on the same ``batch`` after steps of ``optimizer``; returns the function that ends it."""
        self._optimizer = optimizer

        def after_step(*_: Any) -> None:
            self.step(batch)

        return optimizer.register_step_post_hook(after_step).remove

    def _affordable(self) -> bool:
        if self.overhead is None or not self.history:
            return True
        elapsed = time.perf_counter() - self._started
        return self._spent + self.history[-1].seconds <= self.overhead * (elapsed + self.history[-1].seconds)

    def _eigenvalues(self, batch: tuple[Any, Any]) -> Iterator[tuple[str, float]]:
        op = HessianOperator(self.model, batch, self.loss_fn)
        for name, end, sign in (("sharpness", "largest", 1.0), ("negative", "smallest", -1.0)):
            if name in self.metrics:
                start = self._vectors.get(name)
                pair = extreme_eigenpairs(
                    op,
                    which=end,  # type: ignore[arg-type]
                    rtol=1e-2,
                    max_products=self.max_products,
                    start=start if start is not None and len(start) == op.shape[0] else None,
                )
                self._vectors[name] = pair.vectors[:, 0]
                value = sign * pair.values[0].item()
                yield name, value if name == "sharpness" else max(value, 0.0)

    def _limit(self) -> float | None:
        """The sharpness at which gradient descent diverges on the quadratic model."""
        if self.lr is not None:
            return 2 / self.lr
        if isinstance(self._optimizer, torch.optim.SGD):
            group = self._optimizer.param_groups[0]
            return 2 * (1 + group["momentum"]) / float(group["lr"]) if float(group["lr"]) > 0 else None
        return None

    def _report(self, measurement: Measurement) -> None:
        before = self.history[-1].values.get("sharpness_to_limit", 0.0) if self.history else 0.0
        self.history.append(measurement)
        for change in measurement.changes:
            _logger.warning("abrupt change at %s", change)
        ratio = measurement.values.get("sharpness_to_limit", 0.0)
        if ratio > 1 >= before:
            _logger.warning(
                "step %d: the sharpness %.3g is %.3g times the largest that the step size is stable at",
                measurement.step,
                measurement.values["sharpness"],
                ratio,
            )
        for write in self._writers:
            write(measurement)


def _summarise(table: MetricTable, metrics: Sequence[str], values: dict[str, float], errors: dict[str, float]) -> None:
    n = len(table.nodes)
    upper = torch.ones(n, n, dtype=torch.bool).triu()
    apart = torch.ones(n, n, dtype=torch.bool).triu(1) if n > 1 else upper
    for name, pairs in (("resonance", upper), ("coupling", apart), ("stable_rank", upper)):
        if name in metrics:
            of_pairs = getattr(table, name).cpu()[pairs]
            values[name] = of_pairs.nanmean().item()
            if table.standard_errors is not None:
                # errors of pairs that share a node are correlated: their mean, not their root mean square over n
                error = getattr(table.standard_errors, name).cpu()[pairs].nanmean()
                errors[name] = (error / of_pairs.nanmean().abs()).item()
    if "gn_gap" in metrics:
        values["gn_gap"] = table.gap_ratio
        if table.standard_errors is not None:
            shares = [
                getattr(table.standard_errors, name).cpu()[upper].nansum() / getattr(table, name).cpu()[upper].sum()
                for name in ("tensor_norm", "gn_norm")
            ]
            errors["gn_gap"] = torch.stack(shares).norm().item()


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Evaluation mode unless ``training``; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    if not training:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _writer(target: Any) -> Callable[[Measurement], Any]:
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
