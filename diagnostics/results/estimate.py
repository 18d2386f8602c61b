"""A number known from random samples: its value, its standard error, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from diagnostics.errors import DiagnosticsError

LEAST_SAMPLES = 10
"""Samples before a running standard error is trusted to stop an estimator: earlier it is itself a bad estimate."""


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """A mean over random samples with its standard error; made by the functions of :mod:`diagnostics.estimators`.

    Attributes:
        value: The estimate: a scalar, or one number an entry, ``(n,)``.
        standard_error: Estimated standard deviation of ``value``, of the same shape; 0 where the value is exact.
        samples: Number of samples that the standard error is from; without meaning where the value is exact.
        products: Matrix-vector products that were used, by A or Aᵀ; a product with k columns counts k.
        converged: Whether ``‖standard_error‖₂ ≤ rtol · ‖value‖₂``. With ``rtol = 0`` only exact values are.
    """

    value: Tensor
    standard_error: Tensor
    samples: int
    products: int
    converged: bool

    def item(self) -> float:
        """The value of a scalar estimate."""
        return self.value.item()

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the confidence interval ``value ± t · standard_error``, of the shape of the value.

        t is Student's quantile with ``samples − 1`` degrees of freedom.

        Raises:
            ValueError: ``level`` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"the level of an interval is between 0 and 1, got {level}.")
        reach = float(stdtrit(max(self.samples - 1, 1), (1 + level) / 2)) * self.standard_error
        return self.value - reach, self.value + reach

    def __str__(self) -> str:
        if self.value.ndim:
            number = f"{tuple(self.value.shape)} entries, largest standard error {self.standard_error.max().item():.2g}"
        else:
            number = f"{self.value.item():.6g} ± {self.standard_error.item():.2g}"
        return f"{number} ({self.products} products{', converged' if self.converged else ''})"

    __repr__ = __str__


def exact(value: Tensor, products: int) -> Estimate:
    """A value without sampling error."""
    return Estimate(value, torch.zeros_like(value), products, products, True)


def mean_of(samples: Tensor, products: int, rtol: float, *, inflation: float = 1.0) -> Estimate:
    """The mean over the first dimension of ``(k, …)`` equally good samples; standard error s/√k, s² unbiased.

    ``inflation`` multiplies the variance of the mean, for samples that are not independent.
    """
    if len(samples) < 2:
        raise DiagnosticsError(f"a standard error needs at least 2 samples, got {len(samples)}.")
    value, error = samples.mean(0), samples.std(0) * (inflation / len(samples)) ** 0.5
    return Estimate(value, error, len(samples), products, within(value, error, rtol))


def within(value: Tensor, error: Tensor, rtol: float) -> bool:
    """The rule that every estimator stops by: ‖standard error‖₂ ≤ rtol · ‖value‖₂."""
    return bool(torch.linalg.vector_norm(error) <= rtol * torch.linalg.vector_norm(value))


def enough(estimate: Estimate) -> bool:
    """Whether an estimator may stop: converged, by at least ``LEAST_SAMPLES`` samples."""
    return estimate.converged and estimate.samples >= LEAST_SAMPLES
