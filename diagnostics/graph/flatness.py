"""Which nodes cannot bend: their tape holds no operation whose second derivative could differ from zero."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, saved_tensors_hooks

from diagnostics.autograd.tape import Function, ancestry
from diagnostics.graph.graph import Node

_FLAT = frozenset(
    f"{name}Backward{i}"
    for name in (
        "Add", "AvgPool2D", "Cat", "Clone", "ConstantPadNd", "Expand", "HardTanh", "Hardtanh", "LeakyRelu",
        "MaxPool2DWithIndices", "Mean", "Neg", "Permute", "Relu", "ReshapeAlias", "Select", "Slice", "Split",
        "Squeeze", "Stack", "Sub", "Sum", "T", "Threshold", "Transpose", "UnsafeView", "Unsqueeze", "View",
    )
    for i in range(3)
)  # fmt: skip
_MULTILINEAR = frozenset(
    f"{name}Backward0" for name in ("Addmm", "Bmm", "Convolution", "Div", "Mkldnn", "Mm", "Mul", "Mv")
)


def cannot_bend(node: Node, parents: Collection[Tensor]) -> bool:
    """Whether the tape of ``node`` is flat in its parents: a composition of (piecewise) linear operations.

    A False may be over-cautious (``x·x − x·x``). A True is certain, away from kinks, as far as the operations' own
    derivatives are right: common ones are known by name, and that saves time only; every other one on the tape, a
    batch-norm or a Python function, is differentiated twice by itself. It is flat if its slope does not depend on its
    operands (batch-norm in evaluation mode), or if the second derivative is exactly zero at the recorded values and
    also at random ones in their place (``abs``; tanh bends, even where it is saturated on all of the batch).

    Args:
        node: The node.
        parents: The values of its parents.
    """
    values = {id(value) for value in parents}
    depends: dict[Function, bool] = {}
    for function in _inputs_first(node.segment.grad_fn):
        leaf = id(getattr(function, "variable", None)) in values
        operands = [f for f, _ in function.next_functions if f is not None and depends[f]]
        depends[function] = leaf or bool(operands)
        if not operands:
            continue
        name = function.name()
        if name in _MULTILINEAR:
            divisor = function.next_functions[-1][0]
            if len(operands) > 1 or (name == "DivBackward0" and divisor is operands[0]):
                return False
        elif name not in _FLAT and not _is_flat(function, set(operands)):
            return False
    return True


def _is_flat(function: Function, operands: Collection[Function]) -> bool:
    """Whether one operation has no second derivative in its ``operands``, at the recorded and at random values."""
    edges = list(dict.fromkeys((f, i) for f, i in function.next_functions if f is not None and f in operands))
    generator = torch.Generator().manual_seed(0)

    def uniform(lowest: float) -> Callable[[Tensor], Tensor]:
        def drawn(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():  # indices and masks stay
                return tensor
            return torch.empty(tensor.shape).uniform_(lowest, 1.5, generator=generator).to(tensor)

        return drawn

    # of both signs, for what is linear on one side, and positive, for what has variances or roots among its values
    for values in (_recorded, uniform(-1.5), uniform(0.5)):
        seconds = _second_derivatives(function, edges, values, generator)
        if seconds is None:
            return False
        if not seconds:
            return True  # whatever the values: the slope does not depend on the operands
        if values is not _recorded:
            seconds = [second.nan_to_num(0.0, 0.0, 0.0) for second in seconds]  # values outside of the domain
        if any(bool(second.any()) for second in seconds):
            return False
    return True


def _recorded(tensor: Tensor) -> Tensor:
    return tensor


def _second_derivatives(
    function: Function,
    edges: list[tuple[Function, int]],
    values: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> list[Tensor] | None:
    """``∂(r·∂(s·f)/∂x)/∂x`` and ``∂(r·∂(s·f)/∂x)/∂f`` for random r and s, for slopes are written in x or in f.

    Empty where the slopes reach neither; None where PyTorch cannot say.

    Args:
        function: The operation f on the tape.
        edges: Where it takes its operands x from.
        values: What stands in place of each tensor that the second derivative is computed from.
        generator: Of r and s.
    """

    def random(like: Any) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(device=like.device, dtype=like.dtype)

    known = [(i, m) for i, m in enumerate(function._input_metadata) if m.dtype.is_floating_point]
    outputs, signals = [GradientEdge(function, i) for i, _ in known], [random(m).requires_grad_() for _, m in known]
    inputs = [GradientEdge(f, i) for f, i in edges]
    try:
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, values):
            slopes = torch.autograd.grad(outputs, inputs, signals, create_graph=True, allow_unused=True)
            found = [slope for slope in slopes if slope is not None]
            if not all(_depends(slope, signals, function) or not slope.any() for slope in found):
                return None  # computed off the tape, or once differentiable
            curved = [slope for slope in found if slope.requires_grad]
            if not curved:
                return []
            along = [random(slope) for slope in curved]
            seconds = torch.autograd.grad(
                curved, [*inputs, *outputs], along, retain_graph=True, allow_unused=True
            )  # retained, for the way from f to x is the node's own tape
    except (RuntimeError, NotImplementedError):  # no second derivative
        return None
    return [second for second in seconds if second is not None]


def _depends(slope: Tensor, signals: Collection[Tensor], function: Function) -> bool:
    leaves = [slope, *ancestry(slope, {function})[0]]
    return any(leaf is signal for leaf in leaves for signal in signals)


def _inputs_first(end: Function | None) -> Iterator[Function]:
    """The functions of a tape, each after those that it was computed from; without recursion, as tapes may be long."""
    seen: set[Function] = set()
    stack: list[tuple[Function, bool]] = [] if end is None else [(end, False)]
    while stack:
        function, ready = stack.pop()
        if ready:
            yield function
        elif function not in seen:
            seen.add(function)
            stack.append((function, True))
            stack.extend((f, False) for f, _ in function.next_functions if f is not None and f not in seen)
