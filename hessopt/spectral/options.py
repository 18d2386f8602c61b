"""The parts of SpectralNewton's rule that have options of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hessopt.averages.options import KroneckerAveraging, check_empirical
from hessopt.checks import check_choice, check_count, check_type
from hessopt.network.cliques import Bandwidth, check_bandwidth
from hessopt.spectral.groups import Exponents, Selection, check_exponents
from hessopt.spectral.transfer import Form, NewtonSchulz


@dataclass(frozen=True)
class OnlineExponent:
    """How exponents are measured while a network trains, for the matrices whose α is ``"online"``.

    Args:
        every: Steps from one measurement to the next. Default: 100.
        directions: Most singular directions of a measurement, at least 3. Default: 10.
        decay: Weight of the past in the average of measurements, in [0, 1). Default: 0.5.
        batch: Fixed batch ``(inputs, targets)`` to measure on. Default: None, that of the closure.
        loss_fn: ``loss_fn(z, targets) -> scalar`` for ``batch``; both or none.

    Raises:
        ValueError: an option is out of range.
    """

    every: int = 100
    directions: int = 10
    decay: float = 0.5
    batch: Any = None
    loss_fn: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_count("directions", self.directions, 3)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}.")
        if (self.batch is None) != (self.loss_fn is None):
            raise ValueError("a fixed batch for the online alpha needs both batch= and loss_fn=.")


@dataclass(frozen=True)
class PowerLaw:
    """The transfer ``T(σ; α)`` of singular values (:func:`hessopt.spectral_map`).

    Args:
        alpha: A number of at least 0; ``"online"``; or a dict of these for ``"conv"`` and ``"linear"``. Default: 2.
        delta: δ ≥ 0. Default: 0.1.
        form: ``"scale_free"`` or ``"published"``. Default: ``"scale_free"``.
        newton_schulz: For α = 1: Newton-Schulz iterations in place of the exact polar factor. Default: None.
        online: How α is measured where it is ``"online"``. Default: None, :class:`OnlineExponent` with its defaults.
        nesterov: Whether the direction is that of the gradient with momentum once more. Default: True.

    Raises:
        ValueError: an option is out of range, or does nothing.
    """

    alpha: Exponents = 2.0
    delta: float = 0.1
    form: Form = "scale_free"
    newton_schulz: NewtonSchulz | None = None
    online: OnlineExponent | None = None
    nesterov: bool = True

    def __post_init__(self) -> None:
        check_exponents(self.alpha)
        exponents = self.alpha.values() if isinstance(self.alpha, Mapping) else [self.alpha]
        if self.online is not None and "online" not in exponents:
            raise ValueError('online= says how alpha="online" is measured; no layer has that exponent.')


@dataclass(frozen=True)
class KroneckerCoordinates:
    """Coordinates in which the Kronecker-factored curvature of a layer is nearly the identity, and what they are from.

    Args:
        exponent: p, in (0, 0.5]: powers ``-p`` of both factors. Default: 0.25.
        damping: δ > 0: factors get ``√δ`` times their mean eigenvalue. Default: 1e-2.
        averages: Of the factors, and when these and their powers change. Default:
            ``KroneckerAveraging(decay=0.95, rows=4)``.
        curvature: Of what the factors of the outputs, and the curvature between layers, are made. ``"fisher"``:
            Monte-Carlo columns of the loss's output curvature, back-propagated at updates. ``"empirical"``: the
            gradients of the samples, which need no further backward pass; nothing of the loss need be known where it is
            a mean over samples, but the module that computes it has to be declared where it is scaled, or divided for
            accumulation. That is the curvature as far as targets are as if drawn from the network's prediction, which
            is near enough for a cross entropy. It fails for least squares whose residuals are alike (of an
            autoencoder's, within an image at first), and as its unit is that of the loss squared, a factor on the loss
            is one on the inverse step lengths. Default: ``"fisher"``.

    Raises:
        ValueError: an option is out of range, or does nothing.
    """

    exponent: float = 0.25
    damping: float = 1e-2
    averages: KroneckerAveraging = KroneckerAveraging(decay=0.95, rows=4)  # noqa: RUF009 - frozen
    curvature: Literal["fisher", "empirical"] = "fisher"

    def __post_init__(self) -> None:
        if not 0 < self.exponent <= 0.5:
            raise ValueError(f"exponent must lie in (0, 0.5], got {self.exponent!r}.")
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping must be positive and finite, got {self.damping!r}.")
        check_type("averages", self.averages, KroneckerAveraging)
        check_choice("curvature", self.curvature, ("fisher", "empirical"))
        check_empirical(self.curvature, None, self.averages)
        if self.averages.iterations is not None:
            raise ValueError("iterations are of conjugate gradients, of which spectral steps need none.")
        if self.averages.accumulate != 1:
            raise ValueError("accumulate is an argument of its own: SpectralNewton(…, accumulate=n).")


@dataclass(frozen=True)
class Momentum:
    r"""Momentum ``M ← μ M + (1 − μ) G``, in which one batch counts for little more than another.

    Args:
        decay: μ, in [0, 1). Default: 0.9.
        clip: c > 0: a gradient G with ``‖G‖ > c · n`` is scaled down to that, n being the running mean of these norms,
            the smaller ones, over some thirty steps. It is of all matrices together, after the first
            five steps. As the step is along the polar factor of M, norms are no more than the weights of batches in M,
            and one that is ten times longer would decide on the direction of the next ten steps. None: no clipping.
            Default: 1.5.

    Raises:
        ValueError: an option is out of range.
    """

    decay: float = 0.9
    clip: float | None = 1.5

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.decay}.")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive and finite, or None for none, got {self.clip!r}.")


@dataclass(frozen=True)
class CurvatureLengths:
    """Step lengths from the curvature between the steps of layers.

    Args:
        share: η, in (0, 1]: how much of the way to the minimum of the model is gone. Default: 0.5.
        decay: Weight of the past in its averages, in [0, 1). Default: 0.9.
        bandwidth: Pairs of layers at most so far apart count; ``"auto"``, at most the interaction radius, measured at
            every update; or ``"full"``. Default: ``"auto"``.
        response: ρ, in (0, 1]: where gradients differ from step to step, the power of a length that the model decides,
            the rest being that of past ones, of at most 0.01 with the default share. 1: the model alone. Default: 1/3.

    Raises:
        ValueError: an option is out of range.
    """

    share: float = 0.5
    decay: float = 0.9
    bandwidth: Bandwidth | Literal["auto"] = "auto"
    response: float = 1 / 3

    def __post_init__(self) -> None:
        for name in ("share", "response"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)!r}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay!r}.")
        if self.bandwidth != "auto":
            check_bandwidth(self.bandwidth)


@dataclass(frozen=True)
class AdamWPart:
    """What AdamW trains beside the matrices, and how.

    Args:
        select: Which matrices: names, patterns or a predicate ``(name, parameter) -> bool``, for which the network is
            needed; None: embeddings and the head (:func:`hessopt.left_to_adamw`). Default: None.
        ratio: Its learning rate in units of the optimizer's. Default: 1.
        betas: Default: (0.9, 0.999).
        eps: Default: 1e-8.

    Raises:
        ValueError: an option is out of range.
    """

    select: Selection = None
    ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("ratio", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas must lie in [0, 1), got {self.betas}.")
