"""What a run of the model and its loss must be, so that it has second derivatives: checks after the run.

Each raises a :class:`diagnostics.CaptureError` that says what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from diagnostics.autograd.refusals import check_tensor
from diagnostics.autograd.tape import passes_through
from diagnostics.autograd.trees import tensors
from diagnostics.errors import CaptureError


def floating_tensors(z: Any) -> list[Tensor]:
    """The floating-point tensors, complex ones too, of the model's output; refused where there is none."""
    floating = [t for t in tensors(z) if t.is_floating_point() or t.is_complex()]
    if not floating:
        raise CaptureError(
            f"the model returned no floating-point tensor but {type(z).__name__}; the loss must be a function of a "
            "floating-point output."
        )
    return floating


def detached_output(output: str, sources: str) -> CaptureError:
    """The refusal of an output whose tape does not lead to its ``sources``."""
    return CaptureError(
        f"{output} is detached from {sources} (.detach(), .data, NumPy, or torch.no_grad inside forward), so no "
        "curvature flows back through it. Return it with its tape, and let what it is computed from require grad."
    )


def check_scalar_loss(
    loss: Any, parameters: Iterable[tuple[str, Tensor]], values: Callable[[], Iterable[tuple[str, Tensor]]]
) -> None:
    """Refuse a loss that is not one finite, real, differentiable number.

    Args:
        loss: What the loss function returned.
        parameters: The model's, by qualified name; where the loss is not finite they are looked at first.
        values: Gives what was computed on the way to the loss, in order, and what to call it; looked at next.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CaptureError(f"loss_fn must return a scalar tensor, got {got}. Reduce it, for example with .mean().")
    check_tensor(loss, "the loss")
    if not loss.is_floating_point():
        raise CaptureError(f"the loss has dtype {loss.dtype}: it must be a differentiable floating-point scalar.")
    if not torch.isfinite(loss):
        raise CaptureError(f"the loss is {loss.item()}. {_first_non_finite(parameters, values())}")
    if not loss.requires_grad:
        raise CaptureError(
            "the loss is detached: loss_fn must return a tensor computed from z, not .item() or .detach()."
        )


def _first_non_finite(parameters: Iterable[tuple[str, Tensor]], values: Iterable[tuple[str, Tensor]]) -> str:
    for name, parameter in parameters:
        if not torch.isfinite(parameter).all():
            return f"Parameter {name!r} is not finite."
    for where, value in values:
        if not torch.isfinite(value).all():
            return f"The first tensor that is not finite is {where}: check the inputs and the module behind it."
    return "The model's output is finite, so the loss function itself (or its targets) makes it."


def check_unmodified(versions: Iterable[tuple[str, Tensor, int]]) -> None:
    """Refuse parameters ``(name, parameter, version before the run)`` that the run has changed in place."""
    for name, parameter, version in versions:
        if parameter._version != version:
            raise CaptureError(
                f"parameter {name!r} was changed in place by the forward pass or the loss (F.embedding with "
                "max_norm, a copy_ under no_grad?), so the model is not what it was. Do that outside of them."
            )


def check_tapes(ends: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tapes that end at a reentrant checkpoint; ``ends`` are tensors and what to call them."""
    for where, end in ends:
        if passes_through(end, "CheckpointFunctionBackward"):
            raise CaptureError(
                f"{where} is computed by reentrant checkpointing (torch.utils.checkpoint), which has no second "
                "derivative and hides its parameters. Turn checkpointing off meanwhile "
                "(model.gradient_checkpointing_disable() in transformers)."
            )
