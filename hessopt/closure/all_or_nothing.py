"""Steps that are taken or not, whatever comes between: Ctrl-C, a lack of memory, an error in a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from diagnostics.ranks.spread import local

State = Any  # torch.optim.Optimizer's: a dict of dicts


class AllOrNothing:
    """Context of a step: if it does not end, what the step changes is as it was, bit for bit.

    That is tensors, of which copies are kept, an optimizer's state, attributes, and what contexts inside may have left
    behind when the interrupt came at their very end: grad mode, modes for functions, ``torch.autograd.backward`` and
    the prohibition of saved-tensor hooks. A step that ends keeps nothing. An interrupt at the end of this context finds
    the step taken.

    **Cost**: a copy of the tensors that are kept, in memory and in time, which is next to nothing beside products with
    curvature. Where tensors are written by one call only, the last one, nothing need be kept.

    Args:
        tensors: What is changed in place.
        state: An optimizer's state; its tensors are assumed to be replaced, not changed. See :meth:`keep` for others.
        owner: Object with attributes that are replaced.
        names: Of these attributes.

    Attributes:
        undo: Functions to be called as well; twice does no harm.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor] = (),
        *,
        state: State | None = None,
        owner: object = None,
        names: Sequence[str] = (),
    ) -> None:
        self.undo: list[Callable[[], object]] = []
        self._kept: list[tuple[list[Tensor], list[Tensor]]] = []
        self._state = state
        self._entries = None if state is None else {key: _shallow(own) for key, own in state.items()}
        self._owner = owner
        self._attributes = {name: getattr(owner, name) for name in names}
        self._grad_enabled = torch.is_grad_enabled()
        self._modes = torch._C._len_torch_function_stack()
        self._backward = torch.autograd.backward
        self._no_hooks = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        self.keep(tensors)

    @torch.no_grad()
    def keep(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Copy more tensors, before they are changed in place; returns the copies."""
        originals = [local(t) for t in tensors]  # many operations do not know distributed tensors
        copies = [torch.empty_like(t) for t in originals]
        if originals:
            torch._foreach_copy_(copies, originals)
        self._kept.append((originals, copies))
        return copies

    def keep_state(self) -> None:
        """Copy the tensors in the state too, which are going to be changed in place."""
        self.keep(t for own in (self._entries or {}).values() for t in own.values() if isinstance(t, Tensor))

    def __enter__(self) -> AllOrNothing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            return
        try:
            self._undo()
        except KeyboardInterrupt:  # once more, as nothing here depends on what was done already
            self._undo()
            raise

    def _undo(self) -> None:
        while torch._C._len_torch_function_stack() > self._modes:
            torch._C._pop_torch_function_stack()
        torch.autograd.backward = self._backward
        if self._no_hooks is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        torch.set_grad_enabled(self._grad_enabled)
        with torch.no_grad():
            for originals, copies in self._kept:
                if originals:
                    torch._foreach_copy_(originals, copies)
        if self._state is not None and self._entries is not None:
            self._state.clear()
            self._state.update({key: _shallow(own) for key, own in self._entries.items()})
        for name, value in self._attributes.items():
            setattr(self._owner, name, value)
        for undo in self.undo:
            undo()


def _shallow(own: Any) -> Any:
    if isinstance(own, dict):
        return {name: list(value) if isinstance(value, list) else value for name, value in own.items()}
    return own
