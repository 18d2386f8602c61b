"""Distributions of the targets given the model's output, and their Fisher information in the output."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Likelihood(ABC):
    """p(y given z) of an exponential family with natural parameters z; ``-log p`` is the loss up to a factor.

    One draw of y is a *unit*. The factor may be another for every unit (a mean over the batch, weights of classes,
    zero where targets are ignored).
    """

    @abstractmethod
    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """``F u`` with F the Fisher information of z, for vectors ``(k, *z.shape)``; equals ``∇²(-log p) u``."""

    @abstractmethod
    def root(self, z: Tensor, u: Tensor) -> Tensor:
        """``S u`` with ``S Sᵀ = F``, which leaves vectors within their unit."""

    @abstractmethod
    def scores(self, z: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``∂(-log p(y))/∂z`` of ``count`` draws of y from p, ``(count, *z.shape)``."""

    @abstractmethod
    def unit_sum(self, values: Tensor) -> Tensor:
        """Sums ``(k, *z.shape)`` over the entries of each unit; these dimensions are kept, with size 1."""

    @abstractmethod
    def factor(self, curvature: Tensor, information: Tensor) -> Tensor:
        """The c for which ``curvature = c information`` in the sense of least squares, broadcastable to z."""


class Categorical(Likelihood):
    """Classes with logits z along dimension ``dim``; a unit is one position. Cross-entropy."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """``diag(p) u − p pᵀu``."""
        p = z.softmax(self._dim)
        return p * (u - self.unit_sum(p * u))

    def root(self, z: Tensor, u: Tensor) -> Tensor:
        """``√p ∘ u − p √pᵀu``."""
        p = z.softmax(self._dim)
        scaled = p.sqrt() * u
        return scaled - p * self.unit_sum(scaled)

    def scores(self, z: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``p − onehot(y)``."""
        p = z.softmax(self._dim).movedim(self._dim, -1)
        rows = p.reshape(-1, p.shape[-1])
        drawn = torch.multinomial(rows, count, replacement=True, generator=generator).mT  # (count, units)
        chosen = torch.zeros(count, *rows.shape, dtype=z.dtype, device=z.device).scatter_(2, drawn.unsqueeze(2), 1.0)
        return (rows - chosen).reshape(count, *p.shape).movedim(-1, self._dim if self._dim < 0 else self._dim + 1)

    def unit_sum(self, values: Tensor) -> Tensor:
        """Over the classes."""
        return values.sum(self._dim if self._dim < 0 else self._dim + 1, keepdim=True)

    def factor(self, curvature: Tensor, information: Tensor) -> Tensor:
        """One for each position."""
        return _ratio(self.unit_sum(curvature * information), self.unit_sum(information.square()))


class _Independent(Likelihood):
    """Entries of z are independent; a unit is a sample with all of its entries."""

    def unit_sum(self, values: Tensor) -> Tensor:
        """Over all but the sample dimension."""
        return values.sum(tuple(range(2, values.ndim)), keepdim=True) if values.ndim > 2 else values

    def factor(self, curvature: Tensor, information: Tensor) -> Tensor:
        """One for each entry."""
        return _ratio(curvature * information, information.square())


class Gaussian(_Independent):
    """Mean z and unit variance: ``½ ‖z − y‖²``."""

    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """``u``."""
        return u

    def root(self, z: Tensor, u: Tensor) -> Tensor:
        """``u``."""
        return u

    def scores(self, z: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``z − y``, standard normal."""
        return torch.randn(count, *z.shape, dtype=z.dtype, device=z.device, generator=generator)


class Bernoulli(_Independent):
    """Logits z of independent events: binary cross-entropy with logits."""

    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """``p (1 − p) u``."""
        p = z.sigmoid()
        return p * (1 - p) * u

    def root(self, z: Tensor, u: Tensor) -> Tensor:
        """``√(p (1 − p)) u``."""
        return z.sigmoid().mul_(z.neg().sigmoid()).sqrt() * u

    def scores(self, z: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``p − y``."""
        p = z.sigmoid().expand(count, *z.shape)
        return p - torch.bernoulli(p, generator=generator)


class Poisson(_Independent):
    """Logarithms z of the rates of independent counts: ``exp(z) − y z``, Poisson regression."""

    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """``exp(z) u``."""
        return z.exp() * u

    def root(self, z: Tensor, u: Tensor) -> Tensor:
        """``exp(z/2) u``."""
        return (z / 2).exp() * u

    def scores(self, z: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``exp(z) − y``."""
        rate = z.exp().expand(count, *z.shape)
        return rate - torch.poisson(rate, generator)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.where(denominator > 0, torch.ones_like(denominator)), 0)
