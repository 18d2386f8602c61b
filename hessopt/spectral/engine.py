"""The engine of spectral steps in the coordinates of the curvature: what is gathered, averaged, and made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.gathering import Curvature, Gathering, Structure
from hessopt.averages.options import NamedLoss, due
from hessopt.averages.running import Pending, RunningAverages
from hessopt.averages.saved import check_entries, check_tensors
from hessopt.averages.sharded import fill
from hessopt.spectral.adamw_vector import AdamWVector, Moments
from hessopt.spectral.coarse_curvature import changes_along
from hessopt.spectral.gram_polar import inverse_roots
from hessopt.spectral.layers import SpectralLayers, divided
from hessopt.spectral.options import AdamWPart, CurvatureLengths, KroneckerCoordinates, Momentum
from hessopt.spectral.stack_direction import Roots

FIXED = 0.01
"""Step length where the loss is not known, for a learning rate of 1."""
OFTEN = 8
"""Updates are at first so many times as frequent as doublings of the steps: curvature rises a hundredfold in the first
fifty, and lengths that lag behind it saturate a network for good."""
ENTRIES = ("steps", "left_out", "gathering", "averages", "powers", "coarse", "norm", "adamw_steps")


@dataclass(eq=False)
class Move:
    """What a step adds to parameters, for a learning rate of 1, and what its state is to become.

    Attributes:
        parameters: Those that move.
        changes: In their order.
        rates: Step length of each, on the device, if that was asked for.
        momentum: Of the matrices.
        vector: Moments of the others, and steps.
        sound: Whether the gradient was finite, on the device; None where there is no step.
    """

    parameters: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)
    rates: list[Tensor] = field(default_factory=list)
    momentum: Tensor | None = None
    vector: Moments | None = None
    sound: Tensor | None = None


class SpectralEngine:
    r"""Directions and lengths of steps, from gradients and from what hooks on the network gather.

    For the weight matrices of linear and convolution layers, each with its bias as one more column: momentum
    ``M ← μ M + (1 − μ) G``, the direction of ``μ M + (1 − μ) G`` (:class:`StackDirection`), and lengths of all layers
    together (:class:`CoarseCurvature`) at every update of the factors. Other parameters go along AdamW's direction,
    with the median of the lengths.

    **One bad batch.** A gradient that is not finite changes nothing, by a decision on the device, and is counted.

    Args:
        model: The network.
        parameters: All that are trained.
        loss: What is declared of it, or None.
        options: Coordinates.
        momentum: μ, and how long a gradient may be.
        lengths: Rule of the step lengths; None: fixed at 1.
        adamw: Of the other parameters.
        inputs_only: No output columns are gathered: the factors of inputs alone, and fixed lengths.
        accumulate: Backward passes whose curvature a step takes.
        group: Process group of those who train the network; None: the default one, if there is one.

    Attributes:
        gathering: What gathers.
        averages: What averages.
        parameters: That are trained.
        untrained: The others.
        others: Parameters of AdamW, with the reason.
        steps: That were taken.
        left_out: Of these those whose gradient was not finite, on the device.
        roots: ``(Z Zᵀ)^{-1/2}``: what takes a direction from Z to its polar factor.
    """

    roots: Roots = staticmethod(inverse_roots)

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor],
        loss: NamedLoss | nn.Module | None,
        options: KroneckerCoordinates,
        momentum: Momentum,
        lengths: CurvatureLengths | None,
        adamw: AdamWPart,
        *,
        inputs_only: bool,
        accumulate: int = 1,
        group: Any = None,
    ) -> None:
        self.options, self.momentum = options, momentum
        self.inputs_only, self.adamw = inputs_only, adamw
        self.lengths = None if inputs_only else lengths
        self._asked = lengths
        self.fixed = 1.0 if lengths is None else FIXED
        given = list(parameters)
        trained = [p for p in given if p.requires_grad]
        self.untrained = [p for p in given if not p.requires_grad]
        matrices, self.others = divided(model, trained, options.averages.max_size)
        curvature: Curvature = "empirical" if inputs_only else options.curvature
        self.gathering: Gathering[Pending] | None = None
        self.averages: RunningAverages | None = None
        if matrices:
            averages = replace(options.averages, accumulate=accumulate)
            self.gathering = Gathering(
                model, matrices, curvature, loss, averages, tied=True, inputs_only=inputs_only, group=group
            )
            self.averages = RunningAverages(self.gathering, options.averages.decay, keep=self.lengths is not None)
        self.parameters = trained
        self.device = trained[0].device
        dtype = torch.promote_types(trained[0].dtype, torch.float32)
        self.dtype = dtype if self.gathering is None else self.gathering.dtype
        self.vector = AdamWVector([p for p in trained if p in self.others], self.dtype, adamw.betas, adamw.eps)
        self.steps = 0
        self.left_out = torch.zeros((), dtype=torch.int64, device=self.device)
        self._layers: SpectralLayers | None = None

    @property
    def updates(self) -> int:
        """Batches in the averages."""
        return 0 if self.averages is None else self.averages.updates

    def detach(self) -> None:
        """Remove all hooks from the network."""
        if self.gathering is not None:
            self.gathering.detach()

    @torch.no_grad()
    def move(self, gradients: dict[Tensor, Tensor], *, decayed: bool = False) -> Move:
        """What a step is; nothing is changed but averages.

        Args:
            gradients: Of the parameters that have one.
            decayed: Whether step lengths of single parameters are wanted, for weight decay.

        Raises:
            ClosureError: nothing was gathered yet.
            ModelError: the output or the loss cannot be treated.
        """
        found = Move()
        if self.averages is not None:
            assert self.gathering is not None
            self.averages.commit([gradients.get(p) for p in self.gathering.parameters])
            if not self.averages.updates:
                if not self.averages.unsound_start:
                    raise self.gathering.cause()
                self.averages.unsound_start = False
                self.left_out += 1
                return found
            if self._layers is None:
                self._layers = self._build()
        flat = self.vector.gradient([gradients.get(p) for p in self.vector.parameters])
        total, layers = flat.sum(), self._layers
        if layers is not None:
            torch._foreach_copy_(layers.slots, layers.filled(gradients))
            total = total + layers.gradient.sum()
        sound = total.isfinite()
        step = sound.to(self.dtype)
        usual = step * self.fixed
        if layers is not None:
            self._matrices(layers, gradients, step, found)
            usual = step * layers.usual
        if self.vector.parameters:
            direction, found.vector = self.vector.direction(flat, sound)
            parts = self.vector.views(direction * (usual * self.adamw.ratio))
            for p, part in zip(self.vector.parameters, parts, strict=True):
                if p in gradients:
                    found.parameters.append(p)
                    found.changes.append(part)
        if decayed:
            found.rates = self._rates(found.parameters, step, usual)
        found.sound = sound
        return found

    def _rates(self, parameters: Sequence[Tensor], step: Tensor, usual: Tensor) -> list[Tensor]:
        """Step lengths of parameters, for a learning rate of 1."""
        known = {} if self._layers is None else self._layers.rates(step)
        return [known.get(p, usual * self.adamw.ratio) for p in parameters]

    def _matrices(self, layers: SpectralLayers, gradients: dict[Tensor, Tensor], sound: Tensor, found: Move) -> None:
        """The part of the matrices."""
        assert self.averages is not None
        assert self.gathering is not None
        ranks = self.gathering.ranks
        first = self.steps == 0
        if first or due(self.steps, self.options.averages.inverse_every, OFTEN // 2):
            self.averages.check_alike()
            layers.refresh(self.gathering.ranks, first=first)
        factors = layers.factors
        # What is not finite must not get into products, also where these count for nothing.
        gradient = layers.gradient.nan_to_num_(0.0, 0.0, 0.0)
        if self.momentum.clip is not None:
            layers.clip(self.momentum.clip, self.steps, sound)
        if layers.coarse is not None:
            layers.coarse.compare(layers.momentum, gradient, sound)
        momentum = layers.momentum.lerp(gradient, (1 - self.momentum.decay) * sound)
        moved = factors.matrices(gradient.lerp_(momentum, self.momentum.decay))
        directions, scales = layers.directions_of(moved, self.roots, ranks)
        if layers.coarse is not None and self.averages.updated:
            steps = [d * scale[:, None, None] for d, scale in zip(directions, scales, strict=True)]
            self._measure(layers, layers.blocks(steps), layers.blocks(factors.matrices(momentum)), sound)
        for d, scale, length in zip(directions, scales, layers.lengths, strict=True):
            d *= (scale * (length * sound))[:, None, None]
        for p, part in factors.views(directions).items():
            if p in gradients:
                found.parameters.append(p)
                found.changes.append(part)
        found.momentum = momentum

    def _measure(self, layers: SpectralLayers, steps: list[Tensor], momenta: list[Tensor], sound: Tensor) -> None:
        """Lengths anew, at an update of the factors."""
        assert self.averages is not None
        assert self.gathering is not None
        assert self.gathering.structure is not None
        batches, self.averages.last = self.averages.last, []
        assert layers.coarse is not None
        assert self.lengths is not None
        blocks, called = self.gathering.blocks, self.gathering.structure.called
        parts = [changes_along(blocks, called, batch, steps) for batch, _ in batches]
        ranks = self.gathering.ranks
        if len(parts) > 1 or ranks.size > 1:
            parts = [part * share**0.5 for part, (_, share) in zip(parts, batches, strict=True)]
        changes = parts[0] if len(parts) == 1 else torch.cat([*parts, steps[0].new_zeros(0, len(steps))])
        slopes = torch.stack([(m * d).sum() for m, d in zip(momenta, steps, strict=True)])
        layers.coarse.update(changes, slopes, self.steps + 1, sound > 0, ranks)
        layers.set_lengths(self.lengths.share)

    def take(self, move: Move) -> Callable[[], None]:
        """Count a step, and let its momentum be the momentum; returns what undoes that."""
        layers, vector = self._layers, self.vector
        before = (self.steps, self.left_out, vector.moments, None if layers is None else layers.momentum)

        def undo() -> None:
            self.steps, self.left_out, vector.moments, momentum = before
            if layers is not None and momentum is not None:
                layers.momentum = momentum

        if move.sound is None:
            return undo
        self.steps, self.left_out = self.steps + 1, self.left_out + ~move.sound
        if move.vector is not None:
            vector.moments = move.vector
        if layers is not None and move.momentum is not None:
            layers.momentum = move.momentum
        return undo

    def go_on(self) -> None:
        """Gather in the next backward pass, if that is due."""
        every = self.options.averages.factor_every
        if self.gathering is not None and (self.gathering.active or due(self.steps, every, OFTEN)):
            self.gathering.start()

    def _build(self) -> SpectralLayers:
        """For the layers that were called; before the first batch for all, with nothing in them."""
        assert self.averages is not None
        assert self.gathering is not None
        factors, structure = self.averages.factors, self.gathering.structure
        if factors is None or structure is None:  # with a closure, which may come yet, there are outputs
            return self._blank(self.averages.blank_factors(), None, self._asked, outputs=True)
        return self._blank(factors, structure, self.lengths, outputs=not self.inputs_only)

    def _blank(
        self, factors: KroneckerAverages, structure: Structure | None, rule: CurvatureLengths | None, *, outputs: bool
    ) -> SpectralLayers:
        known = Structure.unconnected(len(factors.blocks)) if structure is None else structure
        distances = torch.from_numpy(known.inside).to(self.device, self.dtype)
        return SpectralLayers.blank(factors, distances, self.options, rule, outputs=outputs, fixed=self.fixed)

    @property
    def step_lengths(self) -> dict[str, float]:
        """Of each layer, by its name; empty before the first step. Waits for the device."""
        layers = self._layers
        if layers is None:
            return {}
        share = 1.0 if self.lengths is None else self.lengths.share
        known = [self.fixed] * len(layers.factors.blocks) if layers.coarse is None else layers.coarse.lengths.tolist()
        return {block.name: share * s for block, s in zip(layers.factors.blocks, known, strict=True)}

    def report(self, names: dict[Tensor, str]) -> dict[str, str]:
        """How each parameter is treated, by its name.

        Under ``"left out"`` what was not finite, under ``"bandwidth"`` an automatic one.
        """
        found = {names.get(p, "?"): f"AdamW: {why}" for p, why in self.others.items()}
        for block in () if self.gathering is None else self.gathering.blocks:
            g, o, a = block.shape
            text = f"spectral, {block.kind}: {a} ⊗ {o}" + (f", {g} groups" if g > 1 else "")
            found.update({names.get(p, "?"): text for p in block.parameters})
        coarse = None if self._layers is None else self._layers.coarse
        if coarse is not None and coarse.bandwidth == "auto":
            found["bandwidth"] = f"pairs of layers at most {float(coarse.radius):g} apart"
        for p in () if self._layers is None else self._uncalled(self._layers):
            found[names.get(p, "?")] = "not moved: its layer was not called at the first step"
        if int(self.left_out):
            found["left out"] = f"{int(self.left_out)} steps, whose gradients were not finite"
        return found

    def _uncalled(self, layers: SpectralLayers) -> list[Tensor]:
        assert self.gathering is not None
        return [p for p in self.gathering.parameters if p not in set(layers.parameters)]

    def state_of(self, p: Tensor) -> dict[str, Tensor]:
        """Momentum, or moments, of a parameter, as views; empty before the first step."""
        if p in self.others:
            return self.vector.state_of(p)
        momenta = {} if self._layers is None else self._layers.momenta
        return {"momentum_buffer": momenta[p]} if p in momenta else {}

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on beside :meth:`state_of`, as tensors and plain numbers."""
        state: dict[str, Any] = {
            "steps": self.steps, "left_out": self.left_out.clone(), "adamw_steps": self.vector.moments.steps.clone(),
            "gathering": None, "averages": None, "powers": [], "coarse": [], "norm": [],
        }  # fmt: skip
        if self.gathering is not None and self.averages is not None:
            state["gathering"], state["averages"] = self.gathering.state_dict(), self.averages.state_dict()
            layers = self._build() if self._layers is None else self._layers
            state.update({entry: [t.clone() for _, t in named] for entry, named in layers.saved.items()})
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], own: dict[Tensor, dict[str, Tensor]]) -> None:
        """Take up a state, of a network and arguments like these.

        Args:
            state: Of :meth:`state_dict`.
            own: Of :meth:`state_of`, by parameter.

        Raises:
            ValueError: the state is of another network, or incomplete; nothing has changed then.
        """
        check_entries("spectral engine", state, ENTRIES)
        if self.gathering is not None and self.averages is not None:
            self.gathering.check_state(state["gathering"])
            self._check_shapes(self.averages.check_state(state["averages"]), state)
            self.averages.load_state_dict(state["averages"])
            self.gathering.load_state_dict(state["gathering"])
        self.steps = int(state["steps"])
        self.left_out.fill_(state["left_out"])
        self.vector.load(state["adamw_steps"], own)
        self._layers = None
        if not self.updates:
            return
        self._layers = layers = self._build()
        for entry, named in layers.saved.items():
            for (_, tensor), saved in zip(named, state[entry], strict=True):
                tensor.copy_(saved)
        if self.lengths is not None:
            layers.set_lengths(self.lengths.share)
        for p, view in layers.momenta.items():
            if "momentum_buffer" in own.get(p, {}):
                fill(view, own[p]["momentum_buffer"])

    def _check_shapes(self, factors: KroneckerAverages | None, state: dict[str, Any]) -> None:
        """Raise a ValueError unless powers and curvature are those of the state's averages, if it has any."""
        if factors is None:
            return
        layers = self._blank(factors, None, self.lengths, outputs=not self.inputs_only)
        for entry, named in layers.saved.items():
            check_tensors(named, state[entry])
