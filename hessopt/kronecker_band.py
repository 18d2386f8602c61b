"""Kronecker-factored curvature inside a band of layers, gathered by hooks: the mini-batch engine of BandedNewton."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diagnostics.cliques import Bandwidth, band_cliques, check_bandwidth
from hessopt.errors import ClosureError, ModelError
from hessopt.kronecker_factors import KroneckerFactors, Matrices
from hessopt.kronecker_inverse import KroneckerInverse
from hessopt.kronecker_layers import Rows, Sharing, plan_blocks
from hessopt.kronecker_recorder import Call, Recorder, back_propagate, block_distances
from hessopt.kronecker_report import numbers_kept, sample_curvature, treatment, warn_of_diagonals
from hessopt.kronecker_seeds import Seeds
from hessopt.kronecker_state import load_state, state_of
from hessopt.loss_curvature import LOSSES, Columns, Loss, Reduction
from hessopt.mini_batch import check_curvature, check_engine
from hessopt.taper import clique_taper
from hessopt.weak_hooks import WeakHooks

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
    """

    steps: list[Tensor]
    flat: list[Tensor]
    decrement: Tensor
    failed: Tensor


class KroneckerBand:
    r"""Running Kronecker factors of the curvature of all layers, and of pairs of layers within a band.

    .. math::
       M_{vw} = A_{vw} \otimes G_{vw}, \quad A_{vw} = E[x_v x_w^\top], \quad G_{vw} = E[\hat\jmath_v \hat\jmath_w^\top],
       \quad P = t \circ M + \mathrm{blockdiag}(\text{factored damping}) \succeq \lambda I

    with the layers' inputs x (1 appended for the bias) and back-propagated columns ĵ of the loss's output curvature;
    t is the taper of :func:`hessopt.taper.clique_taper`, t = 1 with ``"full"``, and no pairs with bandwidth 0.

    **Use.** Call the network, back-propagate the loss, then :meth:`direction` with the gradients. What is due is
    gathered by hooks in the network's forward pass (``curvature="empirical"``: in its backward pass). With a loss that
    is not declared, call :meth:`gather` between the forward and the backward pass. Of several forward passes between
    two calls of :meth:`direction`, the first one with gradients enabled counts.

    **Layers.** Linear on any leading dimensions (also transformers' ``Conv1D``), convolutions (all options, one pair
    of factors a group), embeddings (frequency of tokens ⊗ features), affine maps of normalisations and lone biases
    (exact blocks of the per-sample gradients). A layer that is called several times, or whose parameters several layers
    share: calls count as positions, so A is averaged over calls and G is summed. Every other parameter has a diagonal,
    the running mean of the squared back-propagated batch column (``E (Σ_b ĵ_b)²``, which is the diagonal of the
    curvature where columns of samples are independent and centred; with ``"empirical"``, B times the squared gradient);
    where these are many, a warning is logged at the first step. See :meth:`report`.

    **Memory**, in numbers: twice ``Σ_v g (a² + o²) + Σ_(v,w) (a_v a_w + o_v o_w)`` (a or o in place of a squared
    diagonal factor; one sum over blocks, one over pairs inside the band) for averages and inverses, and the number of
    parameters for other parameters' diagonals; see :meth:`memory`.

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
        columns: Columns = 1,
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
        self.factors: KroneckerFactors | None = None
        self.inverse: KroneckerInverse | None = None
        self.diagonals: dict[Tensor, Tensor] = {}
        self.probe: KroneckerFactors | None = None
        self.rows: list[int] = []
        self.last: list[Rows | None] = []
        self.seed = seed
        self.recorder = Recorder(self.blocks, curvature == "empirical")
        self._hooks = WeakHooks(self, "_see_output")
        self._hooks.attach(model)
        self._loss_hooks = WeakHooks(self, "_see_loss")
        if isinstance(loss, nn.Module) and curvature != "empirical":
            self._loss_hooks.attach(loss)
        self.samples = 0
        self.recorder.start()

    @property
    def absolute_damping(self) -> float:
        """λ in the curvature's own units; in units of layers a plain number."""
        return self.damping if self.per_layer else self.damping * self.scale

    def inverse_of(self, factors: KroneckerFactors) -> KroneckerInverse:
        """The inverse of other averages, of this one's kind."""
        return KroneckerInverse(factors, self.iterations, self.per_layer, self.least_damping)

    @property
    def least_damping(self) -> float:
        """In the curvature's own units, what rounding errors of the gradient ask for; 0 where these are not known."""
        return 0.0 if self.curvature == "empirical" else ROUNDING * torch.finfo(self.dtype).eps * self.scale

    def detach(self) -> None:
        """Remove all hooks from the network."""
        self.recorder.remove()
        self._hooks.remove()
        self._loss_hooks.remove()

    @property
    def waits(self) -> bool:
        """Whether an update is due that :meth:`gather` has to make, as the hook on the network did not."""
        return self.recorder.active

    def begin(self) -> None:
        """Forget forward passes that were not followed by a step."""
        if self.recorder.active:
            self.recorder.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gather nothing inside of this context."""
        active, self.recorder.active = self.recorder.active, False
        try:
            yield
        finally:
            self.recorder.active = active

    def gather(self, loss: Tensor, output: Tensor) -> None:
        """Update the factors from a loss on its tape, if an update is due. The tape is retained.

        Not needed where the loss is declared or the curvature is the empirical one, and the network itself was called;
        nor ever where it was declared as a module.

        Args:
            loss: A sum or mean over samples.
            output: ``(B, …)``, what the loss is a function of.
        """
        if not self.recorder.active:
            return
        if self.curvature == "empirical":
            self._see_batch(output)
            return
        if isinstance(self.seeds.loss, nn.Module):
            raise ClosureError(
                f"the declared {type(self.seeds.loss).__name__} was not called, on what the network returns, since the "
                "last step. Call that very module in the closure, or leave out loss=."
            )
        columns = self.seeds.of_loss(loss, output) if self.seeds.name is None else self.seeds.of_output(output)
        self._back_propagate(output, columns)

    def _see_output(self, _: None, __: nn.Module, ___: Any, ____: Any, output: Any) -> None:
        """After the network's forward pass: the curvature of a loss that is declared by name, or the empirical one."""
        if not self.recorder.active or not torch.is_grad_enabled():
            return
        if self.curvature == "empirical":
            leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if leaves:
                self._see_batch(leaves[0])
        elif self.seeds.name is not None and not (isinstance(output, Tensor) and not output.requires_grad):
            columns = self.seeds.of_output(output)
            self._back_propagate(output, columns)

    def _see_loss(self, _: None, __: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        """After the declared loss module: it may serve other networks as well, whose passes are not recorded here."""
        if self.recorder.active and self.recorder.calls and torch.is_grad_enabled():
            found = self.seeds.of_call(args, kwargs, value)
            if found is not None:
                self._back_propagate(*found)

    def _see_batch(self, output: Tensor) -> None:
        """Empirical: the calls are complete, and their cotangents will come."""
        self.samples = _batch(output)
        self._structure(self.recorder.calls, output)
        self.recorder.active = False

    def _back_propagate(self, output: Tensor, columns: Tensor) -> None:
        calls = self.recorder.stop()
        self.samples = _batch(output)
        apart = all(call.input.shape[:1] == output.shape[:1] for call in calls)
        if self.factors is None:
            # The only synchronisation with the device; a loss without curvature here has no scale.
            self.scale = float(columns.square().sum()) or 1.0
        self._structure(calls, output)
        others = list(self.diagonals)
        if others or not apart:
            # So that columns of different rows are independent and centred, where these meet: in the squared sum, and
            # in layers whose rows are not the output's (its rows may be positions of a sequence).
            signs = torch.randint(0, 2, columns.shape[:2], generator=self.generator, device=self.device)
            columns = columns * signs.mul_(2).sub_(1).view(*signs.shape, *[1] * (columns.ndim - 2))
        cotangents, slopes = back_propagate(output, columns, calls, others)
        with torch.no_grad():
            weight = self._update(calls, cotangents)
            for p, slope in zip(others, slopes, strict=True):
                if slope is not None:
                    self.diagonals[p].lerp_(slope.to(self.dtype).square().sum(0), weight)

    @torch.no_grad()
    def _structure(self, calls: Sequence[Call], output: Tensor) -> None:
        """At the first batch: which blocks there are, and which of them are in the band."""
        if self.factors is not None:
            return
        called = {call.block for call in calls}
        for number, block in enumerate(self.blocks):
            if number not in called:
                self.others.update(dict.fromkeys(block.parameters, "its layer was not called at the first step"))
        self.build(sorted(called), block_distances(calls, output.grad_fn, len(self.blocks)))

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

    def blank_factors(self, *bandwidths: Bandwidth) -> KroneckerFactors:
        """Factors without a batch in them, with the mean of the bandwidths' tapers, so with the pairs of each."""
        assert self.distances is not None
        inside = self.distances[np.ix_(self.called, self.called)]
        for k in bandwidths if len(inside) else ():
            if k not in self._tapers:  # they take as long as a solve, and decisions ask for the same ones again
                self._tapers[k] = clique_taper(band_cliques(inside, k), len(inside))
        taper = np.mean([self._tapers[k] for k in bandwidths], axis=0) if len(inside) else np.zeros((0, 0))
        return KroneckerFactors([self.blocks[i] for i in self.called], torch.from_numpy(taper), self.dtype, self.device)

    def take(self, bandwidth: Bandwidth, factors: KroneckerFactors, inverse: KroneckerInverse) -> None:
        """Go on with these factors of the same blocks."""
        self.bandwidth, self.factors, self.inverse = bandwidth, factors, inverse
        self._gradient, matrices = factors.blank()
        views, steps = factors.views(matrices), factors.views(inverse._parts)
        # By position, as hashing tensors at every step takes time: views of the two vectors, None for other parameters.
        self._views = [views.get(p) for p in self.parameters]
        self._steps = [steps.get(p) for p in self.parameters]

    def _update(self, calls: Sequence[Call], cotangents: Sequence[Tensor | None]) -> float:
        """Average in one batch; returns the weight."""
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
        self.rows = [0 if row is None else row.cotangents.shape[2] * row.cotangents.shape[3] for row in rows]
        self.excluded = self.factors.update(rows, self.decay, self.samples, self.cross)
        if self.probe is not None:
            self.probe.update(rows, 1.0, self.samples)
            self.last = rows
        return max(1 - self.decay, 1 / self.factors.updates)

    @torch.no_grad()
    def direction(self, gradients: Sequence[Tensor | None]) -> Direction:
        """Precondition a gradient; then get ready to gather in the next forward pass, if that is due.

        Args:
            gradients: Of ``parameters``, in that order; None counts as zero.

        Raises:
            ClosureError: nothing was gathered yet.
        """
        if self.curvature == "empirical" and self.recorder.calls:
            self._collect(gradients)
        if self.factors is None or self.inverse is None or not self.factors.updates:
            raise ClosureError(
                "no curvature was gathered: call the network with gradients enabled before each step, and declare the "
                f"loss, loss={' | '.join(map(repr, LOSSES))}, or pass a closure."
            )
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
        self.steps += 1
        if due(self.steps, self.factor_every):
            self.recorder.start()
        return Direction(steps, flats, decrement, failed)

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
        """Update from the cotangents that the ordinary backward pass left; a mean loss has 1/B in them."""
        calls = self.recorder.stop()
        scale = 1.0 if self.reduction == "sum" else float(self.samples)
        cotangents = [None if c.cotangent is None else c.cotangent.unsqueeze(0) * scale**0.5 for c in calls]
        weight = self._update(calls, cotangents)
        for p, g in zip(self.parameters, gradients, strict=True):
            if p in self.diagonals and g is not None:
                self.diagonals[p].lerp_(g.to(self.dtype).square() * scale, weight)

    def memory(self) -> int:
        """Bytes of factors, inverses and diagonals by the formula above; 0 before the first batch."""
        if self.factors is None:
            return 0
        return numbers_kept(self.factors, list(self.diagonals)) * self.dtype.itemsize

    def report(self) -> dict[str, str]:
        """How each parameter is treated, by its name in the network."""
        return treatment(self)

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


def _batch(output: Tensor) -> int:
    return output.shape[0] if output.ndim else 1


def _merge(rows: Sequence[Rows]) -> Rows:
    """Rows of several calls: their positions, one after the other."""
    if len(rows) == 1:
        return rows[0]
    return Rows(torch.cat([row.inputs for row in rows], dim=2), torch.cat([row.cotangents for row in rows], dim=3))
