"""Jacobians of each sample's share of a function call with respect to the parameters that were passed to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from diagnostics.autograd.kernels import VMAP_WITHOUT_WARNING
from hessopt.network.parameter_uses import CallUse


def call_rows(use: CallUse, parameters: Sequence[Tensor], cotangents: Tensor) -> list[Tensor] | None:
    """Vector-Jacobian products of a call, one row of its result at a time, with respect to some of its parameters.

    The function is run again on each row alone, vectorised: tensors whose first dimension is that of the result go in
    row by row, all else as it is. This assumes that the function treats rows alike and separately; a caller must check
    the sum of the rows against back-propagation.

    Args:
        use: The call.
        parameters: Some of ``use.parameters``.
        cotangents: ``(K', *use.result.shape)``.

    Returns:
        For each parameter ``(K', R, *shape)`` with R the length of the result, or None if the function cannot be
        vectorised (random numbers, operations that depend on values).
    """
    leaves, tree = tree_flatten((use.args, use.kwargs))
    wanted = [next(i for i, leaf in enumerate(leaves) if leaf is p) for p in parameters]
    rows = len(use.result)
    mapped = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows and all(leaf is not p for p in use.parameters)
    ]
    values = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def products(cotangent: Tensor, *row: Tensor) -> tuple[Tensor, ...]:
        def call(*tensors: Tensor) -> Tensor:
            filled = list(values)
            for i, part in zip(mapped, row, strict=True):
                filled[i] = part.unsqueeze(0)
            for i, tensor in zip(wanted, tensors, strict=True):
                filled[i] = tensor
            args, kwargs = tree_unflatten(filled, tree)
            result: Tensor = use.function(*args, **kwargs)
            return result

        pull = torch.func.vjp(call, *(values[i] for i in wanted))[1]
        pulled: tuple[Tensor, ...] = pull(cotangent.unsqueeze(0))
        return pulled

    by_row = torch.vmap(products, in_dims=(0, *[0] * len(mapped)))
    by_column = torch.vmap(by_row, in_dims=(0, *[None] * len(mapped)))
    try:
        with VMAP_WITHOUT_WARNING:
            found: tuple[Tensor, ...] = by_column(cotangents, *(values[i] for i in mapped))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
        return None
    return list(found)
