"""Hooks that see what Kronecker factors are made of: inputs of layers, and where to stop back-propagation."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.autograd.graph import GradientEdge, get_gradient_edge

from diagnostics.autograd.tape import Function, walk
from hessopt.averages.blocks import Block
from hessopt.errors import ModelError
from hessopt.network.weak_hooks import WeakHooks

_recorders = itertools.count()


@dataclass(eq=False)
class Note:
    """What is left at a call's place on the tape, and lives as long as that: no reference back into the tape.

    Attributes:
        order: Of the calls that a recorder saw.
        block: Position of its block.
        module: The layer, weakly.
        input: Its input, detached.
        before: Blocks that the input comes from, if that was asked for.
        output: Which of the place's outputs the call's is.
    """

    order: int
    block: int
    module: weakref.ref[nn.Module]
    input: Tensor
    before: frozenset[int]
    output: int


@dataclass(eq=False)
class Call:
    """One call of a layer, on a tape that somebody holds.

    Attributes:
        note: What was noted.
        module: The layer.
        edge: The output's place on the tape, which in-place operations downstream do not move.
        cotangent: The gradient that an ordinary backward brought here, if it was asked for.
    """

    note: Note
    module: nn.Module
    edge: GradientEdge
    cotangent: Tensor | None = None

    @property
    def block(self) -> int:
        """Position of its block."""
        return self.note.block

    @property
    def input(self) -> Tensor:
        """Its input, detached."""
        return self.note.input


class Recorder:
    """Persistent forward hooks on the layers of the blocks. Unless :attr:`active`, they do nothing.

    A call is noted on the tape itself, so what no backward follows is freed with its tape.

    Args:
        blocks: The blocks, numbered in this order.
        catch: Called with each call that an ordinary backward reaches, in that order, with its cotangent; or None. It
            must be a method, whose object is not kept alive.

    Attributes:
        unsharded: Of a network that FSDP2 shards the ids of what the tape has in place of its parameters.
        linking: Find the blocks that a call's input comes from.
        links: Of the blocks that were called since :meth:`start`, on whatever tape, if ``linking``.
        called: Whether a layer was called with gradients enabled since :meth:`start`.
        called_without_gradients: Whether one was called with gradients disabled.
    """

    def __init__(self, blocks: Sequence[Block], catch: Callable[[Call], None] | None) -> None:
        self.active = False
        self.unsharded: set[int] | None = None
        self.called = self.called_without_gradients = False
        self.linking = True
        self.links: dict[int, frozenset[int]] = {}
        self._catch = None if catch is None else weakref.WeakMethod(catch)
        self._order = itertools.count()
        self._key = f"hessopt.Recorder {next(_recorders)}"
        self._hooks = WeakHooks(self, "record")
        for number, block in enumerate(blocks):
            for module in block.modules:
                self._hooks.attach(module, number, prepend=True)

    def start(self) -> None:
        """Record the calls from here on."""
        self.active, self.called, self.called_without_gradients, self.links = True, False, False, {}

    def next_order(self) -> int:
        """A number that is larger than those of all calls before."""
        return next(self._order)

    def remove(self) -> None:
        """Take the hooks away."""
        self._hooks.remove()

    def record(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note a call of a layer of block ``number``: the forward hook."""
        if not self.active or not isinstance(output, Tensor):
            return
        if not output.requires_grad:
            self.called_without_gradients |= not torch.is_grad_enabled()
            return
        self.called = True
        if self.unsharded is not None:
            self.unsharded.update(id(p) for p in module._parameters.values() if p is not None)
        x = args[0] if args else kwargs["input"]
        edge = get_gradient_edge(output)
        before: frozenset[int] = frozenset()
        if self.linking:
            before = self.blocks_before(x.grad_fn)
            self.links[number] = self.links.get(number, before) | before
        note = Note(self.next_order(), number, weakref.ref(module), x.detach(), before, edge.output_nr)
        _metadata(edge.node).setdefault(self._key, []).append(note)
        if self._catch is not None:
            edge.node.register_prehook(_catching(note, self._catch))

    def blocks_before(self, start: Function | None) -> frozenset[int]:
        """Blocks whose outputs the walk back from ``start`` (itself included) meets first."""
        met = walk(start, lambda function: bool(self._notes(function)))
        return frozenset(note.block for function in met for note in self._notes(function))

    def _notes(self, function: Function) -> Sequence[Note]:
        found: Sequence[Note] = _metadata(function).get(self._key, ())
        return found

    def on_tape(self, start: Function) -> tuple[list[Call], list[Function]]:
        """What a backward that arrives at ``start`` can reach.

        Returns:
            The calls that were noted, in their order, and the functions that accumulate gradients of leaves.
        """
        calls: list[Call] = []
        leaves: list[Function] = []
        for function in walk(start):
            if not function.next_functions:
                leaves.append(function)
                continue
            for note in self._notes(function):
                module = note.module()
                if module is not None:
                    calls.append(Call(note, module, GradientEdge(function, note.output)))
        return sorted(calls, key=lambda call: call.note.order), leaves


