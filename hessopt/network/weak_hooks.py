"""Forward hooks that neither keep their owner alive nor stand in the way of copying or pickling a network."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class WeakHook:
    """A forward hook that calls a method of an object that it does not keep alive.

    Its copies, and what is unpickled of it, do nothing: a copied network is nobody's until an optimizer takes it.
    """

    def __init__(self, owner: Any = None, method: str = "", number: int | None = None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._method = method
        self._number = number

    @property
    def dead(self) -> bool:
        """Whether there is no owner (any more)."""
        return self._owner is None or self._owner() is None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hand the call on."""
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            getattr(owner, self._method)(self._number, module, args, kwargs, output)

    def __copy__(self) -> WeakHook:
        return WeakHook()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakHook:
        return WeakHook()

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakHook, ()


class WeakHooks:
    """The hooks of one owner, taken away when the owner is garbage.

    Args:
        owner: Whose method is called, with ``(number, module, args, kwargs, output)``.
        method: Its name.
    """

    def __init__(self, owner: Any, method: str) -> None:
        self._owner = weakref.ref(owner)
        self._method = method
        self._handles: list[RemovableHandle] = []
        weakref.finalize(owner, _remove, self._handles).atexit = False

    def attach(self, module: nn.Module, number: int | None = None, *, prepend: bool = False) -> None:
        """Hook a module. Dead hooks that it got by being copied are cleared away."""
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, WeakHook) and hook.dead:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
        hook = WeakHook(self._owner(), self._method, number)
        self._handles.append(module.register_forward_hook(hook, prepend=prepend, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks away."""
        _remove(self._handles)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
