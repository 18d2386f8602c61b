"""Conserved quantities during training: their drift, what it must be, and whether the two agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.conservation.drift_identity import DriftIdentity, Trained
from diagnostics.conservation.homogeneous_pairs import homogeneous_pairs
from diagnostics.conservation.quantity import ConservedQuantity
from diagnostics.errors import DiagnosticsError
from diagnostics.results.text_table import format_table

_ROUNDINGS = 16  # of ‖θ‖² a step, that the measured C and the recursion may differ by


@dataclass(frozen=True, eq=False)
class Drift:
    """One conserved quantity after some steps; tensors are float64, ``(channels,)``.

    Attributes:
        quantity: What it is.
        steps: Steps since the optimizer was attached.
        start: C(0).
        value: C(T), measured.
        predicted: C(T) by the recursion from gradients and momentum; None where none is known.
        gradient_sum: ``S = Σ_t (‖∇_consumers‖² − ‖∇_sources‖²)``; with a constant η and nothing else, the drift is η²S.
        exact: Whether ``predicted`` is an identity: the network is homogeneous there and the optimizer is SGD.
        reason: Why it is not; empty if it is.
        tolerance: The residual that rounding may cause.
    """

    quantity: ConservedQuantity
    steps: int
    start: Tensor
    value: Tensor
    predicted: Tensor | None
    gradient_sum: Tensor
    exact: bool
    reason: str
    tolerance: float

    @property
    def drift(self) -> Tensor:
        """``C(T) − C(0)`` of each channel."""
        return self.value - self.start

    @property
    def residual(self) -> Tensor | None:
        """Measured minus predicted, of each channel: the part of the drift that homogeneity does not explain."""
        return None if self.predicted is None else self.value - self.predicted

    @property
    def healthy(self) -> bool | None:
        """Whether the residual is within rounding; None where nothing is predicted."""
        return None if self.residual is None else bool(self.residual.abs().sum() <= self.tolerance)


@dataclass(frozen=True, eq=False, repr=False)
class ConservationReport:
    """All quantities after some steps; made by :meth:`ConservationMonitor.report`.

    Attributes:
        drifts: One for each, in topological order.
    """

    drifts: tuple[Drift, ...]

    def __getitem__(self, name: str) -> Drift:
        """The quantity of that name (``"0 → 2"``)."""
        for drift in self.drifts:
            if drift.quantity.name == name:
                return drift
        raise KeyError(f"no quantity {name!r}; there are {', '.join(repr(d.quantity.name) for d in self.drifts)}")

    @property
    def healthy(self) -> bool:
        """Whether every exact quantity drifted as the identity says."""
        return all(drift.healthy for drift in self.drifts if drift.exact)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sums over channels by name, ready for JSON."""
        return {
            d.quantity.name: {
                "kind": d.quantity.kind,
                "channels": d.quantity.channels,
                "steps": d.steps,
                "start": d.start.sum().item(),
                "drift": d.drift.sum().item(),
                "residual": None if d.residual is None else d.residual.sum().item(),
                "gradient_sum": d.gradient_sum.sum().item(),
                "exact": d.exact,
                "healthy": d.healthy,
                "reason": d.reason,
            }
            for d in self.drifts
        }

    def __str__(self) -> str:
        def row(d: Drift) -> list[str]:
            residual = "-" if d.residual is None else f"{d.residual.sum().item():.2g}"
            state = ("exact" if d.healthy else "EXACT, BUT BROKEN") if d.exact else "not exact"
            numbers = [f"{d.start.sum().item():.5g}", f"{d.drift.sum().item():.3g}", residual]
            return [d.quantity.name, d.quantity.kind, str(d.quantity.channels), *numbers, state]

        head = ["quantity", "kind", "channels", "C(0)", "drift", "residual", "identity"]
        table = format_table(head, [row(d) for d in self.drifts])
        notes = [f"{d.quantity.name}: {d.reason}" for d in self.drifts if d.reason]
        steps = max((d.steps for d in self.drifts), default=0)
        return "\n".join([f"conserved quantities after {steps} steps", table, *notes])

    __repr__ = __str__


