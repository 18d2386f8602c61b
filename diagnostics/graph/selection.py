"""Which modules' outputs become nodes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from diagnostics.errors import CaptureError

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Selection: TypeAlias = Iterable[str] | Predicate | None

OUTPUT = "output"
"""Name of the node that holds the model's output, where no chosen module's output is the same tensor."""


def select_modules(model: nn.Module, nodes: Iterable[str] | Predicate) -> dict[str, nn.Module]:
    """The modules that were asked for, by qualified name."""
    if callable(nodes):
        return {name: module for name, module in model.named_modules() if name and nodes(name, module)}
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
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
    return _once({name: module for name, module in modules.items() if name in chosen})


def _once(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Each module under the first of its names: a module may be registered under several."""
    first: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first.setdefault(module, name)
    return {name: module for module, name in first.items()}
