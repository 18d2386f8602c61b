"""What the sections of a report share: the captured network, its blocks and operators, made when first needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diagnostics.autograd.kernels import RandomState
from diagnostics.blocks.containers import HessianBlocks
from diagnostics.blocks.recursion import hessian_blocks
from diagnostics.graph.capture import capture
from diagnostics.graph.graph import Graph
from diagnostics.graph.selection import Selection
from diagnostics.matrix_free.pair_estimates import Sampling
from diagnostics.operators.curvature import CurvatureProducts, GaussNewtonOperator, HessianOperator, TensorOperator
from diagnostics.operators.data import Batch, Batches
from diagnostics.report.plan import Plan, choose, coarser
from diagnostics.report.settings import DiagnosisSettings

DENSE_UP_TO = 2000
"""Parameters up to which their Hessian is formed: eigenvalues of a larger one take longer than estimates."""
LIGHT_ABOVE = 100_000_000
"""Floating-point operations of a pass over the data above which estimates make do with fewer products."""


class Workbench:
    """A model on its data, with everything that sections compute from, each made once.

    The model's own randomness (dropout) and the order of shuffled data start from the seed wherever the model is run or
    data is read, so that no section depends on which came before.

    Args:
        model: The network.
        source: Its batches.
        loss_fn: ``loss_fn(z, targets) -> scalar``.
        settings: Numbers.
        nodes: As in :func:`diagnostics.capture`.
        exact: Exact blocks, estimates, or None: by size.

    Attributes:
        cut: Probes by section, of those that are shortened to fit into the time.
        reduced: What was left out of sections to fit into the memory, by section.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        settings: DiagnosisSettings,
        nodes: Selection = None,
        exact: bool | None = None,
    ) -> None:
        self.exact = exact
        self.model, self.loss_fn, self.settings = model, loss_fn, settings
        self.cut: dict[str, int] = {}
        self.reduced: dict[str, str] = {}
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.batches = Batches(source)
        with self.seeded():
            self.batch: Batch = next(iter(self.batches)).private(self.device)
        self.graph = self._capture(nodes)
        self.node_rule = "as asked for" if nodes is not None else "the layers of the model"
        self.node_rule += f" ({self.graph.note})" if self.graph.note else ""
        self.plan: Plan = choose(self.graph, exact, settings.memory_limit)
        fewer = coarser(model, self.graph) if nodes is None and not self.plan.exact else None
        if fewer is not None:
            self.graph, self.node_rule = self._capture(fewer[0]), fewer[1]

    def _capture(self, nodes: Selection) -> Graph:
        targets = self.batch.targets
        with self.seeded():
            return capture(self.model, self.batch.inputs, lambda z: self.loss_fn(z, targets), nodes)

    @property
    def probes(self) -> int:
        """Random probes at each node: as asked for, or 30, or 10 where products are dear."""
        default = 10 if self.light else 30
        return default if self.settings.probes is None else self.settings.probes

    def probes_of(self, section: str) -> int:
        """Random probes of a section: those of :attr:`cut`, where there is too little time for all."""
        whole = max(3, self.probes // 3) if self.light and section != "metrics" else self.probes
        return self.cut.get(section, whole)

    def fitting(self, section: str, sampling: Sampling, sizes: Sequence[int], item: int, limit: int) -> Sampling:
        """What of a section's sampling fits into ``limit`` bytes (:meth:`Sampling.within`); a difference is noted."""
        found = sampling.within(sizes, item, limit)
        if found != sampling:
            kept = "responses not kept"
            fewer = kept if found.probes == sampling.probes else f"{kept}, {found.probes} of {sampling.probes} probes"
            self.reduced[section] = fewer if not sampling.streams else fewer.removeprefix(f"{kept}, ")
        return found

    @property
    def light(self) -> bool:
        """Whether a pass over the data is so long that products are saved."""
        return self.operations * (1 if self.batches.single else self.batches.count() or 1) > LIGHT_ABOVE

    @cached_property
    def operations(self) -> int:
        """Floating-point operations of one forward pass: matrix products, convolutions and attention."""
        with FlopCounterMode(display=False) as counter:
            self._capture([])
        return int(counter.get_total_flops())

    @property
    def dense(self) -> bool:
        """Whether the Hessian of the parameters is formed."""
        size = self.operator.shape[0]
        needed = 10 * size**2 * self.operator.dtype.itemsize  # H, G, T, products, copies
        return self.exact is not False and size <= DENSE_UP_TO and needed <= self.settings.memory_limit

    @cached_property
    def blocks(self) -> HessianBlocks:
        """Batch means of all blocks, by source."""
        return hessian_blocks(self.graph, by_source=True, memory_limit=self.settings.memory_limit).mean()

    @cached_property
    def operator(self) -> HessianOperator:
        """The Hessian of the parameters over all batches."""
        with self.seeded():
            return HessianOperator(self.model, self._source, self.loss_fn)

    def part(self, name: str) -> HessianOperator | GaussNewtonOperator | TensorOperator:
        """``"H"``, ``"GN"`` or ``"T"`` of the parameters as an operator."""
        if name == "H":
            return self.operator
        with self.seeded():
            kind = GaussNewtonOperator if name == "GN" else TensorOperator
            return kind(self.model, self._source, self.loss_fn)

    @cached_property
    def matrices(self) -> CurvatureProducts:
        """H, its Gauss-Newton part and its tensor part as matrices ``(P, P)``; for few parameters."""
        op = self.operator
        found = op.products(torch.eye(op.shape[0], dtype=op.dtype, device=op.device))
        return CurvatureProducts(*((matrix + matrix.mT) / 2 for matrix in found))

    def generator(self, section: str) -> torch.Generator:
        """A generator for one section alone, so that a resumed run draws what an uninterrupted one does."""
        digest = hashlib.sha256(f"{self.settings.seed}:{section}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """The global random state that follows from the seed; what was there before afterwards."""
        with RandomState(self.model.parameters()).kept():
            torch.manual_seed(self.settings.seed)
            yield

    @property
    def _source(self) -> Any:
        return [(self.batch.inputs, self.batch.targets)] if self.batches.single else self.batches.source
