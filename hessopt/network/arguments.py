"""What the parameters and param groups of optimizers must be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import Tensor, nn

from hessopt.errors import ModelError

Params: TypeAlias = "nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]"


def network_of(params: Params, model: nn.Module | None) -> nn.Module | None:
    """The network among the arguments; None if there is none.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there are two.
    """
    if model is None:
        return params if isinstance(params, nn.Module) else None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(params, nn.Module) and params is not model:
        raise ValueError("params and model are two different networks; pass one of them.")
    return model


def refuse_meta(parameters: Iterable[Tensor]) -> None:
    """Raise a ModelError for parameters on the meta device."""
    for p in parameters:
        if p.is_meta:
            raise ModelError(
                f"a parameter of shape {tuple(p.shape)} is on the meta device and has no values to train. Give the "
                'network memory, `model.to_empty(device="cpu")`, and initialise or load it, before the optimizer is '
                "made."
            )


def check_group(owner: str, group: dict[str, Any], first: dict[str, Any] | None, others: Iterable[str] = ()) -> None:
    """Raise a ValueError unless a param group's options are in range.

    Args:
        owner: The optimizer's name.
        group: The group, with ``lr``, ``weight_decay``, ``maximize`` and perhaps ``momentum``.
        first: The first group, whose ``maximize`` is that of all; None if each may have its own.
        others: More options that are finite and at least 0.
    """
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(group['lr'].shape)}.")
    for name in ("lr", "weight_decay", *others):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {group[name]}.")
    if not 0 <= float(group.get("momentum", 0.0)) < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {group['momentum']}.")
    if first is not None and bool(group["maximize"]) != bool(first["maximize"]):
        raise ValueError("maximize must be the same in all param groups: curvature has one sign for all.")
    for p in group["params"]:
        if p.is_complex():
            raise ValueError(f"{owner} has no complex parameters; use torch.view_as_real.")
