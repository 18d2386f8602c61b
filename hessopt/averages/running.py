"""What averages: the running Kronecker factors of a network's layers, and the diagonals of its other parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagnostics.ranks.collectives import Ranks
from hessopt.averages.accounting import sample_curvature
from hessopt.averages.averages import KroneckerAverages, Moments
from hessopt.averages.blocks import Rows
from hessopt.averages.gathering import Batch, Gathering, Structure
from hessopt.averages.reduced import Share, Whole, one_structure, reduced
from hessopt.averages.saved import check_entries, check_tensors
from hessopt.averages.sharded import zeros_of
from hessopt.errors import HessoptError, ModelError
from hessopt.network.processes import DIFFERENT_GRADIENTS
from hessopt.network.saved_state import check_shape

_log = logging.getLogger(__name__)

Taper = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From distances of blocks ``(n, n)`` to the weights of their pairs, 0 where there are no cross factors."""

ENTRIES = (
    "updates", "skipped", "scale", "called", "distances", "excluded", "rows", "factors", "diagonals", "probing",
)  # fmt: skip
PROBE_ENTRIES = ("updates", "skipped", "factors", "last", "samples")


def no_pairs(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """The taper of bandwidth 0."""
    return np.eye(len(distances))


@dataclass(eq=False)
class Pending:
    """What a batch adds, or several micro-batches together, for the step that takes their gradients.

    Attributes:
        moments: For the factors.
        probe: For those of the probe, if there is one.
        rows: Of each block in the last batch; empty without a probe.
        counts: Numbers of rows of each block, samples times positions.
        squares: For the diagonals.
        samples: B of the last batch.
        scale: Trace of the loss's output curvature, if it is known.
        weight: Factor that the loss was back-propagated with, or the sum of their magnitudes.
        batches: All that was gathered, where it is wanted.
    """

    moments: Moments
    probe: Moments | None
    rows: list[Rows | None]
    counts: list[int]
    squares: dict[Tensor, Tensor]
    samples: int
    scale: Tensor | None
    weight: Tensor | float
    batches: list[Batch]


@dataclass(eq=False)
class Probe:
    """Factors of other pairs of the same blocks, averaged with equal weights.

    Attributes:
        factors: The averages.
        last: The rows of the last batch that went into them; empty before.
        samples: B of that batch.
        part: What its curvature counts beside that of other processes; None: there are none.
    """

    factors: KroneckerAverages
    last: list[Rows | None]
    samples: int = 0
    part: Tensor | None = None

    @torch.no_grad()
    def curvature(self, step: Tensor, ranks: Ranks = Ranks()) -> Tensor:  # noqa: B008 - frozen
        """``sᵀ (GGN) s`` by the columns of the last batch, for a step in the blocks: ``Σ (Σ_v ĵ_vᵀ S_v x_v)²``."""
        matrices, blocks = self.factors.matrices(step), self.factors.blocks
        place = self.factors.place
        parts = [matrices[n][start : start + b.shape[0]] for b, (n, start) in zip(blocks, place, strict=True)]
        found = sample_curvature(blocks, self.last, parts, self.samples) if self.samples else step.new_zeros(())
        if self.part is not None:
            found = found * self.part
            ranks.sum_([found])
        return found


class RunningAverages:
    r"""Running averages of what a :class:`hessopt.averages.gathering.Gathering` hands over.

    .. math::
       A_{vw} = E[x_v x_w^\top], \quad G_{vw} = E[\hat\jmath_v \hat\jmath_w^\top]

    of each layer (v = w) and of the pairs that the taper asks for, with the layers' inputs x (1 appended for the bias)
    and back-propagated columns ĵ of the loss's output curvature. Of layers that are called several times, or share
    their parameters, A is averaged over calls and G is summed. Every parameter without factors has a diagonal, the
    running mean of the squared back-propagated batch column (``E (Σ_b ĵ_b)²``, which is the diagonal of the curvature
    where columns of samples are independent and centred; with ``"empirical"``, B times the squared gradient).

    **One bad batch.** What a backward gathered goes into the averages at the step that follows (:meth:`commit`), if all
    of it is finite and so is the gradient. That is decided and counted on the device, without waiting for it, but at
    the first update.

    **Micro-batches** of an accumulation are those of one batch: A is the mean over all their rows, and G the sum over
    micro-batches i, with ``|c_i| / Σ |c|`` if it is of a mean loss. c_i is the factor that a declared loss module was
    back-propagated with; where it is not seen, it is the same for all.

    **Several processes** that train one network: what each gathered is put together in :meth:`commit`
    (:func:`hessopt.averages.reduced.reduced`), never in a hook.

    Args:
        gathering: What gathers.
        decay: Weight of the past.
        taper: Of the pairs' factors. Default: there are no pairs.
        keep: Keep what was gathered until the step is over, in ``last``.

    Attributes:
        last: Batches that the last :meth:`commit` averaged in, with the factors of their curvatures, if they are kept.
        updated: Whether it averaged any in, in whatever process.
        alike: Whether gradients were the same in all processes since :meth:`check_alike`, on the device.
        factors: The averages of the blocks that were called at the first batch; None before.
        diagonals: Of the other parameters.
        probe: Other pairs' factors that are averaged as well, or None.
        excluded: Blocks, by their place in ``factors``, whose rows in the last batch were not those of the samples.
        scale: Trace of the loss's output curvature, mean over the samples of the first batch: what makes a damping
            independent of the loss's units. With ``"empirical"`` it is 1.
        unsound_start: Whether the last batch would have been the first one, and was not finite.
    """

    def __init__(
        self, gathering: Gathering[Pending], decay: float, taper: Taper = no_pairs, *, keep: bool = False
    ) -> None:
        self.gathering, self.decay, self.taper, self.keep = gathering, decay, taper, keep
        self.last: list[tuple[Batch, float | Tensor]] = []
        self.updated = False
        self.alike: Tensor | None = None
        self.factors: KroneckerAverages | None = None
        self.diagonals: dict[Tensor, Tensor] = {}
        self.probe: Probe | None = None
        self._rows: list[int] | Tensor = []
        self.excluded: list[int] = []
        self.scale = 1.0
        self.unsound_start = False
        gathering.hand_to(self._moments)

    @property
    def updates(self) -> int:
        """Batches that were averaged."""
        return 0 if self.factors is None else self.factors.updates

    def blank_factors(self, taper: Taper | None = None) -> KroneckerAverages:
        """Averages of the same blocks without a batch in them; before the first batch, of all blocks.

        Args:
            taper: Of their pairs. Default: the averages' own; before the first batch there are no pairs.
        """
        structure = self.gathering.structure
        if structure is None:
            return self._factors(Structure.unconnected(len(self.gathering.blocks)), no_pairs, self.gathering.device)
        return self._factors(structure, self.taper if taper is None else taper, self.gathering.device)

    def _factors(self, structure: Structure, taper: Taper, device: torch.device) -> KroneckerAverages:
        blocks, weights = [self.gathering.blocks[i] for i in structure.called], taper(structure.inside)
        return KroneckerAverages(blocks, torch.from_numpy(weights), self.gathering.dtype, device)

    def open_probe(self, taper: Taper) -> None:
        """Average the factors of other pairs as well, from the next batch on."""
        self.probe = Probe(self.blank_factors(taper), [])

    def _moments(self, batch: Batch, before: Pending | None) -> Pending:
        """Of a batch, in its backward pass, and of the micro-batches before it."""
        known = [] if before is None else before.batches
        if batch.structure is not None and not (known and batch.structure.equals(known[-1].structure)):
            self._build()
            before = None  # of other blocks or pairs
            for earlier in known:
                before = self._joined(before, self._pending(earlier))
        return self._joined(before, self._pending(batch))

    def _pending(self, batch: Batch) -> Pending:
        assert self.factors is not None
        # With nothing between blocks to gather, Gram matrices are enough.
        rows = self.gathering.rows(batch, not self.factors.pairs and self.probe is None, self.factors.updates)
        counts = [0 if row is None else row.cotangents.shape[2] * row.cotangents.shape[3] for row in rows]
        moments = self.factors.moments(rows, batch.samples)
        probe = None if self.probe is None else self.probe.factors.moments(rows, batch.samples)
        kept = [] if probe is None else rows
        unsettled = batch.structure is not None and self.gathering.options.accumulate > 1
        whole = [batch] if self.keep or unsettled else []
        squares = {p: square for p, square in batch.squares.items() if p in self.diagonals}
        return Pending(moments, probe, kept, counts, squares, batch.samples, batch.scale, batch.weight, whole)

    def _joined(self, before: Pending | None, new: Pending) -> Pending:
        """Of the micro-batches before and a further one."""
        if before is None:
            return new
        assert self.factors is not None
        parts = [before, new]
        weight, shares = self._shares([part.weight for part in parts])
        probes = [part.probe for part in parts if part.probe is not None]
        squares: dict[Tensor, Tensor] = {}
        for share, part in zip(shares, parts, strict=True):
            for p, square in part.squares.items():
                squares[p] = squares[p] + share * square if p in squares else share * square
        scales = [share * part.scale for share, part in zip(shares, parts, strict=True) if part.scale is not None]
        return Pending(
            self.factors.joined([part.moments for part in parts], shares),
            None if self.probe is None else self.probe.factors.joined(probes, shares),
            new.rows,
            [a + b for a, b in zip(before.counts, new.counts, strict=True)],
            squares,
            new.samples,
            torch.stack(scales).sum() if scales else None,
            weight,
            [*before.batches, *new.batches],
        )

    def _shares(self, weights: Sequence[float | Tensor]) -> tuple[float | Tensor, list[float | Tensor]]:
        """The sum of weights, and what the curvatures of batches with these weights count, in that of all together."""
        if len(weights) == 1:
            return weights[0], [1.0]
        sizes = [weight.abs() if isinstance(weight, Tensor) else weight for weight in weights]
        total: float | Tensor = 0.0
        for size in sizes:
            total = total + size
        if self.gathering.adds:
            return total, [1.0] * len(sizes)
        least = total.clamp_min(torch.finfo(total.dtype).tiny) if isinstance(total, Tensor) else total
        return total, [size / least for size in sizes]

    def _build(self) -> None:
        self.factors = None  # the old ones are free before there are new ones
        self.factors = self.blank_factors()
        self.diagonals = {p: zeros_of(p, self.gathering.dtype) for p in self.gathering.others}

    @torch.no_grad()
    def commit(self, gradients: Sequence[Tensor | None] = ()) -> None:
        """Average in what the last backward pass gathered: the step with its gradients is taken.

        Args:
            gradients: Of ``gathering.parameters``, in that order.

        Raises:
            ClosureError: ``"empirical"``, and the factor on the loss is not known.
            ModelError: the output or the loss cannot be treated, or a gradient is sparse.
            NotConvexError: the loss is not convex in the output.
        """
        ranks, together = self.gathering.ranks, self.gathering.active
        pending, dtype = self._released(gradients, ranks), self.gathering.dtype
        self.last, self.updated, whole = [], False, None
        together = together and ranks.size > 1 and self.factors is not None
        if pending is None and not together:
            return
        slopes = [t.sum(dtype=dtype) for t in gradients if t is not None]
        if together:
            assert self.factors is not None
            whole = self._whole(pending, torch.stack(slopes).sum() if slopes else self.factors.blank()[0].sum(), ranks)
            pending = None if whole is None else self._replaced(pending, whole)
        if pending is None:
            return
        assert self.factors is not None
        parts = [*(t.sum(dtype=dtype) for t in pending.squares.values()), *slopes]
        parts += [] if pending.scale is None else [pending.scale.to(dtype)]
        sound = torch.stack([*pending.moments.totals, *parts]).sum().isfinite()
        if whole is not None:
            sound = sound & whole.finite
        if not self.updates:
            # The only synchronisation with the device.
            self.unsound_start = not sound
            if self.unsound_start:
                _log.warning("the first batch's curvature or gradient is not finite, so no step is taken yet")
                self.gathering.start()
                return
            if pending.scale is not None:
                self.scale = float(pending.scale) or 1.0  # a loss without curvature here has no scale
            self.gathering.settle()
        self.updated = True
        weight = self.factors.average(pending.moments, self.decay, sound)
        for p, square in pending.squares.items():
            mine = self.diagonals[p]
            mine.lerp_(torch.where(sound, square, mine), weight)
        if self.probe is not None and pending.probe is not None:
            self.probe.factors.average(pending.probe, 1.0, sound)
            self.probe.last, self.probe.samples = pending.rows, pending.samples
            self.probe.part = None if whole is None else whole.part
        self._rows = pending.counts if whole is None else whole.rows
        self.excluded = pending.moments.excluded
        if self.keep and pending.batches:
            shares = self._shares([batch.weight for batch in pending.batches])[1]
            if whole is not None:
                shares = [share * whole.part for share in shares]
            self.last = list(zip(pending.batches, shares, strict=True))
        self.gathering.seeds.updates = self.updates
        self.gathering.stop()

    def _released(self, gradients: Sequence[Tensor | None], ranks: Ranks) -> Pending | None:
        """What was gathered; of several processes at first of one structure, or an error in all of them."""
        gathering = self.gathering
        if ranks.size == 1 or not (gathering.active and gathering.unsettled):
            return gathering.release(gradients)
        pending, error = None, None
        try:
            pending = gathering.release(gradients)
        except HessoptError as found:
            error = found
        own = None if pending is None else gathering.structure
        structure = one_structure(own, error, ranks, [block.name for block in gathering.blocks])
        if structure is not None and pending is None:
            gathering.follow(structure)
            self._build()
        return pending

    def _whole(self, pending: Pending | None, gradient: Tensor, ranks: Ranks) -> Whole | None:
        """The update of all processes; None if they have none."""
        assert self.factors is not None
        own = Share(None, None, {}, None, 0.0, 0, [0] * len(self.factors.blocks))
        if pending is not None:
            # of the gradient of all processes, of which each has the share of its own samples
            times = ranks.size if self.gathering.empirical else 1
            squares = {p: square * times for p, square in pending.squares.items()}
            own = Share(
                pending.moments,
                pending.probe,
                squares,
                pending.scale,
                pending.weight,
                pending.moments.samples,
                pending.counts,
            )
        probe = None if self.probe is None else self.probe.factors
        adds = self.gathering.adds
        whole = reduced(own, ranks, self.factors, probe, self.diagonals, gradient, adds=adds)
        if whole is not None:
            self.alike = whole.alike if self.alike is None else self.alike & whole.alike
        return whole

    def _replaced(self, pending: Pending | None, whole: Whole) -> Pending:
        """What a process has, with the update of all in place of its own."""
        scale = None if self.gathering.empirical else whole.scale
        if pending is None:
            rows: list[Rows | None] = [None] * len(self.gathering.blocks)
            return Pending(whole.moments, whole.probe, rows, [], whole.squares, 0, scale, 0.0, [])
        return replace(pending, moments=whole.moments, probe=whole.probe, squares=whole.squares, scale=scale)

    def check_alike(self) -> None:
        """Raise a ModelError if gradients differed between processes. Waits for the device if there are several."""
        alike, self.alike = self.alike, None
        if alike is not None and not alike:
            raise ModelError(DIFFERENT_GRADIENTS)

    @property
    def rows(self) -> list[int]:
        """Numbers of rows of each block in the last batch, samples times positions."""
        if isinstance(self._rows, Tensor):
            self._rows = [int(count) for count in self._rows.tolist()]
        return self._rows

    def state_dict(self) -> dict[str, Any]:
        """The averages, as tensors and plain numbers.

        Before the first batch they are those of all layers, and zero, so that a checkpoint can be read into them.
        """
        factors, structure, diagonals = self.factors, self.gathering.structure, list(self.diagonals.values())
        if factors is None or structure is None:
            factors, structure = self.blank_factors(), Structure.unconnected(len(self.gathering.blocks))
            others = self.gathering.others_of(structure.called)
            diagonals = [zeros_of(p, factors.dtype) for p in others]
        own, cross = factors.split(factors.tensors)
        state: dict[str, Any] = {
            "updates": factors.updates, "skipped": factors.skipped.clone(), "scale": self.scale,
            "called": list(structure.called), "distances": torch.from_numpy(structure.distances),
            "excluded": list(self.excluded), "rows": list(self.rows), "probing": self.probe is not None,
            "factors": [t.clone() for t in own], "diagonals": [t.clone() for t in diagonals],
        }  # fmt: skip
        if cross:
            state["cross"] = [t.clone() for t in cross]
        if self.probe is not None:
            state["probe"] = {
                "updates": self.probe.factors.updates,
                "skipped": self.probe.factors.skipped.clone(),
                "factors": [t.clone() for t in self.probe.factors.tensors],
                "last": [None if row is None else [row.inputs, row.cotangents] for row in self.probe.last],
                "samples": self.probe.samples,
            }
        return state

    def check_state(
        self, state: Any, taper: Taper | None = None, probe: Taper | None = None
    ) -> KroneckerAverages | None:
        """Raise a ValueError unless the state can be taken up.

        Args:
            state: The state.
            taper: Of its pairs. Default: the averages' own.
            probe: Of its probe's pairs, if it may have one.

        Returns:
            Averages of the state's blocks and pairs, with shapes and without values; None if it is of no batch.
        """
        check_entries("averages", state, (*ENTRIES, "probe") if _probes(state) else ENTRIES)
        count, nowhere = len(self.gathering.blocks), torch.device("meta")
        check_shape("the distances of layers", state["distances"], (count, count))
        called = state["called"]
        if sorted({*called} & {*range(count)}) != list(called):
            raise ValueError(
                f"the state's averages are of the layers number {called}, and the network has {count}: it is another "
                "network's. Nothing was loaded."
            )
        if not state["updates"]:
            return None
        structure = _structure_of(state)
        factors = self._factors(structure, self.taper if taper is None else taper, nowhere)
        own, cross = factors.split(factors.named("factor"))
        check_tensors(own, state["factors"])
        check_tensors(cross, state.get("cross", []))
        names = self.gathering.names
        others = self.gathering.others_of(structure.called)
        check_tensors([(f"the diagonal of parameter {names.get(p, '?')!r}", p) for p in others], state["diagonals"])
        if state["probing"]:
            if probe is None:
                raise ValueError("the state has averages of other pairs of layers, for a choice. Nothing was loaded.")
            check_entries("probe", state["probe"], PROBE_ENTRIES)
            check_tensors(self._factors(structure, probe, nowhere).named("probing factor"), state["probe"]["factors"])
        return factors

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], probe: Taper | None = None) -> None:
        """Take up a state, of a network and options like these.

        Args:
            state: The state.
            probe: Of its probe's pairs, if it may have one.

        Raises:
            ValueError: the state is of another network or other pairs, or incomplete; nothing has changed then.
        """
        self.check_state(state, probe=probe)
        self.scale, self.probe, self.unsound_start = float(state["scale"]), None, False
        if not state["updates"]:
            self.factors, self.diagonals, self._rows, self.excluded = None, {}, [], []
            self.gathering.seeds.updates = 0
            self.gathering.unsettle()
            return
        self.gathering.settle(_structure_of(state))
        self._build()
        assert self.factors is not None
        _fill(self.factors, state, [*state["factors"], *state.get("cross", [])])
        for mine, saved in zip(self.diagonals.values(), state["diagonals"], strict=True):
            mine.copy_(saved)
        self._rows, self.excluded = list(state["rows"]), list(state["excluded"])
        self.gathering.seeds.updates = self.updates
        if state["probing"]:
            assert probe is not None
            theirs, device = state["probe"], self.gathering.device
            last = [None if row is None else Rows(*(t.to(device) for t in row)) for row in theirs["last"]]
            self.probe = Probe(self.blank_factors(probe), last, int(theirs["samples"]))
            _fill(self.probe.factors, theirs, theirs["factors"])


def _probes(state: Any) -> bool:
    return isinstance(state, dict) and bool(state.get("probing"))


def _structure_of(state: dict[str, Any]) -> Structure:
    return Structure(list(state["called"]), state["distances"].cpu().numpy())


def _fill(factors: KroneckerAverages, state: dict[str, Any], tensors: Sequence[Tensor]) -> None:
    factors.updates = int(state["updates"])
    factors.skipped.fill_(state["skipped"])
    for mine, saved in zip(factors.tensors, tensors, strict=True):
        mine.copy_(saved)
