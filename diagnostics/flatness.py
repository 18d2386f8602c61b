"""Which nodes cannot bend: their tape holds no operation whose second derivative could differ from zero."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor

from diagnostics.graph import Node
from diagnostics.tape import Function

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
    """Whether the tape of ``node`` is flat in its parents: (piecewise) linear operations only, as far as is known.

    A False may be over-cautious; a True is certain, away from kinks. Products count as flat where only one factor
    depends on a parent.

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
        elif name not in _FLAT:
            return False
    return True


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
