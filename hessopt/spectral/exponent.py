"""The curvature exponent of single layers, measured during training for SpectralNewton."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.alignment.exponents import LayerCurvature, rank_one, top_directions
from diagnostics.operators.curvature_tape import JointTape
from diagnostics.results.power_law import PowerLaw, fit_power_law
from hessopt.errors import ModelError

_log = logging.getLogger(__name__)

LOWEST, HIGHEST = 0.5, 2.5
"""Range of the exponents that are used."""
LEAST_R2 = 0.8
FALLBACK = 1.0
"""α where the fit is worse than :data:`LEAST_R2`."""


@dataclass(frozen=True)
class Probe:
    """A fixed batch to measure exponents on.

    Attributes:
        model: The network.
        batch: ``(inputs, targets)``, or a source of such pairs.
        loss_fn: ``loss_fn(z, targets) -> scalar``.
    """

    model: nn.Module
    batch: Any
    loss_fn: Callable[[Any, Any], Tensor]

    def measure(self, parameters: Sequence[Tensor], signs: Sequence[float], directions: int) -> list[PowerLaw]:
        """α of each parameter, of the model's present parameters."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        unknown = [p for p in parameters if id(p) not in names]
        if unknown:
            raise ModelError(f"a parameter of shape {tuple(unknown[0].shape)} is not one of the model's.")
        mine = [names[id(p)] for p in parameters]
        op = LayerCurvature(self.model, self.batch, self.loss_fn, parameters=mine)
        gradients = op.unflatten(op.loss_and_gradient()[1])
        top = {name: top_directions(gradients[name], directions) for name in mine}
        forms = op.quadratic_forms({name: (u, v) for name, (u, _, v) in top.items()})
        return [_fit(top[name][1], sign * forms[name]) for name, sign in zip(mine, signs, strict=True)]


def measure_on_tape(
    loss: Tensor, parameters: Sequence[Tensor], signs: Sequence[float], directions: int
) -> list[PowerLaw]:
    """α of each parameter from the tape of the loss, which stays.

    Args:
        loss: Without dimensions.
        parameters: Weights that require grad.
        signs: -1 where the loss is maximized.
        directions: Most singular directions of a layer, one product each.

    Raises:
        DiagnosticsError: an operation has no second derivative.
    """
    tape = JointTape(loss, parameters, [f"of shape {tuple(p.shape)}" for p in parameters])
    found = []
    for p, g, sign in zip(parameters, tape.gradients, signs, strict=True):
        sigma, d = _directions(torch.zeros_like(p) if g is None else g.detach(), directions)
        (bent,) = tape.vjps([g], [p], [d])
        h = (bent * d).flatten(1).sum(1)
        found.append(_fit(sigma, sign * h.to(sigma.dtype)))
    return found


def smoothed(before: float | None, fit: PowerLaw, decay: float, name: str) -> tuple[float, bool]:
    """The exponent to use after a fit, and whether the fit was good.

    ``decay · before + (1 − decay) · fit``, with the fit clamped to [0.5, 2.5]; 1 where its R² is below 0.8 (or it has
    too few points), from where the next good fit starts anew.
    """
    if not fit.r2 >= LEAST_R2:  # also NaN
        _log.info("exponent of %s falls back to %g: R² = %.3f of %d points", name, FALLBACK, fit.r2, fit.points)
        return FALLBACK, False
    value = min(max(fit.exponent, LOWEST), HIGHEST)
    _log.debug("exponent of %s: %s", name, fit)
    return (value if before is None else decay * before + (1 - decay) * value), True


def _directions(gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    matrix = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    u, sigma, v = top_directions(matrix, count)
    return sigma, rank_one(u, v, gradient.shape).to(gradient.dtype)


def _fit(sigma: Tensor, h: Tensor) -> PowerLaw:
    kept = (h > 0) & h.isfinite()
    if not bool(kept.any()):
        return PowerLaw(math.nan, math.nan, math.nan, math.nan, 0)
    return fit_power_law(sigma[kept], h[kept])
