"""What a closure may return, and the loss in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from hessopt.errors import ClosureError


class LeastSquares:
    """The loss ``½ Σ r²`` of residuals ``r``, for a closure to return.

    There is no 1/N in it: for a mean-squared objective over N residuals pass ``r * (2 / N) ** 0.5``.

    Args:
        residuals: Tensor of any shape; the optimizers that need samples expect ``(B, …)``.

    Attributes:
        residuals: What was passed.
        loss: ``½ Σ r²``, a tensor without dimensions.

    Example:
        >>> LeastSquares(torch.tensor([3.0, 4.0])).loss
        tensor(12.5000)
    """

    def __init__(self, residuals: Tensor) -> None:
        if not isinstance(residuals, Tensor):
            raise TypeError(f"LeastSquares takes a tensor of residuals, got {type(residuals).__name__}.")
        self.residuals = residuals
        self.loss: Tensor = residuals.square().sum() / 2

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Call ``loss.backward`` with the same arguments."""
        # Through the tensor, so that a TorchFunctionMode sees the call.
        self.loss.backward(*args, **kwargs)

    def item(self) -> float:
        """The loss as a number."""
        return float(self.loss.item())

    def __repr__(self) -> str:
        return f"LeastSquares(residuals of shape {tuple(self.residuals.shape)})"


ClosureResult: TypeAlias = "Tensor | tuple[Tensor, Tensor] | LeastSquares"


def part_of(value: object, name: str) -> object:
    """What an object has under a name, as a key if it is a mapping, else as an attribute; None where there is none."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def output_tensor(output: object) -> Tensor | None:
    """The tensor that a loss is computed from, in what a network returned: this itself, or its ``logits``; or None."""
    found = output if isinstance(output, Tensor) else part_of(output, "logits")
    return found if isinstance(found, Tensor) else None


def opened(returned: object) -> object:
    """What a closure returned, with ``(loss, logits)``, or its loss alone, in place of an object that has these.

    Such objects are those of Hugging Face's networks, dataclasses and dicts. Tensors, plain tuples, numbers,
    :class:`LeastSquares` and what has no ``loss``, a tensor or number, are given back.
    """
    if isinstance(returned, Tensor | LeastSquares | int | float) or type(returned) is tuple:
        return returned
    loss, logits = part_of(returned, "loss"), part_of(returned, "logits")
    if isinstance(loss, Tensor) and isinstance(logits, Tensor):
        return loss, logits
    return loss if isinstance(loss, Tensor | int | float) else returned


def returned_loss(result: object) -> tuple[Tensor, ClosureResult]:
    """The loss in what a closure returned, without dimensions and on its tape, and the result."""
    loss = loss_of(result).reshape(())
    return loss, result  # type: ignore[return-value]


def on_tape(returned: object) -> bool:
    """Whether what a closure returned has a loss that can be differentiated."""
    loss = returned[0] if isinstance(returned, tuple) and returned else returned
    return isinstance(loss, LeastSquares) or (isinstance(loss, Tensor) and loss.requires_grad)


def without_tape(returned: object) -> object:
    """What stands for the loss in what a closure returned, without its tape."""
    loss = returned[0] if isinstance(returned, tuple) and returned else returned
    loss = loss.loss if isinstance(loss, LeastSquares) else loss
    return loss.detach() if isinstance(loss, Tensor) else loss


def number_of(loss: object) -> float | None:
    """Its value, where it has one."""
    if isinstance(loss, Tensor):
        return float(loss.item()) if loss.numel() == 1 else None
    return float(loss) if isinstance(loss, float | int) else None


def loss_of(result: object) -> Tensor:
    """The loss in what a closure returned, with one element."""
    if isinstance(result, LeastSquares):
        return result.loss
    loss = result
    if isinstance(result, tuple):
        if len(result) != 2 or not all(isinstance(part, Tensor) for part in result):
            raise ClosureError(
                f"the closure returned a tuple of {', '.join(map(kind_of, result)) or 'nothing'}. Return `loss` or "
                "`(loss, output)`, both tensors."
            )
        loss = result[0]
    if loss is None:
        raise ClosureError("the closure returned None. End it with `return loss`.")
    if isinstance(loss, (float, int)):
        raise ClosureError(
            f"the closure returned the number {loss}, which has no autograd tape. Return the tensor: `return loss`, "
            "not `return loss.item()`; or call backward() in the closure, on the loss."
        )
    if not isinstance(loss, Tensor):
        unlabelled = part_of(loss, "loss") is None and part_of(loss, "logits") is not None
        without = " that has `logits` and no `loss`: give the network its labels" if unlabelled else ""
        raise ClosureError(
            f"the closure returned {kind_of(loss)}{without}. Return the loss tensor, `(loss, output)`, an object with "
            "a tensor `loss` (and `logits`, which it is computed from), or `hessopt.LeastSquares(residuals)`."
        )
    if loss.numel() != 1:
        raise ClosureError(
            f"the closure returned a loss of shape {tuple(loss.shape)}. Reduce it to one number, e.g. with `.mean()`; "
            "residuals go into `hessopt.LeastSquares(residuals)`."
        )
    return loss


def check_loss(loss: Tensor, outputs: Sequence[Any], *, differentiable: bool) -> float:
    """Raise a ClosureError for a loss that is of no use; returns its value."""
    if differentiable and not loss.requires_grad:
        raise ClosureError(
            "the closure's loss has no autograd tape. Return it without `.detach()` and compute it outside of "
            "`torch.no_grad()` and `torch.inference_mode()`, or call backward() in the closure; at least one parameter "
            "must require grad."
        )
    if loss.is_complex():
        raise ClosureError("the closure's loss is complex. Return a real number, e.g. `loss.abs().square()`.")
    value = float(loss.item())
    if math.isfinite(value):
        return value
    empty = [tuple(t.shape) for t in outputs if isinstance(t, Tensor) and not t.numel()]
    cause = (
        f"The batch is empty: the network's output has shape {empty[0]}. Leave such batches out (drop_last=True)."
        if empty
        else "Check the batch and the initialisation; torch.autograd.set_detect_anomaly(True) finds the operation."
    )
    raise ClosureError(f"the closure's loss is {value} at the current parameters, which were left as they are. {cause}")


def kind_of(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"
