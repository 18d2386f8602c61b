"""Which parameters SpectralNewton treats as matrices, and which it leaves to AdamW."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from torch import Tensor, nn

Selection: TypeAlias = Iterable[str] | Callable[[str, nn.Parameter], bool] | None
Exponent: TypeAlias = 'float | Literal["online"]'
Exponents: TypeAlias = "Exponent | Mapping[str, Exponent]"


def is_matrix(p: Tensor) -> bool:
    """Whether p, flattened to (first dimension, all others), has at least two rows and two columns."""
    return p.ndim >= 2 and min(len(p), p.numel() // max(len(p), 1)) >= 2


def left_to_adamw(model: nn.Module, selection: Selection = None) -> dict[str, bool]:
    """For every parameter of a network, tied ones once, whether AdamW trains it.

    AdamW trains whatever is no matrix (biases, norms, class tokens, positions), and of the matrices

    - those that ``selection`` names (patterns of names of parameters, or of the modules whose ``weight`` they are), or
      for which ``selection(name, parameter)`` holds, and no others; or, where it is None,
    - those of embeddings, also where they are tied to an output layer, and the weight of the head: the last linear or
      convolution layer in the order of registration, unless no other matrix is left.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    parameters = dict(model.named_parameters())
    if callable(selection):
        return {name: not is_matrix(p) or bool(selection(name, p)) for name, p in parameters.items()}
    if selection is not None:
        wanted: set[str] = set()
        for pattern in [selection] if isinstance(selection, str) else selection:
            found = {
                name
                for name in parameters
                if fnmatchcase(name, pattern) or fnmatchcase(re.sub(r"\.weight$", "", name), pattern)
            }
            if not found:
                listed = ", ".join(map(repr, list(parameters)[:12]))
                raise ValueError(f"adamw: no parameter is called or matches {pattern!r}; there are {listed} ….")
            wanted |= found
        return {name: not is_matrix(p) or name in wanted for name, p in parameters.items()}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    left = {name: not is_matrix(p) or id(p) in embedded for name, p in parameters.items()}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    head = next((name for name, p in parameters.items() if layers and p is layers[-1].weight), None)
    if head is not None and any(not own for name, own in left.items() if name != head):
        left[head] = True
    return left


def exponent_of(alpha: Exponents, p: Tensor) -> Exponent:
    """α of one weight: the same for all, or that of its type, ``"conv"`` (three or more dimensions) or ``"linear"``."""
    return alpha["conv" if p.ndim > 2 else "linear"] if isinstance(alpha, Mapping) else alpha


def check_exponents(alpha: object) -> None:
    """Raise ValueError unless α is a number of at least 0, ``"online"``, or a dict of such by layer type."""
    if isinstance(alpha, Mapping):
        if set(alpha) != {"conv", "linear"}:
            raise ValueError(f'alpha by layer type has the keys "conv" and "linear", got {sorted(alpha)}.')
        for value in alpha.values():
            check_exponents(value)
    elif alpha != "online" and not (isinstance(alpha, int | float) and 0 <= alpha < float("inf")):
        raise ValueError(f'alpha must be a number of at least 0, "online", or a dict of these, got {alpha!r}.')