def _metadata(function: Function) -> dict[Any, Any]:
    """What belongs to a function of the tape and lives as long as it does."""
    found: Any = function.metadata  # a property, whatever its declaration says
    assert isinstance(found, dict)
    return found


def _catching(
    note: Note, method: weakref.WeakMethod[Callable[[Call], None]]
) -> Callable[[Sequence[Tensor | None]], None]:
    def catch(gradients: Sequence[Tensor | None]) -> None:
        take, module, j = method(), note.module(), gradients[note.output]
        if take is not None and module is not None and j is not None:
            edge = GradientEdge(current_function(), note.output)
            take(Call(note, module, edge, j))

    return catch


def on_arrival(tensor: Tensor, method: weakref.WeakMethod[Callable[..., None]], *args: Any) -> None:
    """Call ``method(*args, edge, gradient)`` whenever a backward arrives at a tensor, before it goes on from there.

    The tensor's tape stays as it is, and is not kept alive unless ``args`` do so: they must not hold the tensor itself,
    nor what was computed from it. The hook runs in the thread that executes the backward; on the tape behind it
    nothing has been freed yet, so it may back-propagate other vectors there, with ``retain_graph=True`` (as
    checkpointing does: autograd is re-entrant, on the devices' threads as on the caller's).

    Args:
        tensor: Not a leaf.
        method: Of an object that is not kept alive.
        args: Its first arguments.
    """
    edge = get_gradient_edge(tensor)
    place, number = edge.node, edge.output_nr
    del edge  # with what would keep a function written in Python alive

    def arrive(gradients: Sequence[Tensor | None]) -> None:
        take, gradient = method(), gradients[number]
        if take is not None and gradient is not None:
            take(*args, GradientEdge(current_function(), number), gradient)

    place.register_prehook(arrive)


def current_function() -> Function:
    """The function of the tape that the running backward is at."""
    function = torch._C._current_autograd_node()
    assert function is not None
    return function


def back_propagate(
    output: Tensor | GradientEdge, columns: Tensor, calls: Sequence[Call], others: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Columns back-propagated to the outputs of calls and to parameters; the tape is retained.

    Args:
        output: The network's output, or its place on the tape.
        columns: ``(K, *output.shape)``, of the output's dtype.
        calls: Where to.
        others: Parameters.

    Returns:
        For each call ``(K, *its output's shape)``, for each parameter ``(K, *shape)``; None where the output does not
        depend on it.

    Raises:
        ModelError: a parameter's gradient is sparse.
    """
    targets: list[Any] = [*(call.edge for call in calls), *others]
    if not targets:
        return [], []

    def pull(column: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output, targets, column, retain_graph=True, allow_unused=True)

    if len(columns) == 1:
        found = pull(columns[0])
        check_strided(found)
        products: list[Tensor | None] = [None if t is None else t.unsqueeze(0) for t in found]
    else:
        # What `is_grads_batched=True` does, which autograd has for tensors and not for places.
        products = list(_vmap(pull, 0, 0, allow_none_pass_through=True)(columns))
    return products[: len(calls)], products[len(calls) :]


def check_strided(gradients: Sequence[Tensor | None]) -> None:
    """Raise a ModelError if a gradient is sparse."""
    for g in gradients:
        if g is not None and g.layout != torch.strided:
            raise ModelError(
                f"a parameter of shape {tuple(g.shape)} has a sparse gradient, which Kronecker factors do not take; "
                "build its layer with sparse=False."
            )
