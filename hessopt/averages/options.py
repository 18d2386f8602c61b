"""Options of running Kronecker averages, and of the loss whose curvature they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from torch import nn

from hessopt.averages.blocks import Sharing
from hessopt.checks import check_choice, check_count
from hessopt.closure.loss_curvature import LOSSES, REDUCTIONS, Columns, LossName, Reduction, check_criterion

CURVATURES = ("fisher", "ggn", "empirical")
COLUMNS = 1
"""Default number of back-propagated columns."""
ITERATIONS = 3
"""Default number of conjugate-gradient iterations."""


@dataclass(frozen=True)
class NamedLoss:
    """A loss of the network's output, by its name.

    Args:
        name: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"`` or ``"poisson_nll"`` (of logarithms of rates). None:
            another one, for ``curvature="empirical"``, which has to know no more than the reduction.
        reduction: ``"mean"``, ``"sum"`` or ``"batchmean"`` (sum divided by the batch size). Default: ``"mean"``.
        class_dim: Of the classes in the output, for ``"cross_entropy"``: for instance -1 for the ``(B, T, V)`` of a
            language model. Default: None, as in :func:`torch.nn.functional.cross_entropy`, the second of more than two.

    Raises:
        ValueError: an option is out of range, or does nothing.
    """

    name: LossName | None
    reduction: Reduction = "mean"
    class_dim: int | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_choice("loss", self.name, LOSSES, ", a torch.nn.Module or None")
        check_choice("reduction", self.reduction, REDUCTIONS)
        number = isinstance(self.class_dim, int) and not isinstance(self.class_dim, bool)
        if self.class_dim is not None and (self.name != "cross_entropy" or not number):
            raise ValueError(
                f'class_dim must be an integer, and the loss "cross_entropy", got {self.class_dim!r} and {self.name!r}.'
            )


Loss: TypeAlias = LossName | NamedLoss | nn.Module


def declared_loss(loss: Loss | None) -> NamedLoss | nn.Module | None:
    """A loss in one of its two forms.

    Raises:
        ValueError: it is of no known name, or a module whose reduction is "none".
    """
    if isinstance(loss, nn.Module):
        check_criterion(loss)
        return loss
    return loss if loss is None or isinstance(loss, NamedLoss) else NamedLoss(loss)


@dataclass(frozen=True)
class KroneckerAveraging:
    """Of which columns of the curvature and which layers there are running averages, and when these change.

    Args:
        decay: Weight of the past in the running averages; in [0, 1). Default: 0.9.
        factor_every: Steps between updates of factors (more often at first, see :func:`due`). Default: 10.
        inverse_every: Steps between inversions, likewise. Default: 40.
        iterations: Conjugate-gradient iterations, from bandwidth 1 on. Default: None, 3 there.
        columns: Back-propagated columns of the output curvature a sample, or ``"exact"``: one for each output. With
            ``curvature="empirical"`` there are none. Default: None, 1 where there are columns.
        sharing: ``"expand"`` or ``"reduce"``, for linear layers with several positions a sample. Default: ``"expand"``.
        max_size: Factors with more rows are diagonal. Default: 8192.
        seed: Of the random columns. Default: 0.
        rows: Factors are those of every k-th sample, k as large as leaves so many rows (samples times positions) for
            each dimension of the larger factor, and eight samples. Each update begins at another sample. Not where
            there are cross factors. Default: None, all samples.
        accumulate: n, backward passes whose curvature a step takes, of micro-batches whose gradients are accumulated:
            factors are those of one batch of them all. See :class:`hessopt.SpectralNewton`, where it is an argument of
            its own, for how to scale their losses. Default: 1, the first pass.

    Raises:
        ValueError: an option is out of range.
    """

    decay: float = 0.9
    factor_every: int = 10
    inverse_every: int = 40
    iterations: int | None = None
    columns: Columns | None = None
    sharing: Sharing = "expand"
    max_size: int = 8192
    seed: int = 0
    rows: int | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay!r}.")
        for name in ("factor_every", "inverse_every", "max_size", "accumulate"):
            check_count(name, getattr(self, name))
        for name in ("iterations", "rows"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.columns is not None and self.columns != "exact":
            check_count("columns", self.columns)
        check_choice("sharing", self.sharing, ("expand", "reduce"))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}.")


def check_curvature(curvature: str, loss: NamedLoss | nn.Module | None, averages: KroneckerAveraging) -> None:
    """Raise a ValueError unless there is such a curvature, and the options of loss and averages do something there."""
    check_choice("curvature", curvature, CURVATURES)
    if averages.columns == "exact" and curvature == "fisher":
        raise ValueError('columns="exact" is curvature="ggn"; Monte-Carlo columns have a number.')
    check_empirical(curvature, loss, averages)


def check_empirical(curvature: str, loss: NamedLoss | nn.Module | None, averages: KroneckerAveraging) -> None:
    """Raise a ValueError where options are for the empirical curvature alone, or for the others alone."""
    if averages.columns is not None and curvature == "empirical":
        raise ValueError('curvature="empirical" is that of the samples\' own gradients, without columns.')
    if isinstance(loss, NamedLoss) and loss.name is None and curvature != "empirical":
        raise ValueError('a loss without a name, of which only the reduction is known, is for curvature="empirical".')


def due(step: int, every: int, share: int = 1) -> bool:
    """Whether to refresh at this step (the first is 0): every so many steps, and more often at first.

    At first intervals are the ``share``-th part of the steps so far, and 1 at least: with 1 these are powers of two.
    """
    return step in _early(every, share) if step < every * share else step % every == 0


@cache
def _early(every: int, share: int) -> frozenset[int]:
    """The steps before ``every · share`` at which to refresh."""
    found, at = set(), 0
    while at < every * share:
        found.add(at)
        at += max(1, at // share)
    return frozenset(found)
