"""The tensors in what a module takes or returns: tuples, dicts and dataclasses, nested at will."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Rebuild: TypeAlias = Callable[[Sequence[Any]], Any]


def flatten(tree: Any) -> tuple[list[Any], Rebuild]:
    """Leaves of ``tree``, and the function that puts others in their places: ``rebuild(leaves)``.

    PyTorch's pytrees know tuples, named tuples, lists, dicts and what was registered with them. Dataclasses and other
    mappings are opened here where a tensor is inside; they are rebuilt as shallow copies, without calling
    ``__init__``, and the original keeps its tensors.
    """
    leaves, spec = tree_flatten(tree)
    parts = [_open(leaf) for leaf in leaves]
    if not any(parts):
        return leaves, lambda new: tree_unflatten(new, spec)

    def rebuild(new: Sequence[Any]) -> Any:
        rest: Iterator[Any] = iter(new)
        closed = [part[1]([next(rest) for _ in part[0]]) if part else next(rest) for part in parts]
        return tree_unflatten(closed, spec)

    return [item for leaf, part in zip(leaves, parts, strict=True) for item in (part[0] if part else [leaf])], rebuild


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree with ``function`` applied to its tensors."""
    leaves, rebuild = flatten(tree)
    return rebuild([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def _open(leaf: Any) -> tuple[list[Any], Rebuild] | None:
    """Leaves and rebuilding function of a container that pytrees do not know; None for everything else."""
    if isinstance(leaf, MutableMapping):
        keys = list(leaf)
        leaves, rebuild = flatten([leaf[key] for key in keys])
        put: Callable[[Any, Any, Any], None] = type(leaf).__setitem__
    elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        keys = [field.name for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)]
        leaves, rebuild = flatten([getattr(leaf, key) for key in keys])
        put = object.__setattr__  # also where the dataclass is frozen
    else:
        return None
    if not any(isinstance(item, Tensor) for item in leaves):
        return None

    def close(new: Sequence[Any]) -> Any:
        other = copy.copy(leaf)
        for key, item in zip(keys, rebuild(new), strict=True):
            put(other, key, item)
        return other

    return leaves, close
