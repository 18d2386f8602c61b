"""The closure protocol: how one optimizer step obtains loss, output and gradient, and tries other parameters.

``closure()`` evaluates the loss on the batch of this step. It may call ``zero_grad()`` and ``backward()`` itself, as
closures of :mod:`torch.optim` do, or leave them out. It returns

- the loss, a tensor with one element; or
- ``(loss, output)``, where the loss is a function of ``output`` alone; or
- an object with a tensor ``loss``, as attribute or key, and ``logits`` that it is a function of, as networks of Hugging
  Face return: the same as ``(loss, logits)``, or as ``loss`` where it has no ``logits``; or
- a :class:`LeastSquares`.

A closure that calls ``backward()`` may return anything that :mod:`torch.optim` takes, a detached loss, a number, a
dict: **the loss is what ``backward()`` was called on**, the sum of it where there are several calls, as in gradient
accumulation. So the loss and ``.grad`` belong together, whatever is returned, also where the closure returns another
tensor than the one that it differentiates. Gradients may be changed after that (clipping). What of the tape is needed
is retained, with accumulation the tapes of all calls: only by optimizers that need derivatives of the loss beyond the
gradient.

``backward(gradient=…)`` of a tensor with several elements hides the loss; then what is returned is the loss, and must
be on the tape. ``backward(inputs=…)`` that leaves out parameters is refused where curvature is needed. With
:class:`torch.amp.GradScaler`, the loss is that with the scale, until ``unscale_`` is called. A scaler allows that once
a step, so closures that are run again, for trials, cannot have one: bfloat16 needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from hessopt.closure.result import ClosureResult, LeastSquares, kind_of, output_tensor
from hessopt.errors import ClosureError

__all__ = ["Closure", "ClosureResult", "Evaluation", "LeastSquares"]

Closure: TypeAlias = Callable[[], ClosureResult]


@dataclass(frozen=True)
class Evaluation:
    """What one run of the closure gave.

    Attributes:
        loss: The loss, without dimensions, on the autograd tape, which is still there; detached, if the closure called
            ``backward`` and no tape was asked for. That of this process's batch.
        result: What the closure returned, with :attr:`loss` in place of what is no loss.
        backward_called: The closure called ``backward``; the gradient is then in the parameters' ``.grad``.
        outputs: What the module returned, once for each of its calls.
        mean: Mean of the loss over processes, where several train one network.
    """

    loss: Tensor
    result: ClosureResult
    backward_called: bool
    outputs: list[Any] = field(default_factory=list)
    mean: Tensor | None = None

    @property
    def mean_loss(self) -> Tensor:
        """The loss without a tape, the mean over processes where several train one network."""
        return self.loss.detach() if self.mean is None else self.mean

    @property
    def is_least_squares(self) -> bool:
        """The closure returned a :class:`LeastSquares`; :attr:`output` is then its residuals."""
        return isinstance(self.result, LeastSquares)

    @property
    def output(self) -> Tensor:
        """The tensor that the loss is a function of: residuals, or the closure's output, or the module's.

        Raises:
            ClosureError: the closure gave none and the module was not called exactly once, or returned no tensor.
        """
        return self.outputs_of_loss(1)[0]

    def outputs_of_loss(self, most: int) -> list[Tensor]:
        """The tensors that the loss is a function of: :attr:`output`, or that of each of several calls of the module.

        Args:
            most: How many calls there may be, of micro-batches.

        Raises:
            ClosureError: the closure gave none and the module was not called, or more often than that, or returned no
                tensor.
        """
        if isinstance(self.result, LeastSquares):
            return [self.result.residuals]
        if isinstance(self.result, tuple):
            return [self.result[1]]
        way_out = (
            "Let the closure return `(loss, output)`, with the tensor that the loss is computed from, or "
            "`hessopt.LeastSquares(residuals)`."
        )
        if not 1 <= len(self.outputs) <= most:
            allowed = f", with accumulate={most}" if most > 1 else ""
            raise ClosureError(
                f"the closure called the module {len(self.outputs)} times{allowed}, so its output is not known. "
                f"{way_out}"
            )
        tensors = [output_tensor(output) for output in self.outputs]
        for output, tensor in zip(self.outputs, tensors, strict=True):
            if tensor is None:
                raise ClosureError(
                    f"the module returned {kind_of(output)}, neither a tensor nor an object with a tensor `logits`, so "
                    f"what the loss is computed from is not known. {way_out}"
                )
        return [tensor for tensor in tensors if tensor is not None]
