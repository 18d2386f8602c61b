"""Parameters without values and gradients that are not finite: refused before anything has been changed by them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessopt.errors import ClosureError


@torch.no_grad()
def gradient_norm(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor] = (), model: nn.Module | None = None
) -> float:
    """``‖g‖`` over all gradients, for which the device is waited for once.

    Args:
        gradients: Of the parameters, in their order; None counts as zero.
        parameters: To be named in the error.
        model: Knows their names.

    Raises:
        ClosureError: a gradient is not finite.
    """
    entries = [None if g is None else _entries(g.detach()) for g in gradients]
    found = [g for g in entries if g is not None]
    norm = float(nn.utils.get_total_norm(found)) if found else 0.0
    if math.isfinite(norm):
        return norm
    refuse_not_finite(entries, parameters, model)
    return math.sqrt(sum(float(g.double().square().sum()) for g in found))  # finite, but its square is not


def refuse_not_finite(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor] = (), model: nn.Module | None = None
) -> None:
    """Raise a ClosureError for the first gradient that is not finite; the device is waited for once.

    Args:
        gradients: Of the parameters, in their order; None counts as zero.
        parameters: To be named in the error.
        model: Knows their names.
    """
    finite = [g.isfinite().all() for g in gradients if g is not None]
    if not finite or torch.stack([f.to(finite[0].device) for f in finite]).all():
        return
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    for i, g in enumerate(gradients):
        if g is not None and not g.isfinite().all():
            which = ""
            if i < len(parameters):
                p = parameters[i]
                which = f" of parameter {names.get(id(p), i)!r}, of shape {tuple(p.shape)},"
            raise ClosureError(
                f"the gradient{which} is not finite at the current parameters, which were left as they are. Check the "
                "batch; torch.autograd.set_detect_anomaly(True) finds the operation."
            )


def _entries(g: Tensor) -> Tensor:
    return g.coalesce().values() if g.layout == torch.sparse_coo else g
