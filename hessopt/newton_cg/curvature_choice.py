"""Which curvature the next step takes: the full Hessian, or the Gauss-Newton matrix."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from hessopt.newton_cg.truncated_cg import Path

SMALL, LARGE = 0.1, 0.25
"""Gaps below which the Gauss-Newton matrix is enough, and above which the full Hessian can be worth its price."""
BETTER, WORSE = 1.0, 1.2
"""Error in the gradient by the full Hessian, in units of that by the Gauss-Newton matrix, below which the full Hessian
is taken, and above which it is left."""
CLEARLY = 0.7
"""Where H is indefinite and the gradient large, the error ratio that the full Hessian has to undercut."""
POOR = 0.25
"""Distance of the ratio of actual to predicted reduction from 1 at which a Gauss-Newton model is looked into."""
OFTEN, NOW_AND_THEN, SELDOM = 10.0, 20.0, 40.0
"""Gradient-equivalents between two measurements, each of which costs 4/3 to 8/3."""
LOOK = 1e-3
"""Fall of the gradient's norm after which one step takes the full Hessian to see whether this is a saddle."""
WINDOW = 3
"""Measurements that the gap is averaged over."""

_REASONS = ("start", "small gap", "large gap", "no better model", "look at H", "saddle", "no saddle")

_log = logging.getLogger(__name__)


@dataclass
class CurvatureChoice:
    r"""The rule of ``curvature="auto"``.

    Measured, now and then, is what the two models say about an accepted step ``d``, a vector that is common to both:

    - the gap ``‖Td‖ / ‖(H − T) d‖``, in the space of parameters, averaged over the last three measurements, with its
      standard error. A step lies where the curvature is small, which is where T matters; in the Frobenius norm, the
      gap is one of the largest eigenvalues;
    - at the next step, and for nothing, how far the new gradient is from ``g + Gd`` and from ``g + Hd``: the errors
      of the two models.

    The next step then takes

    1. the Gauss-Newton matrix, if the gap is small: mean + standard error < 0.1;
    2. the full Hessian, if the gap is large, mean − standard error > 0.25, and its error is the smaller one — near a
       minimum it is, being quadratic in d. Where H was found indefinite while the gradient was large, its error must
       be below 0.7 of the other;
    3. the Gauss-Newton matrix, if the full Hessian's error is more than 1.2 times the other's: this is so far from
       minima, where T changes along the step as much as it is;
    4. what the last one took, otherwise.

    A gradient is large where ``‖g‖ > ½ |λ| Δ``, with the least Ritz value λ < 0 of conjugate gradients and the radius
    Δ: the slope then promises more than the negative curvature, ``½ |λ| Δ²``. Where it is not, the point is near a
    saddle, and the full Hessian stays. A Gauss-Newton iteration that runs into a saddle does not see it; therefore,
    whenever the gradient has become a thousand times smaller, one step takes the full Hessian, and goes on with it if
    it finds a saddle.

    A measurement is one product. It is due after 10 gradient-equivalents where the Gauss-Newton matrix predicts the
    loss badly (the ratio of actual to predicted reduction is off 1 by more than ¼, or a trial was rejected), after 40
    where it does not, or where the gap was large and the Hessian is in use, and after 20 else.

    Attributes:
        full: The full Hessian is in use; at first it is not.
        reason: Why, as an index; see :attr:`why`.
        since: Gradient-equivalents since the last measurement.
        reference: Norm of the gradient at the last look at H.
        gaps: The last measurements.
        error_ratio: The full Hessian's error by that of the Gauss-Newton matrix, at the last measurement.
        indefinite: The last step found H indefinite, and the gradient large.
        saddle: The last step found H indefinite, and the gradient small.
        looking: The last step was a look at H.
    """

    full: bool = False
    reason: int = 0
    since: float = OFTEN / 2
    reference: float = math.inf
    gaps: list[float] = field(default_factory=list)
    error_ratio: float = math.nan
    indefinite: bool = False
    saddle: bool = False
    looking: bool = False

    @property
    def kind(self) -> str:
        """``"hessian"`` or ``"ggn"``."""
        return "hessian" if self.full else "ggn"

    @property
    def why(self) -> str:
        """The reason in words."""
        return _REASONS[self.reason]

    @property
    def gap(self) -> tuple[float, float]:
        """Mean of the last measurements and its standard error; NaN without any, and 0 for the error of one."""
        count = len(self.gaps)
        if count == 0:
            return math.nan, math.nan
        mean = sum(self.gaps) / count
        if count == 1:
            return mean, 0.0
        return mean, math.sqrt(sum((gap - mean) ** 2 for gap in self.gaps) / (count - 1) / count)

    def begin(self, norm: float, errors: tuple[float, float] | None) -> str:
        """Choose for a step.

        Args:
            norm: ``‖g‖``.
            errors: Of the Gauss-Newton and of the full model of this gradient, if the last step was measured.

        Returns:
            :attr:`kind`.
        """
        before = self.full
        if self.looking:
            self.looking = False
            self._take(self.saddle, "saddle" if self.saddle else "no saddle")
        if errors is not None:
            self._compare(*errors)
        if not math.isfinite(self.reference):
            self.reference = norm
        if not self.full and norm < LOOK * self.reference:
            self.reference = norm
            self.looking = True
            self._take(True, "look at H")
        if self.full != before:
            mean, error = self.gap
            _log.info("NewtonCG takes %s: %s (gap %.2g ± %.2g, ‖g‖ %.2g)", self.kind, self.why, mean, error, norm)
        return self.kind

    def due(self, work: float, ratio: float | None, trials: int) -> bool:
        """Whether to measure the gap along the accepted step.

        Args:
            work: Gradient-equivalents of this step so far.
            ratio: Actual by predicted reduction.
            trials: Evaluations of the loss.
        """
        if self.full:
            interval = SELDOM if self.gaps and self.gaps[-1] > LARGE else NOW_AND_THEN
        else:
            poor = ratio is None or trials > 1 or abs(ratio - 1) > POOR
            interval = OFTEN if poor else SELDOM
        return self.since + work >= interval

    def end(self, norm: float, radius: float, path: Path, work: float, gap: float | None) -> None:
        """Take note of a step.

        Args:
            norm: ``‖g‖``.
            radius: Δ after the step.
            path: Of conjugate gradients.
            work: Gradient-equivalents of the step.
            gap: If it was measured.
        """
        self.since = 0.0 if gap is not None else self.since + work
        if gap is not None:
            self.gaps = [*self.gaps, gap][-WINDOW:]
        least = path.ritz[0] if self.full and path.ritz else 0.0
        self.indefinite = least < 0 and norm > -least * radius / 2
        self.saddle = least < 0 and not self.indefinite

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers and a list of them."""
        return asdict(self)

    def _compare(self, ggn: float, hessian: float) -> None:
        mean, uncertainty = self.gap
        self.error_ratio = hessian / ggn if ggn > 0 else math.inf
        if mean + uncertainty < SMALL:
            self._take(self.saddle, "saddle" if self.saddle else "small gap")
        elif mean - uncertainty > LARGE and self.error_ratio < (CLEARLY if self.indefinite else BETTER):
            self._take(True, "large gap")
        elif self.error_ratio > WORSE and not self.saddle:
            self._take(False, "no better model")

    def _take(self, full: bool, reason: str) -> None:
        self.full, self.reason = full, _REASONS.index(reason)
