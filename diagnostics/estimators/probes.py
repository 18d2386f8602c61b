"""Random probe vectors, and products that are counted and checked: what all estimators share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.linear_operator import LinearOperator

Probe: TypeAlias = Literal["rademacher", "gaussian"]
"""Distribution of the independent entries of a probe: ±1 with equal chance, or N(0, 1)."""


class Products:
    """Products by an operator and its adjoint: counted, and checked for what is not finite.

    Attributes:
        op: The operator.
        count: Products so far; one with k columns counts k.
    """

    def __init__(self, op: LinearOperator, *, square: bool = False, symmetric: bool = False) -> None:
        if op.dtype not in (torch.float32, torch.float64):
            raise DiagnosticsError(
                f"estimators work in float32 or float64, and {op!r} does not: build the operator from parameters in "
                "float32."
            )
        if min(op.shape) == 0:
            raise DiagnosticsError(f"{op!r} has no entries.")
        if (square or symmetric) and op.shape[0] != op.shape[1]:
            raise DiagnosticsError(
                f"{op!r} is not square, so that it has singular values, and neither trace nor eigenvalues: use "
                "spectral_norm or estimate_frobenius_norm."
            )
        if symmetric and not op.symmetric:
            raise DiagnosticsError(
                f"{op!r} is not symmetric: Lanczos iterations need A = Aᵀ. Construct it with symmetric=True if it is, "
                "or use spectral_norm, which does not need it."
            )
        self.op = op
        self.count = 0

    def forward(self, vectors: Tensor) -> Tensor:
        """``A V``."""
        return self._checked(self.op @ vectors, vectors, "")

    def adjoint(self, vectors: Tensor) -> Tensor:
        """``Aᵀ V``."""
        return self._checked(self.op.T @ vectors, vectors, " of the adjoint")

    def _checked(self, result: Tensor, vectors: Tensor, which: str) -> Tensor:
        columns = 1 if vectors.ndim == 1 else vectors.shape[1]
        # A sum is finite unless an entry is not, or the sum itself overflows; only then are entries looked at.
        if not result.sum().isfinite() and not result.isfinite().all():
            bad = ~result.reshape(len(result), -1).isfinite().all(0)
            first = self.count + int(bad.nonzero()[0].item()) + 1
            raise DiagnosticsError(
                f"product {first}{which} of {self.op!r} is not finite. Look for NaN or infinity in the parameters, the "
                "data, or a derivative that overflows."
            )
        self.count += columns
        return result

    def draw(self, columns: int, probe: Probe, generator: torch.Generator) -> Tensor:
        """Probes for A, ``(n, columns)``."""
        shape = columns, self.op.shape[1]  # each probe in one piece of memory, as operators read them
        values = torch.empty(shape, dtype=self.op.dtype, device=generator.device)
        if probe == "gaussian":
            values.normal_(generator=generator)
        else:
            values.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        return values.to(self.op.device).mT

    def unit_vectors(self, batch: int) -> Iterator[tuple[int, int, Tensor]]:
        """All unit vectors in batches: first and last + 1 index, and the columns ``(n, ≤ batch)``."""
        n = self.op.shape[1]
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            columns = torch.zeros(stop - start, n, dtype=self.op.dtype, device=self.op.device)
            columns[:, start:stop].fill_diagonal_(1)
            yield start, stop, columns.mT


def generator_for(op: LinearOperator, generator: torch.Generator | None) -> torch.Generator:
    """The given generator, else a new one on the operator's device with seed 0; the global one is never used."""
    return torch.Generator(op.device).manual_seed(0) if generator is None else generator


def check_sampling(max_products: int, least: int, rtol: float, batch: int, probe: str = "rademacher") -> None:
    """Refuse sampling that cannot be done.

    Raises:
        ValueError: Fewer than ``least`` products, a negative tolerance, an empty batch or an unknown probe.
    """
    if max_products < least:
        raise ValueError(
            f"max_products must be at least {least}, so that 2 samples give a standard error, got {max_products}."
        )
    if not rtol >= 0:
        raise ValueError(f"rtol is a relative tolerance of at least 0, got {rtol}.")
    if batch < 1:
        raise ValueError(f"batch is a number of columns of at least 1, got {batch}.")
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f'probe is "rademacher" or "gaussian", got {probe!r}.')
