"""Options of the mini-batch form of :class:`hessopt.BandedNewton`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hessopt.averages.blocks import Sharing
from hessopt.closure.loss_curvature import LOSSES, REDUCTIONS, Columns, Loss, Reduction, check_criterion

CURVATURES = ("fisher", "ggn", "empirical")


@dataclass(frozen=True)
class MiniBatch:
    """Options of ``BandedNewton(model, factors="kronecker", mini_batch=MiniBatch(…))``.

    Args:
        loss: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"`` or ``"poisson_nll"`` (of logarithms of rates) of the
            network's output, or the module that computes the loss, as :class:`torch.nn.CrossEntropyLoss`: then the
            optimizer takes ``loss.backward(); optimizer.step()``, without a closure. A module may have class weights,
            label smoothing and ignored targets, and what it is called with need not be what the network returns
            (:func:`hessopt.closure.loss_curvature.criterion_curvature` lists the closed forms; of any other module the
            output Hessian is used, if it is a sum over samples with at most 256 outputs each). Its value is taken for
            the loss: a factor on it afterwards changes the gradient and not the curvature. What counts is a call that
            ``backward()`` follows, the first of several (:class:`hessopt.averages.passes.Choice`).
            ``curvature="empirical"`` needs no declaration, but has to see the loss as a module where it is scaled or
            divided. None: any loss, with a closure. Default: None.
        reduction: Of a loss declared by name: ``"mean"``, ``"sum"`` or ``"batchmean"`` (sum divided by the batch size).
        class_dim: Of the classes in the output of a declared ``"cross_entropy"``, for instance -1 for the ``(B, T, V)``
            of a language model. None: as in :func:`torch.nn.functional.cross_entropy`, the second of more than two.
        momentum: μ, of param groups without their own; in [0, 1). Default: 0.5.
        trust: Δ, bound on the model's measure ``dᵀPd`` of a step before momentum and learning rate, in units of the
            loss's curvature (:attr:`hessopt.kronecker.band.KroneckerBand.scale`); None for no bound. Default: 5e-3.
        graft: ``"sgd"``: each parameter's step gets the norm of its gradient. Default: None.
        decay: Weight of the past in the running averages; in [0, 1). Default: 0.9.
        factor_every: Steps between updates of factors (more often before the first). Default: 10.
        inverse_every: Steps between inversions. Default: 40.
        iterations: Conjugate-gradient iterations, from bandwidth 1 on. Default: 3.
        columns: Back-propagated columns of the output curvature a sample, or ``"exact"``: one for each output.
            Default: 1.
        sharing: ``"expand"`` or ``"reduce"``, for linear layers with several positions a sample. Default: ``"expand"``.
        max_size: Factors with more rows are diagonal. Default: 8192.
        damping_unit: What λ is a multiple of: ``"loss"``, the loss's output curvature, as for ``trust``, the same
            number for all layers; or ``"layer"``, the mean of each layer's own diagonal, so that a layer whose inputs
            or gradients are rescaled takes the rescaled step. Default: ``"loss"``.
        adapt_every: Steps between adaptations of λ by the reduction ratio, each with one more evaluation of the
            closure; None: λ is constant. Default: None.
        adapt_rate: λ's factor a step, ``adapt_rate ** adapt_every`` in one adaptation. Default: 0.95.
        seed: Of the random columns. Default: 0.

    Raises:
        ValueError: an argument is out of range.
    """

    loss: Loss | None = None
    reduction: Reduction = "mean"
    class_dim: int | None = None
    momentum: float = 0.5
    trust: float | None = 5e-3
    graft: Literal["sgd"] | None = None
    decay: float = 0.9
    factor_every: int = 10
    inverse_every: int = 40
    iterations: int = 3
    columns: Columns = 1
    sharing: Sharing = "expand"
    max_size: int = 8192
    damping_unit: Literal["loss", "layer"] = "loss"
    adapt_every: int | None = None
    adapt_rate: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum!r}.")
        if self.trust is not None and not self.trust > 0:
            raise ValueError(f"trust must be positive, or None for no trust region, got {self.trust!r}.")
        if not 0 < self.adapt_rate < 1:
            raise ValueError(f"adapt_rate must lie in (0, 1), got {self.adapt_rate!r}.")
        _check_choice("graft", self.graft, ("sgd", None))
        if self.adapt_every is not None:
            _check_counts({"adapt_every": self.adapt_every})
        check_engine(**self.engine)

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of :class:`hessopt.kronecker.band.KroneckerBand`."""
        names = (
            "loss", "reduction", "class_dim", "columns", "decay", "factor_every", "inverse_every", "iterations",
            "sharing", "max_size", "damping_unit", "seed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def check_engine(
    *,
    loss: object,
    reduction: object,
    class_dim: object,
    columns: object,
    decay: float,
    factor_every: object,
    inverse_every: object,
    iterations: object,
    sharing: object,
    max_size: object,
    damping_unit: object,
    seed: object,
) -> None:
    """Raise a ValueError unless the options of the engine are in range."""
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_choice("sharing", sharing, ("expand", "reduce"))
    if isinstance(loss, nn.Module):
        check_criterion(loss)
        if reduction != "mean":
            raise ValueError(f"reduction={reduction!r} is of a loss by name; a loss module has its own.")
    elif loss not in (*LOSSES, None):
        raise ValueError(
            f"loss must be one of {', '.join(map(repr, LOSSES))}, a torch.nn.Module or None, got {loss!r}."
        )
    _check_choice("damping_unit", damping_unit, ("loss", "layer"))
    counts = {
        "factor_every": factor_every, "inverse_every": inverse_every, "iterations": iterations, "max_size": max_size,
    }  # fmt: skip
    _check_counts(counts if columns == "exact" else {**counts, "columns": columns})
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay!r}.")
    if class_dim is not None and (
        loss != "cross_entropy" or isinstance(class_dim, bool) or not isinstance(class_dim, int)
    ):
        raise ValueError(
            f'class_dim must be an integer, and loss="cross_entropy", got {class_dim!r} and loss={loss!r}.'
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}.")


def check_curvature(curvature: object, columns: object, damping: float) -> None:
    """Raise a ValueError unless kind and damping of the curvature are in range."""
    _check_choice("curvature", curvature, CURVATURES)
    if columns == "exact" and curvature == "fisher":
        raise ValueError('columns="exact" is curvature="ggn"; Monte-Carlo columns have a number.')
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be a positive number, got {damping!r}.")


def _check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_counts(counts: dict[str, object]) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def check_mini_batch(averages: bool, mini_batch: object, others: Sequence[str]) -> None:
    """Raise an error unless the options are those of the kind of factors.

    Args:
        averages: ``factors="kronecker"``.
        mini_batch: Its options.
        others: Names of arguments that were given and that only the other kinds have.
    """
    if mini_batch is not None and not isinstance(mini_batch, MiniBatch):
        raise TypeError(f"mini_batch must be a hessopt.MiniBatch, got {type(mini_batch).__name__}.")
    if mini_batch is not None and not averages:
        raise ValueError('mini_batch= holds the options of running averages: pass factors="kronecker" with it.')
    if averages and others:
        raise ValueError(
            f'{", ".join(others)} {"is" if len(others) == 1 else "are"} for exact factors, and factors="kronecker" has '
            "no such option; see hessopt.MiniBatch for those that it has."
        )
