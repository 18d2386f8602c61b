"""Can a gradient be differentiated again? What cannot is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from diagnostics.autograd.tape import Function
from diagnostics.errors import CaptureError, DiagnosticsError


@contextmanager
def second_order_errors() -> Iterator[None]:
    """Turn PyTorch's errors about missing derivatives into one that says what to do."""
    try:
        yield
    except (DiagnosticsError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        if not any(sign in str(error) for sign in _MISSING_DERIVATIVE):
            raise
        raise DiagnosticsError(
            f"the loss cannot be differentiated twice: {error} Replace that operation by one with a second derivative, "
            "and run compiled parts without torch.compile."
        ) from error


_MISSING_DERIVATIVE = (
    "once_differentiable",
    "differentiate twice",
    "double backward",
    "is not implemented",
    "not differentiable",
    "second derivative",
    "support automatic differentiation",
)


def check_differentiable(loss: Tensor, inputs: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse a loss whose derivatives by some of ``inputs`` are computed off the tape; costs a backward pass.

    That pass has a tape of its own, with a cotangent to look for: a kept one should not pay for it at every product.
    """
    with second_order_errors():
        seed = torch.ones_like(loss).requires_grad_()
        check_on_tape(torch.autograd.grad(loss, inputs, seed, create_graph=True, allow_unused=True), [seed], names)


def check_on_tape(gradients: Sequence[Tensor | None], signals: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse gradients that were computed off the tape from the ``signals``, the cotangents that they came from.

    A gradient is linear in its signals. One that does not depend on them was computed off the tape, and its curvature
    would be zero in silence; unless it is PyTorch's own zero (of ``round``, say).
    """
    refuse_sparse(gradients, names)
    depends = _Dependence(signals)
    for name, gradient in zip(names, gradients, strict=True):
        own = any(gradient is signal for signal in signals)  # the output is the parameter itself
        if gradient is None or own or (gradient.grad_fn is not None and depends(gradient.grad_fn)):
            continue
        if gradient.any():
            raise DiagnosticsError(
                f"the loss cannot be differentiated twice: the gradient of parameter {name!r} is computed off the tape "
                "(a torch.autograd.Function whose backward uses .detach(), .data or NumPy?). Write that backward in "
                "differentiable operations."
            )


def refuse_sparse(gradients: Sequence[Tensor | None], names: Sequence[str]) -> None:
    """Refuse sparse gradients, by the name of the parameter."""
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise CaptureError(
                f"the gradient of parameter {name!r} is sparse (nn.Embedding(sparse=True)?) and has no second "
                "derivative. Set sparse=False."
            )


class _Dependence:
    """Whether functions of a tape lead back to some leaves; every function is looked at once."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = {id(leaf) for leaf in leaves}
        self._known: dict[Function, bool] = {}

    def __call__(self, function: Function) -> bool:
        stack = [function]
        while stack:
            top = stack[-1]
            if top in self._known:
                stack.pop()
                continue
            parents = [parent for parent, _ in top.next_functions if parent is not None]
            unknown = [parent for parent in parents if parent not in self._known]
            if unknown:
                stack += unknown
            else:
                own = id(getattr(top, "variable", None)) in self._leaves
                self._known[top] = own or any(self._known[parent] for parent in parents)
                stack.pop()
        return self._known[function]
