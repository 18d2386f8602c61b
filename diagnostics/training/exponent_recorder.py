"""Curvature exponents over training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.alignment.exponents import curvature_exponents
from diagnostics.alignment.tables import ExponentTable


class ExponentRecorder:
    """Measures curvature exponents during training, on one batch that stays the same.

    Training goes on bit for bit as it would without: see :func:`diagnostics.curvature_exponents`, whose signs are drawn
    anew from the same seed each time.

    Args:
        model: The network.
        batch: What it is measured on throughout.
        loss_fn: ``loss_fn(z, targets) -> scalar``.
        every: Measure at the first call of :meth:`step` and every so many later ones. Default: 100.
        options: Of :func:`diagnostics.curvature_exponents`: ``k``, ``layers``, ``types``, ``control``, ``kronecker``.

    Attributes:
        steps: Number of the calls at which it was measured.
        tables: The results.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        >>> batch = torch.randn(32, 6), torch.randint(0, 4, (32,))
        >>> recorder = ExponentRecorder(model, batch, nn.functional.cross_entropy, every=5, kronecker=None)
        >>> for _ in range(10):
        ...     recorder.step()  # after optimizer.step()
        >>> recorder.steps, recorder.alpha("0").shape
        ([0, 5], torch.Size([2]))
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        every: int = 100,
        **options: Any,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}.")
        if "generator" in options:
            raise TypeError("generator is the recorder's own: each measurement draws the same signs.")
        self.model = model
        self.batch = batch
        self.loss_fn = loss_fn
        self.every = every
        self.options = options
        self.steps: list[int] = []
        self.tables: list[ExponentTable] = []
        self._count = 0

    def step(self) -> ExponentTable | None:
        """Count a step, and measure if it is time."""
        due = self._count % self.every == 0
        self._count += 1
        return self._measure(self._count - 1) if due else None

    def _measure(self, step: int) -> ExponentTable:
        table = curvature_exponents(self.model, self.batch, self.loss_fn, **self.options)
        self.steps.append(step)
        self.tables.append(table)
        return table

    def alpha(self, layer: str) -> Tensor:
        """α of one layer at each measurement."""
        return torch.tensor([table[layer].alpha.exponent for table in self.tables], dtype=torch.float64)

    def by_type(self) -> dict[str, Tensor]:
        """Mean α of each layer type at each measurement."""
        kinds = self.tables[0].by_type() if self.tables else {}
        return {
            kind: torch.tensor([table.by_type()[kind].mean for table in self.tables], dtype=torch.float64)
            for kind in kinds
        }
