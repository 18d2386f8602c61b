"""Kronecker-factored curvature inside a band of layers, gathered by hooks: the engine of KroneckerNewton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hessopt.averages.accounting import numbers_kept
from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.gathering import Curvature, Gathering
from hessopt.averages.options import ITERATIONS, KroneckerAveraging, NamedLoss, check_curvature, due
from hessopt.averages.running import Pending, RunningAverages
from hessopt.averages.saved import check_entries
from hessopt.averages.seeds import Seeds
from hessopt.kronecker.damped_inverse import DampedInverse, Direction
from hessopt.kronecker.inverse import KroneckerInverse
from hessopt.kronecker.taper import BandTaper
from hessopt.kronecker.treatment import treatment, warn_of_diagonals
from hessopt.network.cliques import Bandwidth
from hessopt.search.rules import KroneckerDamping


class KroneckerBand:
    r"""Running Kronecker factors of the curvature of all layers, and of pairs of layers within a band.

    .. math::
       M_{vw} = A_{vw} \otimes G_{vw}, \quad
       P = t \circ M + \mathrm{blockdiag}(\text{factored damping}) \succeq \lambda I

    with the averages A and G of :class:`hessopt.averages.running.RunningAverages`; t is the taper of
    :func:`hessopt.kronecker.taper.clique_taper`, t = 1 with ``"full"``, and no pairs with bandwidth 0.

    **Use.** Call the network, back-propagate the loss, then :meth:`direction` with the gradients. What is due is
    gathered in the backward pass (:class:`hessopt.averages.gathering.Gathering`: which layers, which passes, how), or
    with :meth:`gather` from a loss that is not declared. Parameters of other layers have a diagonal; where these are
    many, a warning is logged at the first step. See :meth:`report`.

    **One bad batch.** The averages take what a backward gathered at the step that follows, if all of it is finite; a
    direction that is not finite is zero. Both are decided and counted on the device (:meth:`report`), without waiting
    for it, but at the first update.

    **Memory**, in numbers: twice ``Σ_v g (a² + o²) + Σ_(v,w) (a_v a_w + o_v o_w)`` (a or o in place of a squared
    diagonal factor; one sum over blocks, one over pairs inside the band) for averages and inverses, and the number of
    parameters for other parameters' diagonals; see :meth:`memory`. Between the backward pass and the step of an update
    the averages' share once more.

    Args:
        model: The network.
        parameters: Parameters to precondition; all on one device.
        bandwidth: k, or ``"full"``.
        curvature: ``"fisher"``, ``"ggn"`` or ``"empirical"``, as for the gathering.
        damping: λ to start from, and its unit.
        loss: What is declared of it: by name, the module that computes it, or None.
        options: Of the columns, the averages and the inverse.
        group: Process group of those who train the network; None: the default one, if there is one.

    Attributes:
        gathering: What gathers.
        averages: What averages.
        inverse: What inverts.
        taper: The band's.
        steps: Directions that were given.
        left_out: Directions that were not finite, on the device.

    Raises:
        ValueError: an argument is out of range.
        ModelError: no parameter to train, or parameters on several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor],
        bandwidth: Bandwidth,
        curvature: Curvature,
        damping: KroneckerDamping,
        loss: NamedLoss | nn.Module | None,
        options: KroneckerAveraging,
        group: Any = None,
    ) -> None:
        check_curvature(curvature, loss, options)
        self.options, self.taper = options, BandTaper(bandwidth)
        self.gathering: Gathering[Pending] = Gathering(model, parameters, curvature, loss, options, group=group)
        self.averages = RunningAverages(self.gathering, options.decay, self.taper)
        self.inverse = DampedInverse(self.averages, damping, options.iterations or ITERATIONS)
        self.steps = 0
        self.left_out = torch.zeros((), dtype=torch.int64, device=self.gathering.device)

    @property
    def parameters(self) -> list[Tensor]:
        """Those that are preconditioned."""
        return self.gathering.parameters

    @property
    def seeds(self) -> Seeds:
        """Of the columns."""
        return self.gathering.seeds

    @property
    def bandwidth(self) -> Bandwidth:
        """The present one."""
        return self.taper.bandwidth

    @property
    def scale(self) -> float:
        """What makes λ and the optimizer's trust region independent of the loss's units; of the averages."""
        return self.averages.scale

    @property
    def damping(self) -> float:
        """λ."""
        return self.inverse.damping

    @damping.setter
    def damping(self, damping: float) -> None:
        self.inverse.damping = damping

    @property
    def waits(self) -> bool:
        """Whether an update is due that :meth:`gather` has to make, as no backward pass did."""
        return self.gathering.waits

    def detach(self) -> None:
        """Remove all hooks from the network."""
        self.gathering.detach()

    def begin(self) -> None:
        """Forget what was gathered in passes that were not followed by a step."""
        self.gathering.begin()

    def paused(self) -> AbstractContextManager[None]:
        """Gather nothing inside of this context."""
        return self.gathering.paused()

    def gather(self, loss: Tensor, output: Tensor) -> None:
        """Gather from a loss on its tape, if an update is due: :meth:`hessopt.averages.gathering.Gathering.gather`."""
        self.gathering.gather(loss, output)

    def commit(self, gradients: Sequence[Tensor | None] = ()) -> None:
        """Average in what the last backward pass gathered: the step with its gradients is taken.

        See :meth:`hessopt.averages.running.RunningAverages.commit`.
        """
        self.averages.commit(gradients)

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
        if not self.averages.updates:
            if not self.averages.unsound_start:
                raise self.gathering.cause()
            self.averages.unsound_start = False
            self.left_out += 1
            return self.inverse.nothing()
        if self.steps == 0:
            warn_of_diagonals(self.gathering.model, self.parameters, self.gathering.others)
        if not self.inverse.factored.ready or due(self.steps, self.options.inverse_every):
            self.averages.check_alike()
            self.inverse.refresh()
        direction = self.inverse.solve(gradients)
        self.left_out += ~direction.sound
        self.steps += 1
        if self.gathering.active or due(self.steps, self.options.factor_every):
            self.gathering.start()
        return direction

    def take(self, bandwidth: Bandwidth, factors: KroneckerAverages, inverse: KroneckerInverse) -> None:
        """Go on with another bandwidth: with these averages of the same blocks, and their inverse."""
        self.taper.bandwidth, self.averages.factors = bandwidth, factors
        self.inverse.take(inverse)

    @torch.no_grad()
    def quadratic(self, steps: Sequence[Tensor]) -> Tensor:
        """``sᵀ (t ∘ M) s``, undamped, for a step in the form of ``parameters``; without dimensions, on the device."""
        factors, diagonals = self.averages.factors, self.averages.diagonals
        assert factors is not None
        flat = self.inverse.flat(steps)
        total = flat @ torch.cat([y.flatten() for y in factors.product(factors.matrices(flat))])
        for p, s in zip(self.parameters, steps, strict=True):
            if p in diagonals:
                total = total + (diagonals[p] * s.to(factors.dtype).square()).sum()
        return total

    def memory(self) -> int:
        """Bytes of factors, inverses and diagonals by the formula above; 0 before the first batch."""
        if self.averages.factors is None:
            return 0
        return numbers_kept(self.averages.factors, list(self.averages.diagonals)) * self.gathering.dtype.itemsize

    def report(self) -> dict[str, str]:
        """How each parameter is treated, by its name in the network; and under ``"left out"`` what was not finite."""
        gathering, factors = self.gathering, self.averages.factors
        notes: dict[int, str] = {}
        if factors is not None and gathering.structure is not None and self.bandwidth != 0:
            for place, number in enumerate(gathering.structure.called):
                if not gathering.blocks[number].coupled:
                    notes[number] = "; not coupled to other layers"
                elif place in self.averages.excluded:
                    notes[number] = "; not coupled to other layers: its rows are not those of the batch's samples"
        found = treatment(gathering.names, gathering.blocks, gathering.others, notes)
        updates, steps = 0 if factors is None else int(factors.skipped), int(self.left_out)
        if updates or steps:
            found["left out"] = f"{updates} updates of the averages and {steps} steps, which were not finite"
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as tensors and plain numbers."""
        return {
            "bandwidth": self.bandwidth,
            "steps": self.steps,
            "left_out": self.left_out.clone(),
            "gathering": self.gathering.state_dict(),
            "averages": self.averages.state_dict(),
            "inverse": self.inverse.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], candidates: Sequence[Bandwidth] = ()) -> None:
        """Take up a state, of a network and arguments like this one's.

        Args:
            state: The state.
            candidates: Bandwidths that it may have instead of this one's, and that a probe is for.

        Raises:
            ValueError: the state is of another network or bandwidth, or incomplete; nothing has changed then.
        """
        check_entries("Kronecker band", state, ("bandwidth", "steps", "left_out", "gathering", "averages", "inverse"))
        bandwidth, known, averages = state["bandwidth"], candidates or [self.bandwidth], state["averages"]
        if isinstance(averages, dict) and averages.get("updates"):
            if bandwidth not in known:
                raise ValueError(
                    f"the state's averages are of another bandwidth, {bandwidth!r}, and the optimizer's is "
                    f"{' or '.join(map(repr, known))}. Nothing was loaded."
                )
        else:
            bandwidth = self.bandwidth  # of no averages yet
        own, probe = self.taper.of([bandwidth]), self.taper.of(candidates) if candidates else None
        self.gathering.check_state(state["gathering"])
        self.inverse.check_state(state["inverse"], self.averages.check_state(averages, own, probe))
        self.steps, self.taper.bandwidth = int(state["steps"]), bandwidth
        self.left_out.fill_(state["left_out"])
        self.gathering.load_state_dict(state["gathering"])
        self.averages.load_state_dict(averages, probe=probe)
        self.inverse.load_state_dict(state["inverse"])
