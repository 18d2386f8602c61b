"""Curvature metrics during training: every so many steps, within a stated overhead, without a trace in the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.autograd.refusals import check_model
from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.lanczos import End, extreme_eigenpairs
from diagnostics.graph.capture import capture
from diagnostics.graph.selection import Selection
from diagnostics.matrix_free.injections import Injections
from diagnostics.matrix_free.node_metrics import ShardedGraph, estimate_metrics
from diagnostics.matrix_free.pair_estimates import Sampling
from diagnostics.operators.curvature import HessianOperator
from diagnostics.operators.shards import shard, together, unwrapped
from diagnostics.results.metric_table import MetricErrors, MetricTable
from diagnostics.training.change_points import ChangeDetector
from diagnostics.training.writers import Measurement, Writer, writer_to

Metric: TypeAlias = Literal["resonance", "coupling", "stable_rank", "gn_gap", "sharpness", "negative"]
METRICS: tuple[Metric, ...] = ("resonance", "coupling", "stable_rank", "gn_gap", "sharpness", "negative")
_TABLE = METRICS[:4]
FREE_SECONDS = 30.0
"""Seconds of measurements, in all, before ``overhead="auto"`` limits them."""
AUTOMATIC_OVERHEAD = 0.1
"""The share of the time that they may take from there on."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MonitorLimits:
    """What the measurements of a :class:`Monitor` may cost.

    Attributes:
        overhead: The share of the time since the first step that measurements may take: one that is due and would go
            beyond (by the duration of the last) is put off to the next step. ``"auto"``: a tenth, once measurements
            have taken 30 seconds in all, so that short runs are measured when they are due, whatever the clock says.
            None: no limit. The first measurement is always made: its duration is not known before.
        max_products: Products that the eigenvalues may take in one measurement, both together.
        memory_limit: Bytes that a measurement may take beside the model, the batch and the tapes of a pass over it.
            Where responses of all nodes do not fit they are not kept, and then probes are fewer; eigenvectors restart.

    Raises:
        ValueError: one is out of range.
    """

    overhead: float | Literal["auto"] | None = "auto"
    max_products: int = 60
    memory_limit: int = 4 * 2**30

    def __post_init__(self) -> None:
        share = self.overhead
        if not (share is None or share == "auto" or (isinstance(share, (int, float)) and 0 < share <= 1)):
            raise ValueError(f'overhead is a share of the time, in (0, 1], "auto" or None, got {share!r}.')
        if not self.memory_limit > 0:
            raise ValueError(f"memory_limit is a number of bytes, got {self.memory_limit}.")


_LIMITS = MonitorLimits()


