"""The rule that names the layers or blocks of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

FEW_NODES = 3
"""Below this a table of pairs shows a body and a head at most."""

_NORMALISATION = re.compile(r"Norm(Act)?(\dd)?$")
_BODY = 0.5  # share of a module's parameters in stacks of blocks, from which it is a body and no block
_SIBLINGS = 3  # modules of one class from which they are the repeated part themselves


def layers(model: nn.Module) -> list[str]:
    """Names of the modules that a person would call the layers or blocks of ``model``, in order of registration.

    See :func:`diagnostics.capture` for the rule. A module that is registered under several names is listed once.
    """
    names = _Rule(model).open(model, "")
    while len(names) < FEW_NODES:
        deeper = [inner for name in names for inner in _split(model, name, alone=len(names) == 1)]
        if deeper == names:
            break
        names = deeper
    return names


def layers_inside(model: nn.Module, name: str) -> list[str]:
    """Names of the layers inside the module ``name`` of ``model``."""
    return _Rule(model).open(model.get_submodule(name), name)


class _Rule:
    """One walk through a model.

    Args:
        model: How often a class occurs in it tells bodies from blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._classes = Counter(type(module) for module in model.modules())
        self._named: set[nn.Module] = set()  # modules inside layers that have a name already

    def open(self, module: nn.Module, prefix: str) -> list[str]:
        """The layers inside a module, containers and bodies opened."""
        names: list[str] = []
        children = _children(module)
        container = _is_container(module)
        for child_name, child in children.items():
            name = f"{prefix}.{child_name}" if prefix else child_name
            if self._is_known(child):
                continue
            if container and isinstance(module, nn.Sequential) and _follows(child):
                if names:  # the layer ends behind its activation, normalisation, pooling or dropout
                    names[-1] = name
                    self._named.update(child.modules())
            else:
                names += self._child(child, name, container and _repeats(child, children.values()))
        return names

    def _child(self, child: nn.Module, name: str, repeated: bool) -> list[str]:
        if _is_container(child):
            inner = self.open(child, name)
            return [name] if len(inner) == 1 and isinstance(child, nn.Sequential) else inner
        if _follows(child):
            return []
        if not repeated and self._classes[type(child)] < _SIBLINGS and _is_body(child):
            return self.open(child, name)
        self._named.update(child.modules())
        return [name]

    def _is_known(self, module: nn.Module) -> bool:
        """Whether the module is a layer already, under another name, or only holds such."""
        owners = _owners(module)
        return bool(owners) and all(owner in self._named for owner in owners)


def _split(model: nn.Module, name: str, alone: bool) -> list[str]:
    """The layers inside the layer ``name``, where it has several, or is a wrapper, and is not one of many."""
    module = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    if _is_container(module) or (_is_container(parent) and _repeats(module, _children(parent).values())):
        return [name]
    inner = layers_inside(model, name)
    return inner if len(inner) > 1 or (alone and inner) else [name]


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Named children that are called: not what computes the module's own parameters, or only holds some."""
    if isinstance(module, nn.MultiheadAttention):
        return {}
    hidden = "parametrizations" if parametrize.is_parametrized(module) else None
    return {name: child for name, child in module.named_children() if name != hidden}


def _owners(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if any(p is not None for p in m._parameters.values())]


def _is_body(module: nn.Module) -> bool:
    """Whether most parameters of the module, embeddings aside, are in stacks of repeated blocks."""
    own: set[nn.Parameter] = set()
    stacked: set[nn.Parameter] = set()
    for part in module.modules():
        if not isinstance(part, nn.Embedding):
            own.update(part.parameters(recurse=False))
        if _is_container(part):
            blocks = [child for child in part.children() if _is_block(child)]
            stacked.update(p for block in blocks if _repeats(block, blocks) for p in block.parameters())
    return bool(stacked) and sum(p.numel() for p in stacked) >= _BODY * sum(p.numel() for p in own)


def _is_block(module: nn.Module) -> bool:
    """Whether a module is made of several layers."""
    return not _is_container(module) and sum(not _is_normalisation(owner) for owner in _owners(module)) > 1


def _repeats(module: nn.Module, siblings: Iterable[nn.Module]) -> bool:
    """Whether there is another one of its class among its siblings."""
    return sum(type(other) is type(module) for other in siblings) > 1


def _is_container(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return type(module).forward is nn.Sequential.forward
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and "forward" not in type(module).__dict__


def _is_normalisation(module: nn.Module) -> bool:
    """By its name; but what holds layers with parameters (``ConvNormAct``, ``PreNorm``) is more than that."""
    named = _NORMALISATION.search(type(module).__name__) is not None
    return named and all(next(child.parameters(), None) is None for child in module.children())


def _follows(module: nn.Module) -> bool:
    """Whether the module belongs to the layer before it: no parameters, a normalisation, or a learned activation."""
    if isinstance(module, nn.PReLU) or _is_normalisation(module):
        return True
    return next(module.parameters(), None) is None
