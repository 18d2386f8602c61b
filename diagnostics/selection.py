"""Which modules' outputs become nodes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from diagnostics.errors import CaptureError

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Selection: TypeAlias = Iterable[str] | Predicate | None

OUTPUT = "output"
"""Name of the node that holds the model's output, where no chosen module's output is the same tensor."""

_NORMALISATION = re.compile(r"Norm(\dd)?$")


def select_modules(model: nn.Module, nodes: Selection) -> dict[str, nn.Module]:
    """The modules whose outputs are to be cut, by qualified name (see :func:`diagnostics.capture` for the rule)."""
    modules = {name: module for name, module in model.named_modules() if name}
    if nodes is None:
        return {name: modules[name] for name in layers(model)}
    if callable(nodes):
        return {name: module for name, module in modules.items() if nodes(name, module)}
    patterns = [nodes] if isinstance(nodes, str) else list(nodes)
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"nodes must be None, module names or patterns (strings), or a predicate (name, module) -> bool; "
                f"got an entry of type {type(pattern).__name__}."
            )
        matches = [name for name in modules if fnmatchcase(name, pattern)]
        if not matches and pattern != OUTPUT:
            close = difflib.get_close_matches(pattern, modules, n=3)
            hint = f"Did you mean {', '.join(map(repr, close))}?" if close else "The model has no submodules."
            if modules and not close:
                hint = f"Its modules are {', '.join(map(repr, list(modules)[:12]))}{' …' if len(modules) > 12 else ''}."
            raise CaptureError(f"no module of {type(model).__name__} is called or matches {pattern!r}. {hint}")
        chosen.update(matches)
    return {name: module for name, module in modules.items() if name in chosen}


def layers(model: nn.Module) -> list[str]:
    """Names of the modules that a person would call the layers or blocks of ``model``, in order of registration."""
    if _is_container(model):
        names = _expand(model, "")
    else:
        names = [name for child_name, child in model.named_children() for name in _expand_child(child, child_name)]
    if len(names) == 1:
        (name,) = names
        inner = model.get_submodule(name)
        if any(True for _ in inner.children()) and not _is_container(inner):  # a wrapper around the real model
            return [f"{name}.{deeper}" for deeper in layers(inner)] or names
    return names


def _expand(container: nn.Module, prefix: str) -> list[str]:
    names: list[str] = []
    for child_name, child in container.named_children():
        name = f"{prefix}.{child_name}" if prefix else child_name
        if isinstance(container, nn.Sequential) and _follows(child):
            if names:  # the layer ends behind its activation, normalisation, pooling or dropout
                names[-1] = name
        else:
            names += _expand_child(child, name)
    return names


def _expand_child(child: nn.Module, name: str) -> list[str]:
    if _is_container(child):
        inner = _expand(child, name)
        return [name] if len(inner) == 1 and isinstance(child, nn.Sequential) else inner
    return [] if _follows(child) else [name]


def _is_container(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return type(module).forward is nn.Sequential.forward
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and "forward" not in type(module).__dict__


def _follows(module: nn.Module) -> bool:
    """Whether the module belongs to the layer before it: no parameters, a normalisation, or a learned activation."""
    if isinstance(module, nn.PReLU) or _NORMALISATION.search(type(module).__name__):
        return True
    return next(module.parameters(), None) is None