class Monitor:
    """Measures the curvature of a model while it is trained.

    Call :meth:`step` once a training step with the batch; every ``every``-th call measures. Or :meth:`attach` it to an
    optimizer with one batch that is measured throughout. Training is left bit for bit as it would be: parameters,
    ``.grad``, buffers (batch statistics), modes and the global random state are those before the call.

    Abrupt changes of a summary are flagged by the rule of :class:`diagnostics.training.change_points.ChangeDetector`,
    and so is a sharpness beyond 2/lr, where gradient descent of step size lr diverges on the quadratic model (for
    momentum β the limit is 2(1 + β)/lr; for preconditioned methods it says nothing). Both are logged as warnings.

    Cost is bounded (:class:`diagnostics.MonitorLimits`), and nothing is left out silently: a measurement that was put
    off says when it was due, and its notes what has not converged.

    **Several processes.** Given a network in :class:`torch.nn.parallel.DistributedDataParallel`, batches are those of
    this process, and what is measured is the network on the batches of all, a mean over all samples. All processes have
    to call :meth:`step`, get the same measurement, and keep the history; the first one alone writes and logs. What runs
    is the network inside, so that no buffers are sent. Given ``ddp.module``, a process measures its own batches, alone.

    Args:
        model: The network, also in DistributedDataParallel.
        loss_fn: ``loss_fn(z, targets) -> scalar``, a mean over samples.
        every: Measure at every so many steps, the first one included.
        metrics: Which of ``"resonance"``, ``"coupling"``, ``"stable_rank"``, ``"gn_gap"`` (of pairs of nodes, by
            :func:`diagnostics.estimate_metrics`), ``"sharpness"`` and ``"negative"`` (extreme eigenvalues of the
            Hessian with respect to the parameters, to 1 %, by Lanczos iterations that start from the last eigenvectors
            and some noise).
        nodes: As in :func:`diagnostics.capture`.
        probes: Random probes at each node, the same ones at every measurement, so that noise does not look like change.
        training_mode: Measure the model in the mode that it is in (with batch statistics and dropout), instead of in
            evaluation mode.
        lr: The step size that sharpness is compared with. None: that of the attached optimizer's first group, if it is
            a ``torch.optim.SGD``; its momentum is taken into account.
        limits: What measurements may cost.
        keep_tables: Keep the table of all pairs in each measurement.
        writers: Where measurements go: a path (one JSON object a line is appended), a TensorBoard ``SummaryWriter``, or
            a function of the :class:`Measurement`.
        detector: The rule for abrupt changes.

    Attributes:
        history: The measurements, in order.
        waiting: For how many steps the measurement that is due has been put off so far; 0 where none is.

    Raises:
        ValueError: An argument is out of range.
        CaptureError: As in :func:`diagnostics.capture`.
        MemoryBudgetError: From the first measurement: not even the least that it needs fits.
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
        training_mode: bool = False,
        lr: float | None = None,
        limits: MonitorLimits = _LIMITS,
        keep_tables: bool = True,
        writers: Sequence[Writer] = (),
        detector: ChangeDetector | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {list(metrics)}.")
        self._given = model
        model, self._ranks = unwrapped(model)
        check_model(model)
        self.model = model
        self.loss_fn = loss_fn
        self.every = every
        self.metrics = tuple(metrics)
        self.nodes = nodes
        self.probes = probes
        self.training_mode = training_mode
        self.lr = lr
        self.limits = limits
        self.keep_tables = keep_tables
        self.detector = ChangeDetector() if detector is None else detector
        self.history: list[Measurement] = []
        self._writers = [writer_to(writer) for writer in (writers if self._ranks.rank == 0 else ())]
        self._optimizer: torch.optim.Optimizer | None = None
        self.waiting = 0
        self._start: Tensor | None = None  # the last eigenvectors, added up
        self._asked: int | None = None  # when the measurement that is made now was due
        self._put_off_before = False
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
        if step < self._due:
            return None
        if not self._ranks.objects(self._affordable())[0]:  # clocks differ, and the first one's counts
            self._put_off(step)
            return None
        self._due = step - step % self.every + self.every
        self._asked, self.waiting = step - self.waiting, 0
        return self.measure(batch, step)

    def measure(self, batch: Any, step: int | None = None) -> Measurement:
        """Measure now, whether it is due or not.

        Args:
            batch: ``(inputs, targets)``.
            step: What to call the step; None: the number of steps so far.
        """
        start = time.perf_counter()
        step = self._steps if step is None else step
        due, self._asked = step if self._asked is None else self._asked, None
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        notes: list[str] = []
        table: MetricTable | None = None
        with _mode(self.model, self.training_mode):
            if any(name in _TABLE for name in self.metrics):
                graph = self._captured(batch)
                table = self._estimated(graph, notes)
                del graph
                _summarise(table, self.metrics, values, errors)
            if any(name in self.metrics for name in ("sharpness", "negative")):
                values.update(self._eigenvalues(tuple(batch), notes))
        limit = self._limit()
        if limit is not None and "sharpness" in values:
            values["sharpness_to_limit"] = values["sharpness"] / limit
        if due < step:
            notes.append(f"due at step {due}, put off for {step - due} steps to keep measurements within their time")
        found = [self.detector.update(name, step, value, errors.get(name, 0.0)) for name, value in values.items()]
        changes = tuple(change for change in found if change is not None)
        seconds = self._ranks.objects(time.perf_counter() - start)[0]
        self._spent += seconds
        kept = table if self.keep_tables else None
        measurement = Measurement(step, due, seconds, values, errors, changes, tuple(notes), kept)
        self._report(measurement)
        return measurement

    def attach(self, optimizer: torch.optim.Optimizer, batch: Any) -> Callable[[], None]:
        """Measure on the same ``batch`` after steps of ``optimizer``; returns the function that ends it."""
        self._optimizer = optimizer

        def after_step(*_: Any) -> None:
            self.step(batch)

        return optimizer.register_step_post_hook(after_step).remove

    def _affordable(self) -> bool:
        if self.limits.overhead is None or not self.history:
            return True
        seconds = self.history[-1].seconds
        if self.limits.overhead == "auto" and self._spent + seconds <= FREE_SECONDS:
            return True
        share = AUTOMATIC_OVERHEAD if self.limits.overhead == "auto" else self.limits.overhead
        elapsed = time.perf_counter() - self._started
        return self._spent + seconds <= share * (elapsed + seconds)

    def _put_off(self, step: int) -> None:
        self.waiting += 1
        if not self._put_off_before and self._ranks.rank == 0:
            self._put_off_before = True
            _logger.warning(
                "step %d: the measurement is put off: %d have taken %.3g s, the last one %.3g s, and overhead=%r. "
                "Measurements say when they were due; fewer metrics, probes or products make them cheaper",
                step,
                len(self.history),
                self._spent,
                self.history[-1].seconds,
                self.limits.overhead,
            )

    def _captured(self, batch: Any) -> ShardedGraph:
        own, counts = shard(tuple(batch), self._ranks)
        inputs, targets = own
        graph = together(
            self._ranks, lambda: capture(self.model, inputs, lambda z: self.loss_fn(z, targets), self.nodes)
        )
        return ShardedGraph(graph, self._ranks.group, counts)

    def _estimated(self, sharded: ShardedGraph, notes: list[str]) -> MetricTable:
        graph = sharded.graph
        rounds = 20 if "stable_rank" in self.metrics else 0
        wanted = Sampling(self.probes, "rademacher", 10, 1e-2, rounds)
        responses = self.limits.memory_limit - self.limits.memory_limit // 4
        injections = Injections(graph)
        sizes = [injections.size(name) for name in graph.chosen]
        sampling = wanted.within(sizes, graph.loss.element_size(), responses)
        if sampling != wanted:
            notes.append(f"responses are not kept, {sampling.probes} of {self.probes} probes, to fit into the memory")
        return estimate_metrics(
            graph if self._ranks.size == 1 else sharded,
            sampling.probes,
            deflate=sampling.deflate,
            spectral_rounds=sampling.spectral_rounds,
            memory_limit=max(1, min(self.limits.memory_limit // 4, 2**30)),
            responses_limit=responses,
        )

    def _eigenvalues(self, batch: tuple[Any, Any], notes: list[str]) -> dict[str, float]:
        op = HessianOperator(self._given, batch, self.loss_fn, progress=False)
        n = op.shape[0]
        wanted = [name for name in ("sharpness", "negative") if name in self.metrics]
        end: End = "both" if len(wanted) == 2 and n > 1 else ("largest" if "sharpness" in wanted else "smallest")
        pairs = extreme_eigenpairs(
            op,
            which=end,
            rtol=1e-2,
            max_products=self.limits.max_products,
            start=self._start if self._start is not None and len(self._start) == n else None,
            memory_limit=self.limits.memory_limit,
        )
        self._start = pairs.vectors.sum(1)
        if not pairs.converged:
            notes.append(f"{' and '.join(wanted)} not converged after {pairs.products} products: lower bounds")
        smallest, largest = pairs.values.min().item(), pairs.values.max().item()
        found = {"sharpness": largest, "negative": max(-smallest, 0.0)}
        return {name: found[name] for name in wanted}

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
        if self._ranks.rank:
            return
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
    names = ("resonance", "coupling", "stable_rank", "tensor_norm", "gn_norm")
    found = _on_host(table, names)
    deviations = None if table.standard_errors is None else _on_host(table.standard_errors, names)
    n = len(table.nodes)
    upper = torch.ones(n, n, dtype=torch.bool).triu()
    apart = torch.ones(n, n, dtype=torch.bool).triu(1) if n > 1 else upper
    for name, pairs in (("resonance", upper), ("coupling", apart), ("stable_rank", upper)):
        if name in metrics:
            of_pairs = found[name][pairs]
            values[name] = of_pairs.nanmean().item()
            if deviations is not None:
                # errors of pairs that share a node are correlated: their mean, not their root mean square over n
                error = deviations[name][pairs].nanmean()
                errors[name] = (error / of_pairs.nanmean().abs()).item()
    if "gn_gap" in metrics:
        values["gn_gap"] = table.gap_ratio
        if deviations is not None:
            shares = [
                deviations[name][upper].nansum() / found[name][upper].sum() for name in ("tensor_norm", "gn_norm")
            ]
            errors["gn_gap"] = torch.stack(shares).norm().item()


def _on_host(table: MetricTable | MetricErrors, names: Sequence[str]) -> dict[str, Tensor]:
    return dict(zip(names, torch.stack([getattr(table, name) for name in names]).cpu(), strict=True))


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
