"""When curvature is gathered: in the backward pass that follows a call of the network or of the declared loss."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from diagnostics.autograd.tape import Function, ancestry
from diagnostics.autograd.trees import tensors
from hessopt.averages.blocks import Block
from hessopt.averages.causes import Seen
from hessopt.averages.passes import Choice, current_backward
from hessopt.averages.recorder import Call, Recorder, back_propagate, on_arrival
from hessopt.averages.seeds import EMPTY, Seeds
from hessopt.averages.sharded import ShardedModules
from hessopt.closure.result import output_tensor, part_of
from hessopt.errors import ClosureError, HessoptError, ModelError
from hessopt.network.layer_graph import layer_distances
from hessopt.network.weak_hooks import WeakHooks


@dataclass(eq=False)
class Columns:
    """What is to be back-propagated, and to where.

    Attributes:
        calls: Of layers, in their order.
        before: Blocks that the output comes from, until distances are known.
        output: Tensor or place to start from.
        samples: B.
        values: ``(K, B, …)``.
        task: Number of the backward pass.
        slope: Derivative of what is back-propagated there in the loss whose columns these are; None: not known.
    """

    calls: list[Call]
    before: frozenset[int]
    output: Tensor | GradientEdge
    samples: int
    values: Tensor
    task: int
    slope: Tensor | None = None


@dataclass(eq=False)
class Backward:
    """What an ordinary backward brought (``curvature="empirical"``).

    Attributes:
        calls: Of layers, with their cotangents.
        samples: B; None where no output of the network was met.
        slope: Derivative of what was back-propagated in the loss; None where the loss was not met.
        before: Blocks that the output comes from, until distances are known.
    """

    calls: list[Call] = field(default_factory=list)
    samples: int | None = None
    slope: Tensor | None = None
    before: frozenset[int] = frozenset()
    orders: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Evaluation:
    """An output of the network, or a call of the loss, that a backward may arrive at.

    It lies on the tape there, so it holds nothing that was computed from it.

    Attributes:
        order: Among all calls.
        given: The detached output; or arguments of the loss.
        watched: The tensor among these that must still be what it was, and its version.
    """

    order: int
    given: tuple[Any, ...]
    watched: tuple[Tensor, int]


class PassObserver:
    """Watches the network and the declared loss, and hands over columns when a backward arrives there.

    In the forward pass nothing is computed: calls are noted on the tape. The first thing that a backward does at the
    output (or at the loss's value) is to hand the columns to ``take``, which may use the tape behind it.

    Args:
        model: The network.
        blocks: Its blocks.
        parameters: The trained parameters.
        seeds: Of the columns.
        empirical: No columns: keep the cotangents of the ordinary backward.
        most: How many backward passes count.
        take: Takes :class:`Columns`; a method, whose object is not kept alive.

    Attributes:
        recorder: Notes the calls.
        choice: Which passes count.
        seen: What happened since :meth:`start`, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        parameters: Sequence[Tensor],
        seeds: Seeds,
        empirical: bool,
        most: int,
        take: Callable[[Columns], None],
    ) -> None:
        self.seeds, self.empirical = seeds, empirical
        self.recorder = Recorder(blocks, self._catch if empirical else None)
        self.choice = Choice(parameters, most)
        self._parameters, self._blocks = parameters, blocks
        self._sharded = ShardedModules(model)
        if self._sharded.modules:
            self.recorder.unsharded = self.choice.own
        self._take = weakref.WeakMethod(take)
        self._device = parameters[0].device.type
        self._hooks = WeakHooks(self, "_see_output")
        self._hooks.attach(model)
        self._loss_hooks = WeakHooks(self, "_see_loss")
        if isinstance(seeds.loss, nn.Module):
            self._loss_hooks.attach(seeds.loss)
        self._random: dict[int, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Gather from the next pass on that a backward follows."""
        self.recorder.start()
        self.seen = Seen()
        self._clear()

    def stop(self) -> None:
        """Gather nothing more."""
        self.recorder.active = False
        self._clear()

    def forget(self) -> None:
        """Undo what was gathered since the start, draws of random numbers included, and start anew."""
        self.seeds.generator.set_state(self.random_state)
        if self.recorder.active:
            self.start()

    def _clear(self) -> None:
        self.choice.reset()
        self._errors: dict[int, HessoptError] = {}
        self._backwards: dict[int, Backward] = {}
        self._random = {}

    @property
    def error(self) -> HessoptError | None:
        """What kept a chosen pass from being gathered."""
        return next(iter(self._errors.values()), None)

    @property
    def random_state(self) -> Tensor:
        """Of the generator, without the draws that belong to no step yet."""
        return next(iter(self._random.values())) if self._random else self.seeds.generator.get_state()

    @property
    def backwards(self) -> list[Backward]:
        """The ordinary backward passes that were chosen; of a network without blocks, the last one."""
        tasks = self.choice.chosen if self._blocks else [*self._backwards][-1:]
        return [self._backwards[task] for task in tasks if task in self._backwards]

    @property
    def slope_is_missing(self) -> bool:
        """Whether a backward was chosen whose loss was not met, so that a factor on it is not known."""
        return any(backward.slope is None for backward in self.backwards)

    def remove(self) -> None:
        """Take all hooks away."""
        self.recorder.remove()
        self._hooks.remove()
        self._loss_hooks.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gather nothing inside of this context."""
        active, self.recorder.active = self.recorder.active, False
        try:
            yield
        finally:
            self.recorder.active = active

    def take_loss(self, loss: Tensor, output: Tensor) -> None:
        """Hand over columns now, for a loss on its tape, as of a further pass."""
        if self._passes_over(output, output, inside=False):
            return
        if isinstance(self.seeds.loss, nn.Module):
            raise ClosureError(self.seen.uncalled(self.seeds.loss))
        task = self.choice.take_outside()
        self._draw(task)
        columns = self.seeds.of_loss(loss, output) if self.seeds.name is None else self.seeds.of_output(output)
        function = output.grad_fn
        calls = [] if function is None else self.recorder.on_tape(function)[0]
        with self._sharded.apart(inside=False):
            self._hand_over(task, calls, function, output, output, columns)

    def _see_output(self, _: None, __: nn.Module, ___: Any, ____: Any, output: Any) -> None:
        """After the network's forward pass."""
        if not self.recorder.active:
            return
        if not torch.is_grad_enabled():
            self.seen.without_gradients = True
            return
        self.seen.network = True
        if self.empirical:
            self._watch_output(output)
        elif self.seeds.name is not None:
            tensor = output_tensor(output)
            if tensor is None or (tensor is not output and not self.seeds.knows_classes(tensor)):
                self.seen.returned = type(output).__name__
                self.seen.unclear = None if tensor is None else tuple(tensor.shape)
            elif tensor.grad_fn is not None:
                # The output itself would keep its tape alive. Its place on the tape stays, whatever is done to it.
                value = tensor.detach()
                noted = _Evaluation(self.recorder.next_order(), (value,), (value, value._version))
                on_arrival(tensor, weakref.WeakMethod(self._arrive), noted)
                self.seen.noted = True

    def _see_loss(self, _: None, __: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        """After the declared loss module, which may serve other networks as well."""
        if not self.recorder.active or not torch.is_grad_enabled():
            return
        self.seen.loss = True
        one = isinstance(value, Tensor) and value.numel() == 1 and value.grad_fn is not None
        if self.empirical:
            if one:
                on_arrival(value, weakref.WeakMethod(self._meet), self.recorder.next_order(), "slope", None)
            return
        given, output = self.seeds.arguments(args, kwargs)
        if output is None:
            return
        if not one or output.grad_fn is value.grad_fn:
            self.seen.misfit = True
            return
        noted = _Evaluation(self.recorder.next_order(), given, (output, output._version))
        on_arrival(value, weakref.WeakMethod(self._arrive), noted)
        self.seen.noted = True

    def _arrive(self, noted: _Evaluation, place: GradientEdge, gradient: Tensor) -> None:
        """In a backward pass, at an output or a loss."""
        if not self.recorder.active or self.choice.excludes(noted.order):
            return
        calls, leaves = self.recorder.on_tape(place.node)
        if self._blocks and not calls:
            self.seen.bare = True  # another network's, or one whose hooks did not run
            return
        if not self.choice.takes(noted.order, leaves):
            return
        watched = noted.watched[0]
        if self._passes_over(watched, watched if isinstance(self.seeds.loss, nn.Module) else place):
            return
        task = current_backward()
        self._errors = {t: e for t, e in self._errors.items() if t in self.choice.chosen and t != task}
        self._draw(task)
        try:
            with self.paused(), self._sharded.apart(), _no_autocast(self._device):
                output, version = noted.watched
                if output._version != version:
                    raise ModelError(
                        "what the declared loss's curvature is taken at, the network's output, was changed in place "
                        "before backward(). Use an operation that is not in place (`z = z - c`)."
                    )
                if self.seeds.name is not None:
                    columns = self.seeds.of_output(output)
                    self._hand_over(task, calls, place.node, place, output, columns)
                else:
                    with torch.enable_grad():
                        z, columns = self.seeds.of_call(noted.given, output, place)
                    self._hand_over(task, calls, z.grad_fn, z, z, columns, gradient.detach().reshape(()))
        except HessoptError as error:
            self._errors[task] = error  # for step(), where the user expects errors of an optimizer

    def _passes_over(self, output: Tensor, place: Tensor | GradientEdge, *, inside: bool = True) -> bool:
        """Whether an output has no samples, of a process where others have some."""
        if output.numel() or self.seeds.ranks.size == 1:
            return False
        self.seen.empty = True
        function = place.node if isinstance(place, GradientEdge) else place.grad_fn
        if self._sharded.modules and function is not None:  # others wait for its parameters
            with self.paused(), self._sharded.apart(inside=inside):
                back_propagate(place, output.new_zeros(1, *output.shape), self.recorder.on_tape(function)[0], [])
        return True

    def _draw(self, task: int) -> None:
        """Random numbers go on from where they stood before what a chosen pass takes the place of."""
        chosen, generator = self.choice.chosen, self.seeds.generator
        start = self._random.get(task)
        if start is None and len(chosen) == 1:
            start = next(iter(self._random.values()), None)
        if start is None:
            if not self._random:
                self.seeds.begin()
            start = generator.get_state()
        else:
            generator.set_state(start)
        self._random = {t: state for t, state in self._random.items() if t in chosen} | {task: start}

    def _hand_over(
        self,
        task: int,
        calls: list[Call],
        place: Function | None,
        output: Tensor | GradientEdge,
        like: Tensor,
        columns: Tensor,
        slope: Tensor | None = None,
    ) -> None:
        if not like.numel():
            raise ClosureError(EMPTY)
        take = self._take()
        assert take is not None
        samples = like.shape[0] if like.ndim else 1
        take(Columns(calls, self._before(place), output, samples, columns.to(like.dtype), task, slope))

    def _before(self, place: Function | None) -> frozenset[int]:
        return self.recorder.blocks_before(place) if self.recorder.linking else frozenset()

    def distances(self, calls: Sequence[Call], before: Iterable[int]) -> NDArray[np.float64]:
        """Of the blocks, by the calls of a pass, and of blocks that are in none by whatever calls they had.

        A block is next to those whose outputs reach an input of it on the tape without passing through a third block.
        A block with several calls is one vertex.

        Args:
            calls: Of the pass.
            before: Blocks that the network's output comes from, likewise.
        """
        count = len(self._blocks)
        links = {(call.block, v) for call in calls for v in call.note.before}
        rest = self.recorder.links.keys() - {call.block for call in calls}
        links.update((w, v) for w in rest for v in self.recorder.links[w])
        return layer_distances(count, [*links, *((v, count) for v in before)])

    def _watch_output(self, output: Any) -> None:
        """Empirical: the batch's size and the loss, if the network returns it, when a backward arrives there."""
        leaves = [t for t in tensors(output) if t.grad_fn is not None]
        rows = next((t for t in leaves if t.ndim), None)
        loss = _returned_loss(output, rows)
        order = self.recorder.next_order()
        for leaf in leaves:
            kind = "slope" if leaf is loss else "samples"
            on_arrival(leaf, weakref.WeakMethod(self._meet), order, kind, None if rows is None else len(rows))

    def _meet(self, order: int, kind: str, samples: int | None, place: GradientEdge, gradient: Tensor) -> None:
        """Empirical, in a backward pass, at an output or a loss."""
        if not self.recorder.active:
            return
        found = self._current()
        if order < found.orders.get(kind, order + 1):
            found.orders[kind] = order
            if kind == "slope":
                found.slope = gradient.detach().reshape(())
        if samples is not None and order < found.orders.get("B", order + 1):
            found.orders["B"], found.samples = order, samples
        found.before |= self._before(place.node)

    def _catch(self, call: Call) -> None:
        """Empirical, in a backward pass, at the output of a layer."""
        if not self.recorder.active:
            return
        found, task = self._current(), current_backward()
        if task not in self.choice.chosen:
            if task in self.choice.further:
                return
            block = self._blocks[call.block]
            own: Sequence[Tensor] = [p for p in block.parameters if p.requires_grad]
            if self._sharded.modules:
                own = [p for p in call.module._parameters.values() if p is not None and p.requires_grad]
            if not self.choice.takes(call.note.order, [torch.autograd.graph.get_gradient_edge(p).node for p in own]):
                return
        found.calls.append(call)

    def _current(self) -> Backward:
        task = current_backward()
        if task not in self._backwards:
            kept = self.choice.chosen
            self._backwards = {t: b for t, b in self._backwards.items() if t in kept}
            self._backwards[task] = Backward()
        return self._backwards[task]


def _returned_loss(output: Any, rows: Tensor | None) -> Tensor | None:
    """The loss among what a network returns beside its output, as those of Hugging Face do when they are given labels.

    It is called so, or comes first, and is computed from the output.
    """
    loss = output[0] if type(output) in (tuple, list) and output else part_of(output, "loss")
    if rows is None or not isinstance(loss, Tensor) or loss.ndim or loss.grad_fn is None:
        return None
    function = rows.grad_fn
    assert function is not None  # the caller's leaves have one
    return loss if loss.grad_fn is function or ancestry(loss, {function})[1] else None


def _no_autocast(device: str) -> Any:
    """Products of factors are formed in the factors' precision."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
