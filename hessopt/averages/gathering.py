"""What gathers: inputs of a network's layers and columns of its output curvature, of one batch at a time, by hooks."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diagnostics.ranks.collectives import Ranks
from diagnostics.ranks.spread import is_distributed
from hessopt.averages.blocks import Rows, plan_blocks
from hessopt.averages.causes import SEE_LOSS, cause
from hessopt.averages.observer import Columns, PassObserver
from hessopt.averages.options import COLUMNS, KroneckerAveraging, NamedLoss
from hessopt.averages.recorder import Call, back_propagate
from hessopt.averages.saved import check_entries
from hessopt.averages.seeds import EMPTY, Seeds
from hessopt.errors import ClosureError, HessoptError, ModelError

Curvature = Literal["fisher", "ggn", "empirical"]

T = TypeVar("T")

NOT_CALLED = "its layer was not called at the first step"


@dataclass(frozen=True, eq=False)
class Structure:
    """Which blocks there are, as a batch shows it.

    Attributes:
        called: Numbers of the blocks that were called, ascending.
        distances: Of all blocks, ``(n, n)``: :func:`hessopt.network.layer_graph.layer_distances`.
    """

    called: list[int]
    distances: NDArray[np.float64]

    @classmethod
    def unconnected(cls, count: int) -> Structure:
        """So many blocks, all of them called and none connected with another."""
        return cls(list(range(count)), np.where(np.eye(count, dtype=bool), 0.0, np.inf))

    def equals(self, other: Structure | None) -> bool:
        """Whether it is that of another batch."""
        return other is not None and self.called == other.called and np.array_equal(self.distances, other.distances)

    @property
    def inside(self) -> NDArray[np.float64]:
        """Distances of the blocks that were called."""
        found: NDArray[np.float64] = self.distances[np.ix_(self.called, self.called)]
        return found


@dataclass(frozen=True, eq=False)
class Batch:
    """What a backward pass brought.

    Attributes:
        structure: Of the network; None once :meth:`Gathering.settle` was called.
        calls: Of layers, in their order.
        cotangents: ĵ at each call's output, ``(K, *its shape)``; None where the network's output does not depend on it.
        squares: Of every parameter without a block that the output depends on: ``(Σ_b ĵ_b)²``, summed over columns.
        samples: B.
        scale: Trace of the loss's output curvature, without dimensions; None with ``"empirical"``.
        weight: Factor that the loss was back-propagated with; 1 where that is not known.
    """

    structure: Structure | None
    calls: list[Call]
    cotangents: Sequence[Tensor | None]
    squares: dict[Tensor, Tensor]
    samples: int
    scale: Tensor | None
    weight: Tensor | float = 1.0


class Gathering(Generic[T]):
    """Gathers the curvature of a network's layers from its backward passes, and hands it on.

    **Use.** Name a taker (:meth:`hand_to`), call the network, back-propagate the loss; :meth:`release` then gives what
    the taker made of the batch, or of the micro-batches of an accumulation, which it is handed one after the other with
    what it made of those before. It is made in the backward pass, by a hook at the network's output (or at the declared
    loss module's value) that back-propagates the columns before the ordinary backward goes on, so on a tape that is
    whole; this is a re-entrant call of autograd, from the thread that executes the backward. Hooks of the user's own on
    the tape see the columns as well. With a loss that is not declared, call :meth:`gather` on the loss's tape. Which
    passes count where there are more than ``options.accumulate`` is at :class:`hessopt.averages.passes.Choice`: not one
    that no backward follows.

    **Layers.** Linear on any leading dimensions (also transformers' ``Conv1D``), convolutions (all options, one pair
    of factors a group), embeddings (frequency of tokens ⊗ features), affine maps of normalisations and lone biases
    (exact blocks of the per-sample gradients). A layer that is called several times, or whose parameters several layers
    share: calls count as positions. Of every other parameter the squared column of the batch is gathered.

    Args:
        model: The network.
        parameters: Parameters to precondition; all on one device.
        curvature: ``"fisher"``: Monte-Carlo columns; ``"ggn"``: root of the output Hessian times random signs, or
            exact; ``"empirical"``: the gradients of the samples, for which no extra backward pass is needed.
        loss: What is declared of it: by name, the module that computes it, or None.
        options: Of the columns and the layers.
        tied: See :func:`hessopt.averages.blocks.plan_blocks`.
        inputs_only: With ``"empirical"``: no more than the layers' inputs is wanted, so factors on losses do not
            matter.
        group: Process group of those who train the network; None: the default one, if there is one.

    Attributes:
        blocks: Of the layers, whether called or not.
        others: Parameters without a block that was called, with the reason.
        structure: Of the last batch until :meth:`settle`; then what was settled. None before.
        dtype: Of what is gathered: the parameters', at least float32.

    Raises:
        ModelError: no parameter to train, or parameters on several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor],
        curvature: Curvature,
        loss: NamedLoss | nn.Module | None,
        options: KroneckerAveraging,
        *,
        tied: bool = False,
        inputs_only: bool = False,
        group: Any = None,
    ) -> None:
        self.model, self.loss, self.options, self._inputs_only = model, loss, options, inputs_only
        self.empirical = curvature == "empirical"
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ModelError("none of the parameters requires grad, so there is nothing to train.")
        self.device = self.parameters[0].device
        if any(p.device != self.device for p in self.parameters):
            raise ModelError("the trained parameters are on several devices; move the network to one.")
        self.dtype = reduce(torch.promote_types, (p.dtype for p in self.parameters), torch.float32)
        columns = options.columns or COLUMNS
        self.seeds = Seeds(loss, columns, curvature == "fisher", self.device, options.seed, group)
        self.blocks, self._planned = plan_blocks(model, self.parameters, options.max_size, tied=tied)
        if self._planned and any(is_distributed(p) for p in self._planned):
            p, why = next(iter(self._planned.items()))
            raise ModelError(
                f"parameter {self.names.get(p, '?')!r} has no Kronecker factors ({why}), and the diagonal that it has "
                "instead is not known of networks that FSDP2 shards. Leave it out, freeze it, or train under "
                "DistributedDataParallel."
            )
        self.others = dict(self._planned)
        self.structure: Structure | None = None
        self.observer = PassObserver(
            model, self.blocks, self.parameters, self.seeds, self.empirical, options.accumulate, self._receive
        )
        self._taker: weakref.WeakMethod[Callable[[Batch, T | None], T]] | None = None
        self._made: dict[int, T] = {}

    def hand_to(self, taker: Callable[[Batch, T | None], T]) -> None:
        """Whom to hand a batch to, within the backward pass: a method, whose object is not kept alive.

        Its second argument is what it returned for the micro-batches of the same accumulation before; None for the
        first.
        """
        self._taker = weakref.WeakMethod(taker)

    @property
    def ranks(self) -> Ranks:
        """The processes that train the network."""
        return self.seeds.ranks

    @property
    def unsettled(self) -> bool:
        """Whether the structure may yet change."""
        return self.observer.recorder.linking

    @property
    def names(self) -> dict[Tensor, str]:
        """Of the network's parameters."""
        return {p: name for name, p in self.model.named_parameters()}

    @property
    def active(self) -> bool:
        """Whether to gather in the next backward pass."""
        return self.observer.recorder.active

    @property
    def waits(self) -> bool:
        """Whether :meth:`gather` has to be called, as no backward pass did."""
        return self.active and not self._made and not self.empirical

    @property
    def adds(self) -> bool:
        """Whether curvatures of micro-batches add up; else their mean counts, by the factors of their losses.

        They do if the loss is a sum, or is not declared, so that they are curvatures of the whole of it.
        """
        return getattr(self.loss, "reduction", "mean") == "sum" or (self.loss is None and not self.empirical)

    @property
    def slope_is_missing(self) -> bool:
        """Whether a backward was chosen whose loss was not met, so that a factor on it is not known, and matters."""
        return self.observer.slope_is_missing and not self._inputs_only

    def cause(self) -> HessoptError:
        """Why nothing was gathered since :meth:`start`."""
        declared = self.loss if isinstance(self.loss, nn.Module) else self.seeds.name
        return cause(self.observer.seen, self.observer.recorder, declared, self.empirical)

    def detach(self) -> None:
        """Remove all hooks from the network."""
        self.observer.remove()

    def begin(self) -> None:
        """Forget what was gathered in passes that were not followed by a step."""
        self._made = {}
        self.observer.forget()

    def start(self) -> None:
        """Gather in the next backward pass."""
        self._made = {}
        self.observer.start()

    def stop(self) -> None:
        """Gather nothing until :meth:`start`."""
        self._made = {}
        self.observer.stop()

    def paused(self) -> AbstractContextManager[None]:
        """Gather nothing inside of this context."""
        return self.observer.paused()

    def gather(self, loss: Tensor, *outputs: Tensor) -> None:
        """Gather from a loss on its tape, if that is waited for. The tape is retained.

        Not needed where the loss is declared or the curvature is the empirical one, and the network itself was called;
        nor ever where it was declared as a module.

        Args:
            loss: A sum or mean over samples.
            outputs: ``(B, …)``, what the loss is a function of; of an accumulation that of each micro-batch.
        """
        if self.waits:
            self._raise()
            self.observer.choice.reset()
            with self.paused():
                for output in outputs:
                    self.observer.take_loss(loss, output)

    def release(self, gradients: Sequence[Tensor | None] = ()) -> T | None:
        """What the taker made of the batch, or micro-batches, whose gradients these are, once; None if of nothing.

        Args:
            gradients: Of ``parameters``, in that order.

        Raises:
            ClosureError: ``"empirical"``, and the factor on the loss is not known.
            ModelError: the output or the loss cannot be treated, or a gradient is sparse.
            NotConvexError: the loss is not convex in the output.
        """
        self._raise()
        if self.active and self.empirical:
            self._collect(gradients)
        made, self._made = self._made, {}
        return next(reversed(made.values()), None)

    def settle(self, structure: Structure | None = None) -> None:
        """Keep to one structure from here on: the one given, or else that of the last batch."""
        if structure is not None:
            self.follow(structure)
        self.observer.recorder.linking = False

    def unsettle(self) -> None:
        """Find the structure anew at the next batch."""
        self.structure, self.others = None, dict(self._planned)
        self.observer.recorder.linking = True

    def others_of(self, called: Collection[int]) -> dict[Tensor, str]:
        """Parameters without a block among those called, with the reason; in the order of ``parameters``."""
        found = dict(self._planned)
        for number, block in enumerate(self.blocks):
            if number not in called:
                found.update(dict.fromkeys(block.parameters, NOT_CALLED))
        return {p: found[p] for p in self.parameters if p in found}

    def rows(self, batch: Batch, gram: bool, first: int = 0) -> list[Rows | None]:
        """Of each block of the structure; None for one that was not called, or that the output does not depend on.

        Args:
            batch: The batch.
            gram: Whether Gram matrices are enough, of the inputs where they are less work, and of part of the samples
                if the options say so.
            first: Which sample may come first then, whatever the number.
        """
        assert self.structure is not None
        called = self.structure.called
        found: dict[int, list[Rows]] = {}
        times = Counter(call.block for call in batch.calls)
        for call, j in zip(batch.calls, batch.cotangents, strict=True):
            if call.block in called and j is not None:
                block, count = self.blocks[call.block], times[call.block]
                x = call.input
                if gram and self.options.rows is not None:
                    x, j = block.thinned(call.module, x, j, self.options.rows / count, first)
                row = block.rows(call.module, x, j, self.options.sharing, self.dtype, gram and count == 1)
                found.setdefault(call.block, []).append(row)
        return [_merge(found[i]) if i in found else None for i in called]

    def _raise(self) -> None:
        """The error that gathering met, if there was one."""
        error = self.observer.error
        if error is not None:
            self.begin()
            raise error

    def _receive(self, found: Columns) -> None:
        """Columns to the layers: in a backward pass, or in :meth:`gather`."""
        chosen = self.observer.choice.chosen
        self._made = {task: made for task, made in self._made.items() if task in chosen and task != found.task}
        calls, columns = found.calls, found.values
        apart = all(call.input.shape[:1] == columns.shape[1:2] for call in calls)
        scale = columns.square().sum()
        structure = self._structure(calls, found.before)
        others = list(self.others)
        if others or not apart:
            # So that columns of different rows are independent and centred, where these meet: in the squared sum, and
            # in layers whose rows are not the output's (its rows may be positions of a sequence).
            signs = torch.randint(0, 2, columns.shape[:2], generator=self.seeds.generator, device=self.device)
            columns = columns * signs.mul_(2).sub_(1).view(*signs.shape, *[1] * (columns.ndim - 2))
        cotangents, slopes = back_propagate(found.output, columns, calls, others)
        with torch.no_grad():
            squares = {
                p: slope.to(self.dtype).square().sum(0)
                for p, slope in zip(others, slopes, strict=True)
                if slope is not None
            }
            weight = 1.0 if found.slope is None else found.slope.to(self.dtype)
            self._hand_on(found.task, Batch(structure, calls, cotangents, squares, found.samples, scale, weight))

    @torch.no_grad()
    def _collect(self, gradients: Sequence[Tensor | None]) -> None:
        """From the cotangents that ordinary backward passes left; a mean loss has 1/B in them, times its slope."""
        backwards = self.observer.backwards
        passes = len(backwards) + len(self.observer.choice.further)
        if self.slope_is_missing and passes > 1:
            raise ClosureError(
                'the gradients of several backward passes were accumulated, and curvature="empirical" does not know '
                f"the factor that each loss had. Call backward() once before each step, or {SEE_LOSS}."
            )
        for task, found in enumerate(backwards):
            calls = sorted(found.calls, key=lambda call: call.note.order)
            inputs = [c.input for c in calls if c.input.ndim]
            if not all(len(x) for x in inputs):
                if self.ranks.size > 1:
                    self.observer.seen.empty = True
                    continue
                raise ClosureError(EMPTY)
            samples = found.samples or (len(inputs[0]) if inputs else 1)
            structure = self._structure(calls, found.before)
            scale = 1.0 if self.adds else float(samples)
            slope = None if found.slope is None else found.slope.to(self.dtype)
            factor = scale**0.5 if slope is None else scale**0.5 / slope
            columns = [None if c.cotangent is None else c.cotangent.unsqueeze(0).to(self.dtype) * factor for c in calls]
            # of the gradient of all passes, of which each batch has its part
            whole = scale / len(backwards) if self.adds else scale * passes
            squares = {
                p: g.to(self.dtype).square() * whole
                for p, g in zip(self.parameters, gradients, strict=False)
                if p in self.others and g is not None
            }
            weight = 1.0 if slope is None else slope
            self._hand_on(task, Batch(structure, calls, columns, squares, samples, None, weight))

    def _hand_on(self, task: int, batch: Batch) -> None:
        assert self._taker is not None, "nobody was named to hand batches to"
        taker = self._taker()
        if taker is not None:  # else nobody is there any more whom it would matter to
            before = [*self._made.items()][-1:]  # finished, so nothing takes its place alone
            self._made = dict(before)
            self._made[task] = taker(batch, before[0][1] if before else None)

    def _structure(self, calls: Sequence[Call], before: frozenset[int]) -> Structure | None:
        """Until it is settled: which blocks there are."""
        recorder = self.observer.recorder
        if not recorder.linking:
            return None
        called = {call.block for call in calls} | recorder.links.keys()
        self.follow(Structure(sorted(called), self.observer.distances(calls, before)))
        return self.structure

    def follow(self, structure: Structure) -> None:
        """Have this structure, until there is another."""
        self.structure, self.others = structure, self.others_of(structure.called)

    def state_dict(self) -> dict[str, Any]:
        """Where the random numbers stand, and whether the next pass is gathered from."""
        return {"generator": self.observer.random_state, "active": self.active}

    def check_state(self, state: Any) -> None:
        """Raise a ValueError unless the state can be taken up."""
        check_entries("gathering", state, ("generator", "active"))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            ValueError: it is incomplete; nothing has changed then.
        """
        self.check_state(state)
        saved, generator = state["generator"].cpu(), self.seeds.generator
        if saved.shape == generator.get_state().shape:
            generator.set_state(saved)
        else:
            generator.manual_seed(self.options.seed)  # of another kind of device: no state of this one's
        if state["active"]:
            self.start()
        else:
            self.stop()


def _merge(rows: Sequence[Rows]) -> Rows:
    """Rows of several calls: their positions, one after the other."""
    if len(rows) == 1:
        return rows[0]
    return Rows(torch.cat([row.inputs for row in rows], dim=2), torch.cat([row.cotangents for row in rows], dim=3))
