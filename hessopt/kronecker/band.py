"""Kronecker-factored curvature inside a band of layers, gathered by hooks: the mini-batch engine of BandedNewton."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hessopt.averages.accounting import numbers_kept, sample_curvature
from hessopt.averages.averages import KroneckerAverages, Matrices, Moments
from hessopt.averages.blocks import Rows, Sharing, plan_blocks
from hessopt.averages.causes import SEE_LOSS, cause
from hessopt.averages.gathering import Columns, Gathering
from hessopt.averages.inverse import KroneckerInverse
from hessopt.averages.options import check_curvature, check_engine
from hessopt.averages.recorder import Call, Recorder, back_propagate
from hessopt.averages.seeds import Seeds
from hessopt.closure.loss_curvature import Columns as Count
from hessopt.closure.loss_curvature import Loss, Reduction
from hessopt.errors import ClosureError, ModelError
from hessopt.kronecker.state import load_state, state_of
from hessopt.kronecker.taper import clique_taper
from hessopt.kronecker.treatment import treatment, warn_of_diagonals
from hessopt.network.cliques import Bandwidth, band_cliques, check_bandwidth

_log = logging.getLogger(__name__)

ROUNDING = 30
"""Of the loss's curvature at the start, times the rounding unit: the least damping in units of layers."""


@dataclass
class Direction:
    """Solution of ``P d = g``.

    Attributes:
        steps: d for each parameter, valid until the next call.
        flat: What these are views of: a buffer for the Kronecker blocks, and the rest's.
        decrement: ``gᵀd``, without dimensions, on the device; equal to ``dᵀ P d`` (up to rounding).
        failed: Whether conjugate gradients failed and d is the block-diagonal step, on the device.
        sound: Whether all of it is finite, on the device; if not, d and the decrement are zero instead.
    """

    steps: list[Tensor]
    flat: list[Tensor]
    decrement: Tensor
    failed: Tensor
    sound: Tensor


@dataclass
class _Pending:
    """What a backward pass gathered, for the step that takes its gradients."""

    moments: Moments
    probe: Moments | None
    last: list[Rows | None]
    rows: list[int]
    slopes: dict[Tensor, Tensor]
    samples: int
    scale: Tensor | None


