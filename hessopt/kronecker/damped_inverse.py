"""What inverts: the damped inverse of running averages, refreshed now and then, and the directions that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.running import RunningAverages
from hessopt.averages.saved import check_entries, check_tensors
from hessopt.averages.sharded import zeros_of
from hessopt.kronecker.damping import Damping
from hessopt.kronecker.inverse import KroneckerInverse
from hessopt.search.rules import KroneckerDamping

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


class DampedInverse:
    """The inverse of ``P = t ∘ M + blockdiag(factored damping)`` for running averages M, and of the damped diagonals.

    Args:
        averages: The averages.
        damping: λ to start from, in units of their ``scale``, or of each layer's mean diagonal.
        iterations: Of conjugate gradients.

    Attributes:
        damping: λ.
    """

    def __init__(self, averages: RunningAverages, damping: KroneckerDamping, iterations: int) -> None:
        self.averages, self.damping = averages, damping.start
        self.iterations, self.per_layer = iterations, damping.unit == "layer"
        self._factored: KroneckerInverse | None = None

    @property
    def absolute_damping(self) -> Damping:
        """In the curvature's own units, with what rounding errors of the gradient ask for, where these are known."""
        scale, gathering = self.averages.scale, self.averages.gathering
        floor = 0.0 if gathering.empirical else ROUNDING * torch.finfo(gathering.dtype).eps * scale
        return Damping(self.damping if self.per_layer else self.damping * scale, self.per_layer, floor)

    @property
    def factored(self) -> KroneckerInverse:
        """The inverse of the averages' present factors; a blank one if these are new."""
        factors = self.averages.factors
        assert factors is not None
        if self._factored is None or self._factored.factors is not factors:
            self.take(self.of(factors))
            assert self._factored is not None
        return self._factored

    def of(self, factors: KroneckerAverages) -> KroneckerInverse:
        """A blank inverse of any averages."""
        return KroneckerInverse(factors, self.iterations)

    def take(self, factored: KroneckerInverse) -> None:
        """Go on with this inverse, which is of the averages' present factors."""
        factors = factored.factors
        self._gradient, matrices = factors.blank()
        views, steps = factors.views(matrices), factors.views(factored.parts)
        # By position, as hashing tensors at every step takes time: views of the two vectors, None for other parameters.
        self._views = [views.get(p) for p in self.averages.gathering.parameters]
        self._steps = [steps.get(p) for p in self.averages.gathering.parameters]
        self._factored = factored

    def refresh(self) -> None:
        """Invert the averages as they are now."""
        self.factored.refresh(self.absolute_damping, self.averages.gathering.ranks)

    def flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The part of a gradient that blocks have, as a vector, valid until the next call; None counts as zero."""
        _ = self.factored  # and with it the vector
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
        return self._gradient

    @torch.no_grad()
    def solve(self, gradients: Sequence[Tensor | None]) -> Direction:
        """Precondition a gradient.

        Args:
            gradients: Of ``gathering.parameters``, in that order; None counts as zero.
        """
        flat, decrement, failed = self.factored.solve(self.flat(gradients))
        steps, flats, damping = [], [flat], self.absolute_damping
        for p, view, g in zip(self.averages.gathering.parameters, self._steps, gradients, strict=True):
            if view is not None:
                steps.append(view)
                continue
            d = zeros_of(p, flat.dtype)
            if g is not None:
                slope, diagonal = g.to(flat.dtype), self.averages.diagonals[p]
                d = slope / (diagonal + damping.of_diagonal(diagonal))
                decrement = decrement + (slope * d).sum()
            steps.append(d)
            flats.append(d)
        sound = decrement.isfinite()
        for part in flats:
            part.masked_fill_(~sound, 0.0)
        return Direction(steps, flats, torch.where(sound, decrement, 0.0), failed, sound)

    def nothing(self) -> Direction:
        """The direction of no step, where there are no averages yet."""
        gathering = self.averages.gathering
        steps = [zeros_of(p, gathering.dtype) for p in gathering.parameters]
        zero = torch.zeros((), dtype=gathering.dtype, device=gathering.device)
        return Direction(steps, steps, zero, zero > 0, zero > 0)

    def state_dict(self) -> dict[str, Any]:
        """λ and the inverses, as tensors and plain numbers; before the first batch those of all layers, and zero."""
        inverse = self.of(self.averages.blank_factors()) if self.averages.factors is None else self.factored
        own, cross = inverse.factors.split(inverse.tensors)
        state = {"damping": self.damping, "ready": inverse.ready, "inverses": [t.clone() for t in own]}
        return {**state, "cross": [t.clone() for t in cross]} if cross else state

    def check_state(self, state: Any, factors: KroneckerAverages | None) -> None:
        """Raise a ValueError unless the state can be taken up.

        Args:
            state: The state.
            factors: What the averages will be, their shapes; None: of no batch.
        """
        check_entries("inverse", state, ("damping", "ready", "inverses"))
        if factors is not None:
            inverse = self.of(factors)
            own, cross = factors.split(factors.named("inverse factor", inverse.tensors))
            check_tensors(own, state["inverses"])
            check_tensors(cross, state.get("cross", []))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state, for averages that took up theirs.

        Raises:
            ValueError: the state is of other averages, or incomplete; nothing has changed then.
        """
        self.check_state(state, self.averages.factors)
        self.damping, self._factored = float(state["damping"]), None
        if self.averages.factors is not None:
            for mine, saved in zip(self.factored.tensors, [*state["inverses"], *state.get("cross", [])], strict=True):
                mine.copy_(saved)
            self.factored.ready = bool(state["ready"])
