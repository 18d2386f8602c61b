"""What SGD does to a quadratic form of the parameters whose gradient part vanishes: exact recursions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.conservation.quantity import ConservedQuantity
from diagnostics.errors import DiagnosticsError


@dataclass(frozen=True)
class SGDRule:
    """The numbers of a ``torch.optim.SGD`` step, the same for all parameters of a quantity.

    Attributes:
        lr: Step size η.
        momentum: μ.
        dampening: τ: the buffer takes up ``(1 − τ) g``, but for the first.
        weight_decay: λ of ``g + λθ``.
        nesterov: Step along ``g + λθ + μ m`` instead of the buffer m.
        shrink: Factor on the parameters outside of the optimizer, ``1 − ηλ'`` for decoupled decay.
    """

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    shrink: float = 1.0

    @classmethod
    def of(cls, group: Mapping[str, Any], decoupled_weight_decay: float = 0.0) -> SGDRule:
        """The rule of a parameter group, as it is now."""
        lr = float(group["lr"])
        return cls(
            lr,
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            1 - lr * decoupled_weight_decay,
        )


class DriftIdentity:
    """Follows ``C = θᵀ S θ`` through training by gradients and momentum alone, for S with ``θᵀ S ∇L = 0``.

    With the step ``θ⁺ = sθ − ηd``, ``C⁺ = s²C − 2ηs θᵀSd + η² dᵀSd``. Nothing but ``θᵀSd`` needs θ, and

    - SGD: ``d = g + λθ``, so ``θᵀSd = λC``: ``C⁺ = (1 − ηλ)² C + η² gᵀSg`` (s = 1), the same for decoupled decay;
    - heavy ball: ``d = m = μm₋ + (1 − τ)(g + λθ)``, so ``p = θᵀSm = μr + (1 − τ)λC``, and ``r⁺ = θ⁺ᵀSm = sp − η mᵀSm``;
    - Nesterov: ``d = g + λθ + μm``, so ``θᵀSd = λC + μp``, and ``r⁺ = sp − η dᵀSm``.

    Learning rates, momentum and decay may change between steps. ``gᵀSg`` and ``mᵀSm`` are measured; ``predicted``
    is what follows from them, and differs from the measured C by rounding, unless ``θᵀS∇L`` was not zero or the
    parameters were changed otherwise.

    Args:
        quantity: The form S.
        parameters: The model's parameters by name.
        buffers: Momentum buffers by name, of training that began before; else empty.

    Attributes:
        start: C at the start, ``(channels,)``.
        predicted: C by the recursion, ``(channels,)``.
        gradient_sum: ``Σ_t g_tᵀ S g_t``, the paper's S, ``(channels,)``.
        steps: Steps taken.
    """

    def __init__(
        self, quantity: ConservedQuantity, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> None:
        self.quantity = quantity
        self._parameters = {slices.name: parameters[slices.name] for slices, _ in quantity.terms}
        self.start = self.value()
        self.predicted = self.start.clone()
        self.gradient_sum = torch.zeros_like(self.start)
        self.steps = 0
        self._begun = buffers.keys() >= self._parameters.keys()
        self._r = self._form(self._parameters, buffers) if self._begun else torch.zeros_like(self.start)

    @torch.no_grad()
    def value(self) -> Tensor:
        """C now, in float64, ``(channels,)``."""
        exact = {name: p.double() for name, p in self._parameters.items()}  # a small difference of large norms
        return self._form(exact, exact)

    def scale(self) -> float:
        """``‖θ‖²`` of the parameters of the form: what rounding errors of C are relative to."""
        return sum(p.detach().double().square().sum().item() for p in self._parameters.values())

    @torch.no_grad()
    def advance(self, rule: SGDRule, gradients: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Take up one step.

        Args:
            rule: Its numbers.
            gradients: What the step was made with, before weight decay.
            buffers: Momentum buffers *after* the step; none where there never was momentum.
        """
        eta, mu, lam, s, c = rule.lr, rule.momentum, rule.weight_decay, rule.shrink, self.predicted
        square = self._form(gradients, gradients)
        self.gradient_sum += square
        self.steps += 1
        with_decay = square + lam**2 * c  # (g + λθ)ᵀS(g + λθ)
        if mu == 0:
            along, length = lam * c, with_decay
            if self._begun:  # the buffer of steps before stays as it is
                self._r = s * self._r - eta * (self._form(gradients, buffers) + lam * self._r)
        else:
            p = mu * self._r + (1 - rule.dampening) * lam * c if self._begun else lam * c
            m_square = self._form(buffers, buffers)
            along, length, beside = p, m_square, m_square
            if rule.nesterov:
                gm = self._form(gradients, buffers) + lam * p
                along, length = lam * c + mu * p, with_decay + 2 * mu * gm + mu**2 * m_square
                beside = gm + mu * m_square
            self._r, self._begun = s * p - eta * beside, True
        self.predicted = s**2 * c - 2 * eta * s * along + eta**2 * length

    @torch.no_grad()
    def watch(self, gradients: Mapping[str, Tensor]) -> None:
        """Take up the gradients of a step that no recursion is known for."""
        self.gradient_sum += self._form(gradients, gradients)
        self.steps += 1

    def _form(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
        return self.quantity.form(left, right).detach()


class Trained:
    """The parameters of quantities in an optimizer: their groups, gradients and momentum buffers.

    Args:
        optimizer: Any optimizer.
        parameters: The model's parameters by name.
        quantities: What is followed.

    Raises:
        DiagnosticsError: the optimizer has none of the parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, Tensor],
        quantities: Iterable[ConservedQuantity],
    ) -> None:
        self.optimizer = optimizer
        names = {parameter: name for name, parameter in parameters.items()}
        self._groups = {names[p]: group for group in optimizer.param_groups for p in group["params"] if p in names}
        self._parameters = parameters
        wanted = {slices.name for quantity in quantities for slices, _ in quantity.terms}
        if wanted and not wanted & self._groups.keys():
            raise DiagnosticsError(
                f"the {type(optimizer).__name__} has none of the model's parameters: make it from model.parameters() "
                "of the same model."
            )

    def obstacle(self, quantity: ConservedQuantity, decoupled_weight_decay: float = 0.0) -> str:
        """Why the optimizer's steps do not follow the recursions, for these parameters; empty where they do."""
        kind = type(self.optimizer)
        if kind is not torch.optim.SGD:
            return (
                f"{kind.__name__} does not step along a sum of past gradients with one factor for all entries, so "
                "θᵀSΔθ is not zero"
            )
        names = [slices.name for slices, _ in quantity.terms]
        missing = [name for name in names if name not in self._groups]
        if missing:
            return f"parameter {missing[0]!r} is not in the optimizer"
        rules = {name: SGDRule.of(self._groups[name], decoupled_weight_decay) for name in names}
        first = rules[names[0]]
        for name, rule in rules.items():
            if rule != first:
                return f"{names[0]!r} and {name!r} are in groups with different settings ({first} and {rule})"
        if first.weight_decay and first.shrink != 1:
            return "the optimizer has a weight decay of its own beside the decoupled one"
        return ""

    def rule(self, quantity: ConservedQuantity, decoupled_weight_decay: float = 0.0) -> SGDRule:
        """The rule for a quantity without obstacles."""
        return SGDRule.of(self._groups[quantity.terms[0][0].name], decoupled_weight_decay)

    def gradients(self, quantity: ConservedQuantity) -> dict[str, Tensor] | None:
        """The gradients by parameter; None where no parameter has one.

        Raises:
            DiagnosticsError: some have one and some have none.
        """
        found = {slices.name: self._parameters[slices.name].grad for slices, _ in quantity.terms}
        present = {name: g.to_dense() if g.is_sparse else g for name, g in found.items() if g is not None}
        if not present:
            return None
        if len(present) < len(found):
            missing = next(name for name in found if name not in present)
            raise DiagnosticsError(
                f"parameter {missing!r} has no gradient, but others of {quantity.name!r} have: does the loss use all "
                "of them?"
            )
        return present

    def buffers(self, quantity: ConservedQuantity) -> dict[str, Tensor]:
        """The momentum buffers that there are, by parameter."""
        states = {s.name: self.optimizer.state.get(self._parameters[s.name], {}) for s, _ in quantity.terms}
        found = {name: state.get("momentum_buffer") for name, state in states.items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}
