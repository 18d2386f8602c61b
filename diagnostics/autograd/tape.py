"""Reading the autograd tape: what a tensor was computed from, and its vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from diagnostics.autograd.kernels import VMAP_WITHOUT_WARNING
from diagnostics.errors import DiagnosticsError

Function: TypeAlias = torch.autograd.graph.Node
"""A node of the autograd tape (a ``grad_fn``)."""


def ancestry(tensor: Tensor, stops: Collection[Function] = ()) -> tuple[list[Tensor], list[Function]]:
    """Leaves and stop functions that ``tensor`` was computed from.

    Walks the autograd tape back from ``tensor.grad_fn``; a function in ``stops`` is reported and not walked
    past. The walk starts *behind* ``tensor`` itself, so its own ``grad_fn`` may be a stop.

    Args:
        tensor: The tensor to start from. A tensor without a tape has an empty ancestry.
        stops: Tape functions at which to turn back.

    Returns:
        ``(leaves, met)``: the distinct leaf tensors that require grad, and the distinct functions of ``stops``
        that were met, both in the order of discovery.
    """
    leaves: list[Tensor] = []
    met: list[Function] = []
    start = tensor.grad_fn
    for function in walk(start, lambda f: f is not start and f in stops):
        if function is start:
            continue
        if function in stops:
            met.append(function)
        elif hasattr(function, "variable"):  # AccumulateGrad: the end of the tape at a leaf
            leaves.append(function.variable)
    return leaves, met


def passes_through(tensor: Tensor, operation: str) -> bool:
    """Whether the tape behind ``tensor`` holds an operation of that name (``"MulBackward0"``)."""
    return any(function.name() == operation for function in walk(tensor.grad_fn))


def walk(start: Function | None, turns_back: Callable[[Function], bool] | None = None) -> Iterator[Function]:
    """The functions of a tape, back from ``start``, which comes first; each once, in the order of discovery.

    Args:
        start: None: there are none.
        turns_back: Whether not to walk past a function; it is yielded all the same. Default: for none.
    """
    if start is None:
        return
    yield start
    stack = [] if turns_back is not None and turns_back(start) else [start]
    seen = {start}
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is None or parent in seen:
                continue
            seen.add(parent)
            yield parent
            if turns_back is None or not turns_back(parent):
                stack.append(parent)


def slopes_of(where: str, output: Tensor, inputs: Sequence[Tensor], signal: Tensor) -> list[Tensor | None]:
    """∂(signal · output)/∂input for each input, with a tape of their own; None where ``output`` does not depend on it.

    Args:
        where: What to call the place in errors.
        output: A tensor with a tape.
        inputs: Tensors on that tape.
        signal: A tensor like ``output``.

    Raises:
        DiagnosticsError: an operation in between has no second derivative.
    """
    # A product with the signal that does not depend on the signal was computed off the tape: its curvature would be
    # silently zero.
    signal = signal.detach().requires_grad_()
    with named_errors(where):
        slopes = torch.autograd.grad(output, inputs, signal, create_graph=True, allow_unused=True)
        return [None if slope is None else _on_the_tape_of(signal, slope, output) for slope in slopes]


def _on_the_tape_of(signal: Tensor, slope: Tensor, output: Tensor) -> Tensor | None:
    """The slope of ``output`` if it can be differentiated again; None if it is PyTorch's own zero (of ``round``, say).

    A zero from a backward written in Python is not taken for that: it may be computed off the tape.
    """
    if slope is signal or any(leaf is signal for leaf in ancestry(slope)[0]):
        if not passes_through(slope, "DelayedError"):
            return slope
    elif not slope.any() and not any(
        isinstance(f, torch.autograd.function.BackwardCFunction) for f in walk(output.grad_fn)
    ):
        return None
    raise DiagnosticsError("the backward of an operation is not itself differentiable.")


def rounding(ends: Iterable[Tensor]) -> float:
    """Machine precision of the coarsest floating-point dtype that the tapes of ``ends`` pass through.

    A network in double precision may compute some operations in single, as the normalisations of transformers do: its
    derivatives are then as exact as these. What an operation does inside, off the tape, is not seen.
    """
    dtypes: set[torch.dtype] = set()
    for end in ends:
        dtypes.add(end.dtype)
        dtypes.update(
            part.dtype for function in walk(end.grad_fn) for part in function._input_metadata if part is not None
        )
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def checked_symmetric(where: str, curvature: Tensor, ends: Sequence[Tensor]) -> Tensor:
    """Second derivatives ``(…, d, d)``; those that are not symmetric are refused: some operation's backward is wrong.

    Args:
        where: What to call the place in errors.
        curvature: The second derivatives.
        ends: The first derivatives, with the tape that they were differentiated on: how exact that is.

    Returns:
        The same, or their symmetric part where the tape is less exact than their dtype.

    Raises:
        DiagnosticsError: the asymmetry is more than rounding (the square root of the machine precision).
    """
    asymmetry, size = (curvature - curvature.mT).norm(), curvature.norm()
    if asymmetry <= torch.finfo(curvature.dtype).eps ** 0.5 * size:
        return curvature
    if not asymmetry <= rounding(ends) ** 0.5 * size:
        raise DiagnosticsError(
            f"{where}: the second derivative that PyTorch gives is not symmetric (by {asymmetry / size:.1e} of its "
            "norm), so the backward of an operation in it is wrong. Replace this operation by one made of simpler ones."
        )
    return (curvature + curvature.mT) / 2


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Turn PyTorch's errors about missing derivatives into one that names the place and the way out."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise DiagnosticsError(
            f"{where} cannot be differentiated twice: {error} Choose nodes so that this operation is not between them, "
            "or replace it by one with a second derivative."
        ) from error


class Verified:
    """Tapes whose batched products were found to be right, so that the next ones need no check.

    Holds their ends and inputs: a tape is known by these very tensors.
    """

    def __init__(self) -> None:
        self._used: dict[tuple[int, ...], tuple[list[Tensor], list[bool]]] = {}

    def used(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[bool] | None:
        """Which inputs the outputs depend on; None for a tape that was not found right."""
        known = self._used.get(self._key(outputs, inputs))
        return None if known is None else known[1]

    def add(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], used: list[bool]) -> None:
        """Note a tape as right."""
        self._used[self._key(outputs, inputs)] = [*outputs, *inputs], used

    @staticmethod
    def _key(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[int, ...]:
        return len(outputs), *map(id, outputs), *map(id, inputs)


def batched_vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    verified: Verified | None = None,
) -> list[Tensor | None]:
    """Vector-Jacobian products with many cotangents at once; the tape is kept.

    The products are computed by ``torch.vmap`` and verified: a combination of them must equal the product with that
    combination of the cotangents. Where PyTorch's batching rule of some operation is wrong (as that of ``cdist`` is) or
    missing (a backward pass written in Python may work in place), or rounding is too large to tell, they are computed
    again one by one.

    Args:
        outputs: Tensors with a tape.
        inputs: Tensors on that tape.
        cotangents: For each output a tensor ``(m, *output.shape)``; taken in chunks so that intermediate results stay
            near 256 MiB.
        verified: Tapes found right by earlier calls; products over them are not verified again, and this one is noted.

    Returns:
        For each input the products ``(m, *input.shape)``, summed over the outputs, or None where no output depends on
        it.

    Raises:
        DiagnosticsError: the products are not finite.
        RuntimeError: an operation has no derivative.
    """
    count = len(cotangents[0])
    if count == 0:
        return [t.new_zeros(0, *t.shape) for t in inputs]
    known = None if verified is None else verified.used(outputs, inputs)
    if known is not None:
        found = _in_chunks(outputs, [t for t, own in zip(inputs, known, strict=True) if own], cotangents)
        # a sum is finite unless an entry is not, or it overflows itself; only then are entries looked at
        if found and not torch.stack([t.sum() for t in found]).isfinite().all():
            _check_finite(found)
        return _in_place_of(known, found)
    weights = torch.cos(torch.arange(1, count + 1, dtype=outputs[0].dtype, device=outputs[0].device))
    combined = [torch.tensordot(weights.to(c.dtype), c, dims=1) for c in cotangents]
    expected = torch.autograd.grad(outputs, inputs, combined, retain_graph=True, allow_unused=True)
    known = [e is not None for e in expected]
    used = [t for t, own in zip(inputs, known, strict=True) if own]
    if not used:
        return [None] * len(inputs)
    expected_of_used = [e for e in expected if e is not None]
    _check_finite(expected_of_used)
    try:
        found = _in_chunks(outputs, used, cotangents)
    except RuntimeError:  # only vmap cannot do it: the product above has shown that there is a derivative
        found = []
    if not found or not _agree(outputs, weights, found, expected_of_used):
        found = _one_by_one(outputs, used, cotangents)
    elif verified is not None:
        verified.add(outputs, inputs, known)
    return _in_place_of(known, found)


def _in_chunks(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    row = sum(t.numel() * t.element_size() for t in (*outputs, *inputs))
    chunk = max(1, CHUNK_BYTES // row)
    starts = range(0, len(cotangents[0]), chunk)
    pieces = [_by_vmap(outputs, inputs, [c[start : start + chunk] for c in cotangents]) for start in starts]
    return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*pieces, strict=True)]


def _check_finite(values: Sequence[Tensor]) -> None:
    if not torch.stack([torch.isfinite(t).all() for t in values]).all():
        raise DiagnosticsError("a derivative is not finite (a norm or a root at zero?).")


def _in_place_of(used: Sequence[bool], found: Sequence[Tensor]) -> list[Tensor | None]:
    rows = iter(found)
    return [next(rows) if own else None for own in used]


def _by_vmap(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    def products(*cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, cotangent, retain_graph=True)

    with VMAP_WITHOUT_WARNING:
        result: tuple[Tensor, ...] = torch.vmap(products)(*cotangents)
        return result


def _one_by_one(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    rows = [
        torch.autograd.grad(outputs, inputs, cotangent, retain_graph=True)
        for cotangent in zip(*cotangents, strict=True)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _agree(outputs: Sequence[Tensor], weights: Tensor, products: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether combinations of the products are the expected ones, to the rounding of the tape of ``outputs``."""
    pairs = zip(products, expected, strict=True)
    errors = [(torch.tensordot(weights.to(p.dtype), p, dims=1) - e).norm() for p, e in pairs]
    sizes = [_VERIFIED * weights.norm() * p.norm() for p in products]

    def all_within(coarsest: float) -> bool:
        precisions = [max(torch.finfo(e.dtype).eps, coarsest) for e in expected]
        within = [error <= eps * size for error, eps, size in zip(errors, precisions, sizes, strict=True)]
        return bool(torch.stack(within).all())

    return all_within(0.0) or all_within(rounding(outputs))


CHUNK_BYTES = 256 * 2**20
"""Bytes that the products of :func:`batched_vjp` may take at one time."""
_VERIFIED = 1e3  # roundings by which sums in two orders may differ; a wrong rule is off by far more
