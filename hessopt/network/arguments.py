"""What the arguments of :class:`hessopt.BandedNewton` must be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import Tensor, nn

Params: TypeAlias = "nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]"


def network_of(params: Params, model: nn.Module | None) -> nn.Module:
    """The network among the arguments."""
    if model is None and isinstance(params, nn.Module):
        return params
    if model is None:
        raise TypeError(
            "BandedNewton needs the network itself: pass it in place of the parameters, `BandedNewton(model)`, "
            "or besides them, `BandedNewton(model.parameters(), model=model)`."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(params, nn.Module) and params is not model:
        raise ValueError("params and model are two different networks; pass one of them.")
    return model


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of the choices."""
    if value not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {'one of ' if len(choices) > 1 else ''}{known}, got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def check_group(group: dict[str, Any], first: dict[str, Any]) -> None:
    """Raise a ValueError unless a param group's options are in range and fit the first group's."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(group['lr'].shape)}.")
    for name in ("lr", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {group[name]}.")
    if not 0 <= float(group.get("momentum", 0.0)) < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {group['momentum']}.")
    if bool(group["maximize"]) != bool(first["maximize"]):
        raise ValueError("maximize must be the same in all param groups: curvature has one sign for all.")
    for p in group["params"]:
        if p.is_complex():
            raise ValueError("BandedNewton has no complex parameters; use torch.view_as_real.")
