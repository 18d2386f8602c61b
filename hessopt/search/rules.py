"""Rules with options of their own: how far a step goes, and how running averages are damped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from hessopt.checks import check_choice, check_count
from hessopt.search.damping import NielsenDamping
from hessopt.search.trust_region import TrustRegion

LEAST, MOST = 1e-14, 1e10
"""Default bounds of λ."""


@dataclass(frozen=True)
class Damped:
    """Levenberg-Marquardt: a step is tried, and solved for anew with more damping until one lowers the objective.

    λ follows the ratio of the actual to the predicted reduction (:class:`hessopt.search.damping.NielsenDamping`).

    Args:
        damping: λ to start from, in the units of the curvature. Default: 1e-2.
        minimum: Lower bound of λ. Default: 1e-14.
        maximum: Upper bound of λ. Default: 1e10.
        max_rejections: Rejected solves until a step gives up; at least 1. Default: 5.

    Raises:
        ValueError: an option is out of range.
    """

    damping: float = 1e-2
    minimum: float = LEAST
    maximum: float = MOST
    max_rejections: int = 5

    def __post_init__(self) -> None:
        check_count("max_rejections", self.max_rejections)
        self.start()

    def start(self) -> NielsenDamping:
        """λ of the first step, with its bounds."""
        return NielsenDamping(self.damping, minimum=self.minimum, maximum=self.maximum)


@dataclass(frozen=True)
class LineSearch:
    """Of the step's multiples 1, ½, ¼, …, the first that lowers the objective, or a smaller one if it is better still.

    Then less damping follows from a long step and more from a short one
    (:meth:`hessopt.search.damping.NielsenDamping.follow_length`). For residuals, on all rows or on random ones: λ falls
    to next to nothing, and the length keeps steps that fit few rows exactly from going too far.

    Args:
        damping: λ to start from, in the units of the curvature. None: 1e-2. Default: None.
        minimum: Lower bound of λ, which is 50 ε tr(GGN) at least if λ follows the multiple. Default: 1e-14.
        maximum: Upper bound of λ. Default: 1e10.
        adapt: Whether λ follows the multiple. If False it stays as it is, and is 50 ε tr(GGN), anew at each step, with
            ``damping=None``. Default: True.

    Raises:
        ValueError: an option is out of range.
    """

    damping: float | None = None
    minimum: float = LEAST
    maximum: float = MOST
    adapt: bool = True

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> NielsenDamping:
        """λ of the first step, with its bounds; the lower one where it depends on the curvature."""
        constant = self.minimum if self.damping is None else self.damping
        value = min(max(1e-2, self.minimum), self.maximum) if self.damping is None and self.adapt else constant
        return NielsenDamping(value, minimum=self.minimum, maximum=self.maximum)


@dataclass(frozen=True)
class Fixed:
    """Every step is taken, without an evaluation, and λ stays as it is.

    Args:
        damping: λ, in the units of the curvature. Default: 1e-2.
        maximum: Upper bound of what the precision asks for where λ is smaller than that. Default: 1e10.

    Raises:
        ValueError: an option is out of range.
    """

    damping: float = 1e-2
    maximum: float = MOST

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> NielsenDamping:
        """λ, with its bounds."""
        minimum = self.damping if 0 < self.damping < LEAST else LEAST
        return NielsenDamping(self.damping, minimum=minimum, maximum=self.maximum)


Search: TypeAlias = Damped | LineSearch | Fixed


@dataclass(frozen=True)
class TrustRadius:
    """NewtonCG's steps stay within a radius Δ, which follows the ratio of the actual to the predicted reduction.

    Args:
        radius: Δ to start from. Default: 1.
        maximum: Upper bound of Δ. Default: 1e10.

    Raises:
        ValueError: an option is out of range.
    """

    radius: float = 1.0
    maximum: float = MOST

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> TrustRegion:
        """Δ of the first step, with its bounds."""
        return TrustRegion(self.radius, maximum=self.maximum)


@dataclass(frozen=True)
class LevenbergMarquardt:
    """NewtonCG's conjugate gradients solve ``(B + λI) d = −g``, and a rejected step is searched back along its line.

    Args:
        damping: λ to start from; it follows Nielsen's rule (:class:`hessopt.search.damping.NielsenDamping`).
            Default: 1e-2.

    Raises:
        ValueError: the option is out of range.
    """

    damping: float = 1e-2

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> NielsenDamping:
        """λ of the first step, with its bounds."""
        return NielsenDamping(self.damping)


@dataclass(frozen=True)
class KroneckerDamping:
    """λ of running Kronecker averages.

    Args:
        value: λ to start from. Default: None, 2e-3 in units of the loss and 1 in units of layers.
        unit: What λ is a multiple of: ``"loss"``, the loss's output curvature, the same number for all layers; or
            ``"layer"``, the mean of each layer's own diagonal, so that a layer whose inputs or gradients are rescaled
            takes the rescaled step. Default: ``"loss"``.
        adapt_every: Steps between adaptations of λ by the reduction ratio, each with one more evaluation of the
            closure, which steps then need; None: λ is constant. Default: None.
        adapt_rate: λ's factor a step, ``adapt_rate ** adapt_every`` in one adaptation. Default: None, 0.95 where λ is
            adapted.

    Raises:
        ValueError: an option is out of range, or does nothing.
    """

    value: float | None = None
    unit: Literal["loss", "layer"] = "loss"
    adapt_every: int | None = None
    adapt_rate: float | None = None

    def __post_init__(self) -> None:
        if self.value is not None and not 0 < self.value < float("inf"):
            raise ValueError(f"damping must be a positive number, got {self.value!r}.")
        check_choice("unit of the damping", self.unit, ("loss", "layer"))
        if self.adapt_every is not None:
            check_count("adapt_every", self.adapt_every)
        elif self.adapt_rate is not None:
            raise ValueError("adapt_rate is the rate of adaptations, of which there are none without adapt_every.")
        if self.adapt_rate is not None and not 0 < self.adapt_rate < 1:
            raise ValueError(f"adapt_rate must lie in (0, 1), got {self.adapt_rate!r}.")

    @property
    def start(self) -> float:
        """λ of the first step."""
        return self.value if self.value is not None else 2e-3 if self.unit == "loss" else 1.0

    @property
    def factor(self) -> float:
        """λ's factor in one adaptation."""
        rate = 0.95 if self.adapt_rate is None else self.adapt_rate
        return float(rate ** (self.adapt_every or 0))
