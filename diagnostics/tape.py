"""Reading the autograd tape: what a tensor was computed from, and its vector-Jacobian products."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

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
    for function in _walk(tensor, stops):
        if function in stops:
            met.append(function)
        elif hasattr(function, "variable"):  # AccumulateGrad: the end of the tape at a leaf
            leaves.append(function.variable)
    return leaves, met


def differentiable_once(tensor: Tensor) -> bool:
    """Whether the tape of a gradient holds an operation that was marked as differentiable once only."""
    return any(function.name() == "DelayedError" for function in _walk(tensor, ()))


def _walk(tensor: Tensor, stops: Collection[Function]) -> Iterator[Function]:
    if tensor.grad_fn is None:
        return
    seen: set[Function] = {tensor.grad_fn}
    stack: list[Function] = [tensor.grad_fn]
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is None or parent in seen:
                continue
            seen.add(parent)
            yield parent
            if parent not in stops:
                stack.append(parent)


def batched_vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Vector-Jacobian products with many cotangents at once; the tape is kept.

    The products are computed by ``torch.vmap`` and verified: a combination of them must equal the product with that
    combination of the cotangents. Where PyTorch's batching rule of some operation is wrong (as that of ``cdist`` is),
    they are computed again by the slower ``is_grads_batched``.

    Args:
        outputs: Tensors with a tape.
        inputs: Tensors on that tape.
        cotangents: For each output a tensor ``(m, *output.shape)``; taken in chunks so that intermediate results stay
            near 256 MiB.

    Returns:
        For each input the products ``(m, *input.shape)``, summed over the outputs, or None where no output depends on
        it.

    Raises:
        DiagnosticsError: the products are not finite.
        RuntimeError: an operation has no derivative.
    """
    count = len(cotangents[0])
    weights = torch.cos(torch.arange(1, count + 1, dtype=outputs[0].dtype)).to(outputs[0].device)
    combined = [torch.tensordot(weights, cotangent, dims=1) for cotangent in cotangents]
    expected = torch.autograd.grad(outputs, inputs, combined, retain_graph=True, allow_unused=True)
    used = [t for t, e in zip(inputs, expected, strict=True) if e is not None]
    if not used:
        return [None] * len(inputs)
    row = sum(t.numel() * t.element_size() for t in (*outputs, *used))
    chunk = max(1, _CHUNK_BYTES // row)
    for batched in (_by_vmap, _by_batched_grads):
        pieces = [
            batched(outputs, used, [c[start : start + chunk] for c in cotangents]) for start in range(0, count, chunk)
        ]
        columns = zip(*pieces, strict=True)
        found = iter([parts[0] if len(parts) == 1 else torch.cat(parts) for parts in columns])
        products = [None if e is None else next(found) for e in expected]
        if all(_agree(weights, p, e) for p, e in zip(products, expected, strict=True)):
            return products
    raise DiagnosticsError("a derivative is not finite (a norm or a root at zero?).")


def _by_vmap(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    def products(*cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, cotangent, retain_graph=True)

    with warnings.catch_warnings():
        # Operations without a batching rule are looped over by PyTorch itself: slower, not wrong, and not the user's.
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        result: tuple[Tensor, ...] = torch.vmap(products)(*cotangents)
        return result


def _by_batched_grads(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, is_grads_batched=True)


def _agree(weights: Tensor, products: Tensor | None, expected: Tensor | None) -> bool:
    if products is None or expected is None:
        return products is expected
    error = (torch.tensordot(weights, products, dims=1) - expected).norm()
    return bool(error <= _VERIFIED * torch.finfo(expected.dtype).eps * weights.norm() * products.norm())


_CHUNK_BYTES = 256 * 2**20
_VERIFIED = 1e3  # roundings by which sums in two orders may differ; a wrong rule is off by far more