class ConservationMonitor:
    """Follows the quantities that gradient flow conserves, and the exact amount by which SGD does not.

    :func:`diagnostics.conservation.homogeneous_pairs.homogeneous_pairs` finds them. For each, the drift after T steps
    of SGD is an identity in the gradients: ``C(T) − C(0) = η² Σ_t (‖∇_consumers‖² − ‖∇_sources‖²)``, with η_t² inside
    the sum where it varies, for full batches and mini-batches, gradient clipping by norm included. Momentum (heavy
    ball, dampened or Nesterov) and weight decay have recursions of their own:
    :class:`diagnostics.conservation.drift_identity.DriftIdentity`.

    The residual, measured drift minus identity, is a check on training: it is rounding unless something else moves
    the weights or bends the gradients: clipping by value, a penalty inside the loss, an activation that leaves its
    homogeneous range, an optimizer step with the wrong gradients. Where the identity does not hold (tanh, GELU, Adam)
    the report says so with the reason, and the drift is shown all the same.

    Training is left bit for bit as it is. A step costs a pass over gradients (and momentum buffers), without a
    synchronisation with the device.

    .. code-block:: python

        monitor = diagnostics.ConservationMonitor(model, inputs)
        detach = monitor.attach(optimizer)  # then train
        print(monitor.report())

    Args:
        model: The network, in the mode in which it is trained.
        inputs: A batch of inputs on which homogeneity is tested, as in :func:`diagnostics.capture`.
        optimizer: What trains it, if :meth:`step` is called by hand.
        decoupled_weight_decay: λ, where the training loop itself multiplies all parameters by ``1 − ηλ``, between
            the backward pass and the step of an optimizer without weight decay.

    Attributes:
        quantities: The :class:`diagnostics.conservation.quantity.ConservedQuantity` that were found, exact or not.

    Raises:
        CaptureError: As in :func:`diagnostics.capture`.
        DiagnosticsError: No layer reads another one's output; the optimizer has other parameters.

    Source: arXiv 2604.07405, which has the identity for plain gradient descent without biases.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        decoupled_weight_decay: float = 0.0,
    ) -> None:
        if not decoupled_weight_decay >= 0:
            raise ValueError(f"decoupled_weight_decay must be at least 0, got {decoupled_weight_decay}.")
        self.quantities = homogeneous_pairs(model, inputs)
        if not self.quantities:
            raise DiagnosticsError(
                f"no two layers of {type(model).__name__} follow each other: there is nothing that may be conserved. "
                "Layers are nn.Linear, convolutions, nn.Embedding and affine normalisations with parameters of their "
                "own (no parametrizations)."
            )
        self._decay = decoupled_weight_decay
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._trained: Trained | None = None
        self._identities: list[DriftIdentity] = []
        self._broken: dict[str, str] = {}
        if optimizer is not None:
            self._start(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Start now, and take up every step of ``optimizer``; returns the function that ends it."""
        self._start(optimizer)
        return optimizer.register_step_post_hook(lambda *_: self.step()).remove

    def step(self) -> None:
        """Take up a step: call after ``optimizer.step()``, before the gradients or the learning rate change.

        Raises:
            DiagnosticsError: no optimizer was given; no parameter has a gradient, or only some of a quantity have.
        """
        trained = self._trained
        if trained is None:
            raise DiagnosticsError("pass the optimizer: ConservationMonitor(model, inputs, optimizer), or attach it.")
        stepped = False
        for identity in self._identities:
            gradients = trained.gradients(identity.quantity)
            if gradients is None:
                continue  # SGD leaves parameters without a gradient alone
            stepped = True
            broken = trained.obstacle(identity.quantity, self._decay)
            if broken:
                self._broken.setdefault(identity.quantity.name, broken)
            if identity.quantity.name in self._broken:
                identity.watch(gradients)
            else:
                rule = trained.rule(identity.quantity, self._decay)
                identity.advance(rule, gradients, trained.buffers(identity.quantity))
        if not stepped:
            raise DiagnosticsError(
                "no parameter has a gradient: call step() after optimizer.step() and before optimizer.zero_grad()."
            )

    def report(self) -> ConservationReport:
        """Drift, identity and residual of every quantity, now.

        Raises:
            DiagnosticsError: no optimizer was given.
        """
        if self._trained is None:
            raise DiagnosticsError("nothing was followed yet: attach(optimizer) before training.")
        return ConservationReport(tuple(self._drift(identity) for identity in self._identities))

    def _start(self, optimizer: torch.optim.Optimizer) -> None:
        trained = Trained(optimizer, self._parameters, self.quantities)
        obstacles = {q.name: trained.obstacle(q, self._decay) for q in self.quantities}
        self._broken = {name: reason for name, reason in obstacles.items() if reason}
        self._identities = [DriftIdentity(q, self._parameters, trained.buffers(q)) for q in self.quantities]
        self._trained = trained

    def _drift(self, identity: DriftIdentity) -> Drift:
        quantity = identity.quantity
        broken = self._broken.get(quantity.name, "")
        dtype = self._parameters[quantity.terms[0][0].name].dtype
        return Drift(
            quantity=quantity,
            steps=identity.steps,
            start=identity.start.clone(),
            value=identity.value(),
            predicted=None if broken else identity.predicted.clone(),
            gradient_sum=identity.gradient_sum.clone(),
            exact=quantity.exact and not broken,
            reason="; ".join(reason for reason in (quantity.reason, broken) if reason),
            tolerance=_ROUNDINGS * torch.finfo(dtype).eps * (identity.steps + 1) * identity.scale(),
        )