class KroneckerBand:
    r"""Running Kronecker factors of the curvature of all layers, and of pairs of layers within a band.

    .. math::
       M_{vw} = A_{vw} \otimes G_{vw}, \quad A_{vw} = E[x_v x_w^\top], \quad G_{vw} = E[\hat\jmath_v \hat\jmath_w^\top],
       \quad P = t \circ M + \mathrm{blockdiag}(\text{factored damping}) \succeq \lambda I

    with the layers' inputs x (1 appended for the bias) and back-propagated columns ĵ of the loss's output curvature;
    t is the taper of :func:`hessopt.kronecker.taper.clique_taper`, t = 1 with ``"full"``, and no pairs with bandwidth
    0.

    **Use.** Call the network, back-propagate the loss, then :meth:`direction` with the gradients. What is due is
    gathered in the backward pass, by a hook at the network's output (or at the declared loss module's value) that
    back-propagates the columns before the ordinary backward goes on, so on a tape that is whole; this is a re-entrant
    call of autograd, from the thread that executes the backward. Hooks of the user's own on the tape see the columns as
    well. With a loss that is not declared, call :meth:`gather` on the loss's tape. Which pass counts where there are
    several is at :class:`hessopt.averages.passes.Choice`: not one that no backward follows.

    **One bad batch.** What a backward gathered goes into the averages at the step that follows, if all of it is finite
    and so is the gradient; a direction that is not finite is zero. Both are decided and counted on the device
    (:meth:`report`), without waiting for it, but at the first update.

    **Layers.** Linear on any leading dimensions (also transformers' ``Conv1D``), convolutions (all options, one pair
    of factors a group), embeddings (frequency of tokens ⊗ features), affine maps of normalisations and lone biases
    (exact blocks of the per-sample gradients). A layer that is called several times, or whose parameters several layers
    share: calls count as positions, so A is averaged over calls and G is summed. Every other parameter has a diagonal,
    the running mean of the squared back-propagated batch column (``E (Σ_b ĵ_b)²``, which is the diagonal of the
    curvature where columns of samples are independent and centred; with ``"empirical"``, B times the squared gradient);
    where these are many, a warning is logged at the first step. See :meth:`report`.

    **Memory**, in numbers: twice ``Σ_v g (a² + o²) + Σ_(v,w) (a_v a_w + o_v o_w)`` (a or o in place of a squared
    diagonal factor; one sum over blocks, one over pairs inside the band) for averages and inverses, and the number of
    parameters for other parameters' diagonals; see :meth:`memory`. Between the backward pass and the step of an update
    the averages' share once more.

    Args:
        model: The network.
        parameters: Parameters to precondition; all on one device.
        bandwidth: k, or ``"full"``.
        curvature: ``"fisher"``: Monte-Carlo columns; ``"ggn"``: root of the output Hessian times random signs, or
            exact; ``"empirical"``: the gradients of the samples, for which no extra backward pass is needed.
        loss: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"``, ``"poisson_nll"``; the module that computes the
            loss; or None, then :meth:`gather` takes the loss.
        reduction: Of the loss: ``"mean"``, ``"sum"`` or ``"batchmean"`` (sum over all, divided by B).
        class_dim: Of the classes in the output of ``"cross_entropy"``; None: as PyTorch has it.
        columns: K, columns of the output curvature a sample, or ``"exact"``.
        damping: λ in units of :attr:`scale`.
        damping_unit: ``"loss"``, or ``"layer"``: λ in units of the mean of each layer's diagonal instead.
        decay: Weight of the past in running averages.
        factor_every: Steps between updates of factors.
        inverse_every: Steps between inversions.
        iterations: Conjugate-gradient iterations (bandwidth ≥ 1).
        sharing: ``"expand"`` or ``"reduce"``, for linear layers with several positions a sample.
        max_size: Factors with more rows are diagonal.
        seed: Of the random columns.

    Attributes:
        probe: Factors of another bandwidth that are averaged as well, with equal weights, or None.
        last: The rows of the last batch that went into the probe.
        left_out: Directions that were not finite, on the device.
        scale: Trace of the loss's output curvature, mean over the samples of the first batch: what makes λ (and the
            optimizer's trust region) independent of the loss's units. With ``"empirical"`` it is 1.

    Raises:
        ValueError: an argument is out of range.
        ModelError: no parameter to train, or parameters on several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor],
        bandwidth: Bandwidth = 0,
        *,
        curvature: Literal["fisher", "ggn", "empirical"] = "fisher",
        loss: Loss | None = None,
        reduction: Reduction = "mean",
        class_dim: int | None = None,
        columns: Count = 1,
        damping: float = 2e-3,
        damping_unit: Literal["loss", "layer"] = "loss",
        decay: float = 0.9,
        factor_every: int = 10,
        inverse_every: int = 40,
        iterations: int = 3,
        sharing: Sharing = "expand",
        max_size: int = 8192,
        seed: int = 0,
    ) -> None:
        check_bandwidth(bandwidth)
        check_curvature(curvature, columns, damping)
        check_engine(
            loss=loss, reduction=reduction, class_dim=class_dim, columns=columns, decay=decay, sharing=sharing,
            factor_every=factor_every, inverse_every=inverse_every, iterations=iterations, max_size=max_size, seed=seed,
            damping_unit=damping_unit,
        )  # fmt: skip
        self.model, self.bandwidth, self.curvature, self.per_layer = (
            model,
            bandwidth,
            curvature,
            damping_unit == "layer",
        )
        self.reduction = getattr(loss, "reduction", reduction)
        self.damping, self.decay, self.sharing = damping, decay, sharing
        self.factor_every, self.inverse_every, self.iterations = factor_every, inverse_every, iterations
        self.cross = True
        self.scale = 1.0
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ModelError("none of the parameters requires grad, so there is nothing to train.")
        self.device = self.parameters[0].device
        if any(p.device != self.device for p in self.parameters):
            raise ModelError("the trained parameters are on several devices; move the network to one.")
        self.dtype = reduce(torch.promote_types, (p.dtype for p in self.parameters), torch.float32)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.seeds = Seeds(loss, reduction, class_dim, columns, curvature == "fisher", self.generator)
        self.blocks, self.others = plan_blocks(model, self.parameters, max_size)
        self.steps = 0
        self.excluded: list[int] = []
        self.distances: NDArray[np.float64] | None = None
        self._tapers: dict[Bandwidth, NDArray[np.float64]] = {}
        self.factors: KroneckerAverages | None = None
        self.inverse: KroneckerInverse | None = None
        self.diagonals: dict[Tensor, Tensor] = {}
        self.probe: KroneckerAverages | None = None
        self.rows: list[int] = []
        self.last: list[Rows | None] = []
        self.seed = seed
        self.samples = 0
        self.left_out = torch.zeros((), dtype=torch.int64, device=self.device)
        self._unsound_start = False
        self._pending: _Pending | None = None
        self._planned = dict(self.others)
        self.gathering = Gathering(
            model, self.blocks, self.parameters, self.seeds, curvature == "empirical", self._back_propagate
        )

    @property
    def absolute_damping(self) -> float:
        """λ in the curvature's own units; in units of layers a plain number."""
        return self.damping if self.per_layer else self.damping * self.scale

    def inverse_of(self, factors: KroneckerAverages) -> KroneckerInverse:
        """The inverse of other averages, of this one's kind."""
        return KroneckerInverse(factors, self.iterations, self.per_layer, self.least_damping)

    @property
    def least_damping(self) -> float:
        """In the curvature's own units, what rounding errors of the gradient ask for; 0 where these are not known."""
        return 0.0 if self.curvature == "empirical" else ROUNDING * torch.finfo(self.dtype).eps * self.scale

    @property
    def recorder(self) -> Recorder:
        """Notes the calls of layers; active while an update is due."""
        return self.gathering.recorder

    def detach(self) -> None:
        """Remove all hooks from the network."""
        self.gathering.remove()

    @property
    def waits(self) -> bool:
        """Whether an update is due that :meth:`gather` has to make, as no backward pass did."""
        return self.recorder.active and self._pending is None and self.curvature != "empirical"

    def begin(self) -> None:
        """Forget what was gathered in passes that were not followed by a step."""
        self._pending = None
        self.gathering.forget()

    def start(self, active: bool = True) -> None:
        """Gather in the next backward pass; or nothing until a later step says so."""
        self._pending = None
        if active:
            self.gathering.start()
        else:
            self.gathering.stop()

    def paused(self) -> AbstractContextManager[None]:
        """Gather nothing inside of this context."""
        return self.gathering.paused()

    def gather(self, loss: Tensor, output: Tensor) -> None:
        """Gather from a loss on its tape, if an update is due. The tape is retained.

        Not needed where the loss is declared or the curvature is the empirical one, and the network itself was called;
        nor ever where it was declared as a module.

        Args:
            loss: A sum or mean over samples.
            output: ``(B, …)``, what the loss is a function of.
        """
        if self.waits:
            self._raise()
            with self.paused():
                self.gathering.take_loss(loss, output)

    def _raise(self) -> None:
        """The error that gathering met, if there was one."""
        error = self.gathering.error
        if error is not None:
            self.begin()
            raise error

    def _back_propagate(self, found: Columns) -> None:
        """Columns to the layers, and their moments: pending until the step."""
        self._pending = None
        calls, columns = found.calls, found.values
        apart = all(call.input.shape[:1] == columns.shape[1:2] for call in calls)
        scale = columns.square().sum()
        self._structure(calls, found.before)
        others = list(self.diagonals)
        if others or not apart:
            # So that columns of different rows are independent and centred, where these meet: in the squared sum, and
            # in layers whose rows are not the output's (its rows may be positions of a sequence).
            signs = torch.randint(0, 2, columns.shape[:2], generator=self.generator, device=self.device)
            columns = columns * signs.mul_(2).sub_(1).view(*signs.shape, *[1] * (columns.ndim - 2))
        cotangents, slopes = back_propagate(found.output, columns, calls, others)
        with torch.no_grad():
            squares = {
                p: slope.to(self.dtype).square().sum(0)
                for p, slope in zip(others, slopes, strict=True)
                if slope is not None
            }
            self._pending = self._moments(calls, cotangents, squares, found.samples, scale)

    @torch.no_grad()
    def _structure(self, calls: Sequence[Call], before: frozenset[int]) -> None:
        """Until the first update: which blocks there are, and which of them are in the band."""
        if not self.recorder.linking:
            return
        called = {call.block for call in calls} | self.recorder.links.keys()
        self.others = dict(self._planned)
        for number, block in enumerate(self.blocks):
            if number not in called:
                self.others.update(dict.fromkeys(block.parameters, "its layer was not called at the first step"))
        self.build(sorted(called), self.gathering.distances(calls, before))

    def build(self, called: Sequence[int], distances: NDArray[np.float64]) -> None:
        """Blank averages of the blocks that were called, and their inverse."""
        self.called, self.distances, self._tapers = list(called), distances, {}
        factors = self.blank_factors(self.bandwidth)
        self.take(self.bandwidth, factors, self.inverse_of(factors))
        self.diagonals = {
            p: torch.zeros_like(p, dtype=self.dtype)
            for p, view in zip(self.parameters, self._views, strict=True)
            if view is None
        }

    def blank_factors(self, *bandwidths: Bandwidth) -> KroneckerAverages:
        """Factors without a batch in them, with the mean of the bandwidths' tapers, so with the pairs of each."""
        assert self.distances is not None
        inside = self.distances[np.ix_(self.called, self.called)]
        for k in bandwidths if len(inside) else ():
            if k not in self._tapers:  # they take as long as a solve, and decisions ask for the same ones again
                self._tapers[k] = clique_taper(band_cliques(inside, k), len(inside))
        taper = np.mean([self._tapers[k] for k in bandwidths], axis=0) if len(inside) else np.zeros((0, 0))
        return KroneckerAverages(
            [self.blocks[i] for i in self.called], torch.from_numpy(taper), self.dtype, self.device
        )

    def take(self, bandwidth: Bandwidth, factors: KroneckerAverages, inverse: KroneckerInverse) -> None:
        """Go on with these factors of the same blocks."""
        self.bandwidth, self.factors, self.inverse = bandwidth, factors, inverse
        self._gradient, matrices = factors.blank()
        views, steps = factors.views(matrices), factors.views(inverse._parts)
        # By position, as hashing tensors at every step takes time: views of the two vectors, None for other parameters.
        self._views = [views.get(p) for p in self.parameters]
        self._steps = [steps.get(p) for p in self.parameters]

    def _moments(
        self,
        calls: Sequence[Call],
        cotangents: Sequence[Tensor | None],
        slopes: dict[Tensor, Tensor],
        samples: int,
        scale: Tensor | None,
    ) -> _Pending:
        """Of one batch."""
        assert self.factors is not None
        found: dict[int, list[Rows]] = {}
        times = Counter(call.block for call in calls)
        inside = not self.factors.pairs and self.probe is None  # nothing between blocks is gathered
        for call, j in zip(calls, cotangents, strict=True):
            if call.block in self.called and j is not None:
                gram = inside and times[call.block] == 1
                row = self.blocks[call.block].rows(call.module, call.input, j, self.sharing, self.dtype, gram)
                found.setdefault(call.block, []).append(row)
        rows = [_merge(found[i]) if i in found else None for i in self.called]
        counts = [0 if row is None else row.cotangents.shape[2] * row.cotangents.shape[3] for row in rows]
        moments = self.factors.moments(rows, samples, self.cross)
        probe = None if self.probe is None else self.probe.moments(rows, samples)
        return _Pending(moments, probe, [] if probe is None else rows, counts, slopes, samples, scale)

    @torch.no_grad()
    def commit(self, gradients: Sequence[Tensor | None] = ()) -> None:
        """Average in what the last backward pass gathered: the step with its gradients is taken.

        Args:
            gradients: Of ``parameters``, in that order.

        Raises:
            ClosureError: ``"empirical"``, and the factor on the loss is not known.
            ModelError: the output or the loss cannot be treated, or a gradient is sparse.
            NotConvexError: the loss is not convex in the output.
        """
        self._raise()
        if self.recorder.active and self.curvature == "empirical":
            self._collect(gradients)
        pending, self._pending = self._pending, None
        if pending is None:
            return
        assert self.factors is not None
        parts = [t.sum(dtype=self.dtype) for t in [*pending.slopes.values(), *gradients] if t is not None]
        parts += [] if pending.scale is None else [pending.scale.to(self.dtype)]
        sound = torch.stack([*pending.moments.totals, *parts]).sum().isfinite()
        if self.recorder.linking:
            # The only synchronisation with the device.
            if not sound:
                self._unsound_start = True
                self.left_out += 1
                _log.warning("the first batch's curvature or gradient is not finite, so no step is taken yet")
                self.gathering.start()
                return
            if pending.scale is not None:
                self.scale = float(pending.scale) or 1.0  # a loss without curvature here has no scale
            self.recorder.linking = False
        weight = self.factors.average(pending.moments, self.decay, sound)
        for p, square in pending.slopes.items():
            mine = self.diagonals[p]
            mine.lerp_(torch.where(sound, square, mine), weight)
        if self.probe is not None and pending.probe is not None:
            self.probe.average(pending.probe, 1.0, sound)
            self.last = pending.last
        self.rows, self.samples, self.excluded = pending.rows, pending.samples, pending.moments.excluded
        self.gathering.stop()

    @torch.no_grad()
    def direction(self, gradients: Sequence[Tensor | None]) -> Direction:
        """Precondition a gradient; then get ready to gather in the next backward pass, if that is due.

        Args:
            gradients: Of ``parameters``, in that order; None counts as zero.

        Raises:
            ClosureError: nothing was gathered yet.
            ModelError: the output or the loss cannot be treated, or a gradient is sparse.
        """
        self.commit(gradients)
        if self.factors is None or self.inverse is None or not self.factors.updates:
            if not self._unsound_start:
                gathering = self.gathering
                raise cause(gathering.seen, self.recorder, gathering.seeds.loss, gathering.empirical)
            self._unsound_start = False
            steps = [torch.zeros_like(p, dtype=self.dtype) for p in self.parameters]
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            return Direction(steps, steps, zero, zero > 0, zero > 0)
        if self.steps == 0:
            warn_of_diagonals(self)
        if not self.inverse.ready or due(self.steps, self.inverse_every):
            self.inverse.refresh(self.absolute_damping)
        self._fill(gradients)
        flat, decrement, failed = self.inverse.solve(self._gradient)
        steps, flats = [], [flat]
        tiny = torch.finfo(self.dtype).tiny
        for p, view, g in zip(self.parameters, self._steps, gradients, strict=True):
            if view is not None:
                steps.append(view)
                continue
            d = torch.zeros_like(p, dtype=self.dtype)
            if g is not None:
                slope = g.to(self.dtype)
                diagonal, extra = self.diagonals[p], self.absolute_damping
                if self.per_layer:
                    d = slope / (diagonal + (extra * diagonal.mean()).clamp_min(max(self.least_damping, tiny)))
                else:
                    d = slope / (diagonal + extra)
                decrement = decrement + (slope * d).sum()
            steps.append(d)
            flats.append(d)
        sound = decrement.isfinite()
        self.left_out += ~sound
        for part in flats:
            part.masked_fill_(~sound, 0.0)
        self.steps += 1
        if self.recorder.active or due(self.steps, self.factor_every):
            self.start()
        return Direction(steps, flats, torch.where(sound, decrement, 0.0), failed, sound)

    def flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The part of a gradient that blocks have, as a vector, valid until the next call."""
        self._fill(gradients)
        return self._gradient

    def _fill(self, gradients: Sequence[Tensor | None]) -> None:
        targets, sources = [], []
        for view, g in zip(self._views, gradients, strict=True):
            if view is not None:
                if g is None:
                    view.zero_()
                else:
                    targets.append(view)
                    sources.append(g)
        if targets:
            torch._foreach_copy_(targets, sources)

    @torch.no_grad()
    def quadratic(self, steps: Sequence[Tensor]) -> Tensor:
        """``sᵀ (t ∘ M) s``, undamped, for a step in the form of ``parameters``; without dimensions, on the device."""
        assert self.factors is not None
        self._fill(steps)
        matrices: Matrices = self.factors.matrices(self._gradient)
        total = self._gradient @ torch.cat([y.flatten() for y in self.factors.product(matrices)])
        for p, view, s in zip(self.parameters, self._views, steps, strict=True):
            if view is None:
                total = total + (self.diagonals[p] * s.to(self.dtype).square()).sum()
        return total

    @torch.no_grad()
    def measured(self, step: Tensor) -> Tensor:
        """``sᵀ (GGN) s`` by the columns of the last batch in the probe, on blocks: ``Σ (Σ_v ĵ_vᵀ S_v x_v)²``."""
        assert self.factors is not None
        blocks = [self.blocks[i] for i in self.called]
        matrices = self.factors.matrices(step)
        place = self.factors.place
        parts = [matrices[n][start : start + b.shape[0]] for b, (n, start) in zip(blocks, place, strict=True)]
        return sample_curvature(blocks, self.last, parts, self.samples)

    def _collect(self, gradients: Sequence[Tensor | None]) -> None:
        """From the cotangents that the ordinary backward pass left; a mean loss has 1/B in them, times its slope."""
        found = self.gathering.backward
        if found is None or (self.blocks and not found.calls):
            return
        if found.slope is None and self.gathering.choice.further:
            raise ClosureError(
                'the gradients of several backward passes were accumulated, and curvature="empirical" does not know '
                f"the factor that each loss had. Call backward() once before each step, or {SEE_LOSS}."
            )
        calls = sorted(found.calls, key=lambda call: call.note.order)
        inputs = [c.input for c in calls if c.input.ndim]
        samples = found.samples or (len(inputs[0]) if inputs else 1)
        self._structure(calls, found.before)
        scale = 1.0 if self.reduction == "sum" else float(samples)
        factor = scale**0.5 if found.slope is None else scale**0.5 / found.slope.to(self.dtype)
        cotangents = [None if c.cotangent is None else c.cotangent.unsqueeze(0).to(self.dtype) * factor for c in calls]
        whole = scale if self.reduction == "sum" else scale * (1 + len(self.gathering.choice.further))
        slopes = {
            p: g.to(self.dtype).square() * whole
            for p, g in zip(self.parameters, gradients, strict=False)
            if p in self.diagonals and g is not None
        }
        self._pending = self._moments(calls, cotangents, slopes, samples, None)

    def memory(self) -> int:
        """Bytes of factors, inverses and diagonals by the formula above; 0 before the first batch."""
        if self.factors is None:
            return 0
        return numbers_kept(self.factors, list(self.diagonals)) * self.dtype.itemsize

    def report(self) -> dict[str, str]:
        """How each parameter is treated, by its name in the network; and under ``"left out"`` what was not finite."""
        found = treatment(self)
        updates, steps = 0 if self.factors is None else int(self.factors.skipped), int(self.left_out)
        if updates or steps:
            found["left out"] = f"{updates} updates of the averages and {steps} steps, which were not finite"
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as tensors and plain numbers."""
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any], candidates: Sequence[Bandwidth] = ()) -> None:
        """Take up a state, of a network and arguments like this one's.

        Args:
            state: The state.
            candidates: Bandwidths that it may have instead of this one's, and that a probe is for.

        Raises:
            ValueError: the state is of another network or bandwidth.
        """
        load_state(self, state, candidates)


def due(step: int, every: int) -> bool:
    """Whether to refresh at this step (the first is 0): every so many steps, and at powers of two before the first."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def _merge(rows: Sequence[Rows]) -> Rows:
    """Rows of several calls: their positions, one after the other."""
    if len(rows) == 1:
        return rows[0]
    return Rows(torch.cat([row.inputs for row in rows], dim=2), torch.cat([row.cotangents for row in rows], dim=3))
