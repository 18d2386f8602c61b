"""Muon and what is built on it: NorMuon, Mousse, Newton-Muon.

All treat a weight as a matrix, a convolution's filters as its rows; give steps the root mean square of AdamW's, so that
one learning rate serves the matrices and the AdamW part; and leave embeddings, the first and the last module with
parameters to AdamW, as Muon's author advises. Weight decay is decoupled, of all parameters, and none
unless a study sets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.shared.task import Task
from examples.studies.ablation.contender import GradientStep, NotApplicable, Stepper, split_parameters

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Muon's quintic Newton-Schulz iteration (Jordan et al., 2024)."""


def muon(task: Task, *, lr: float = 1e-3, weight_decay: float = 0.0, schedule: str = "constant") -> Stepper:
    """``torch.optim.Muon``."""
    matrices, rest = hidden_and_rest(task)
    views = [nn.Parameter(p.detach().flatten(1)) for p in matrices]  # it takes matrices only
    optimizer = torch.optim.Muon(views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def hand_over(*_: object) -> None:
        for view, p in zip(views, matrices, strict=True):
            view.grad = None if p.grad is None else p.grad.flatten(1)

    optimizer.register_step_pre_hook(hand_over)
    return _with_adamw(task, optimizer, rest, lr, schedule, weight_decay)


def normuon(task: Task, *, lr: float = 1e-3, schedule: str = "constant") -> Stepper:
    """NorMuon (arXiv 2510.05491, algorithm 1): rows of Muon's step divided by the root of their running mean square."""
    from pytorch_optimizer import NorMuon

    matrices, rest = hidden_and_rest(task)
    optimizer = NorMuon([{"params": matrices, "use_muon": True}], lr=lr, update_scale="match_rms")
    return _with_adamw(task, optimizer, rest, lr, schedule)


def mousse(
    task: Task,
    *,
    lr: float = 1e-3,
    alpha: float = 0.125,
    every: int = 10,
    weight_decay: float = 0.0,
    schedule: str = "constant",
) -> Stepper:
    """Mousse (arXiv 2603.09697)."""
    matrices, rest = hidden_and_rest(task)
    optimizer = Mousse(matrices, lr, alpha=alpha, every=every, weight_decay=weight_decay)
    return _with_adamw(task, optimizer, rest, lr, schedule, weight_decay)


def newton_muon(
    task: Task, *, lr: float = 1e-3, ridge: float = 0.2, every: int = 32, schedule: str = "constant"
) -> Stepper:
    """Newton-Muon (arXiv 2604.01472), its ridge and its intervals those of the published code."""
    matrices, rest = hidden_and_rest(task)
    optimizer = NewtonMuon(matrices, lr, ridge=ridge, every=every)
    optimizer.watch(task.model)
    return _with_adamw(task, optimizer, rest, lr, schedule)


def hidden_and_rest(task: Task) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of the hidden layers, and all other trained parameters."""
    owners = [module for module in task.model.modules() if any(True for _ in module.parameters(recurse=False))]

    def hidden(module: nn.Module, name: str, p: nn.Parameter) -> bool:
        outer = module is owners[0] or module is owners[-1] or isinstance(module, nn.Embedding)
        return p.ndim >= 2 and not outer

    matrices, rest = split_parameters(task.model, hidden)
    if not matrices:
        raise NotApplicable("the network has no hidden matrices")
    return matrices, rest


def _with_adamw(
    task: Task,
    optimizer: torch.optim.Optimizer,
    rest: Sequence[nn.Parameter],
    lr: float,
    schedule: str,
    weight_decay: float = 0.0,
) -> Stepper:
    others = [torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)] if rest else []
    return GradientStep(task, optimizer, *others, schedule=schedule)


class _Polar(torch.optim.Optimizer):
    """Nesterov's momentum, and a step of the length of Muon's along :meth:`_direction`."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        every: int,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.momentum, self.every, self.steps = momentum, every, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = self._gradient(p, p.grad.flatten(1))
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(gradient))
                buffer.mul_(self.momentum).add_(gradient)
                step = self._direction(p, gradient, gradient + self.momentum * buffer)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(step.view_as(p), alpha=group["lr"] * 0.2 * math.sqrt(max(gradient.shape)))
        self.steps += 1

    def _gradient(self, p: Tensor, g: Tensor) -> Tensor:
        return g

    def _direction(self, p: Tensor, g: Tensor, momentum: Tensor) -> Tensor:
        return orthogonalized(momentum)


class Mousse(_Polar):
    """Muon in coordinates of Shampoo's factors.

    ``L`` and ``R`` are running means of ``G Gᵀ`` and ``Gᵀ G``, scaled to the trace of the identity;
    ``D = L^-α polar(L^-α M R^-α) R^-α``, with the Frobenius norm of the polar factor. Powers are renewed every
    ``every`` steps.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        *,
        alpha: float = 0.125,
        every: int = 10,
        decay: float = 0.95,
        eps: float = 1e-5,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, every=every, weight_decay=weight_decay)
        self.alpha, self.decay, self.eps = alpha, decay, eps

    def _direction(self, p: Tensor, g: Tensor, momentum: Tensor) -> Tensor:
        state = self.state[p]
        for name, new in (("left", g @ g.T), ("right", g.T @ g)):
            state.setdefault(name, torch.zeros_like(new)).lerp_(new, 1 - self.decay)
            if self.steps % self.every == 0:
                state[f"{name}_power"] = self._power(state[name])
        left, right = state["left_power"], state["right_power"]
        polar = orthogonalized(left @ momentum @ right)
        found: Tensor = left @ polar @ right
        found *= polar.norm() / found.norm().clamp_min(1e-12)
        return found

    def _power(self, factor: Tensor) -> Tensor:
        scaled = factor * (len(factor) / factor.trace().clamp_min(1e-30))  # takes the bias of the mean away, too
        values, vectors = torch.linalg.eigh(scaled)
        power: Tensor = vectors * (values.clamp_min(0) + self.eps).pow(-self.alpha) @ vectors.T
        return power


class NewtonMuon(_Polar):
    """Muon of the gradient times the inverse second moment of the layer's inputs, ``G (K + ρ (tr K/n) I)⁻¹``.

    ``K`` is a running mean over the batches whose step renews the inverse, every ``every`` steps and at the first one.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, *, ridge: float = 0.2, every: int = 32, decay: float = 0.95
    ) -> None:
        super().__init__(params, lr, every=every)
        self.ridge, self.decay = ridge, decay
        self._inputs: dict[Tensor, Tensor] = {}

    def watch(self, model: nn.Module) -> None:
        """See the inputs of linear layers and convolutions."""
        own = {p for group in self.param_groups for p in group["params"]}
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.weight in own:
                module.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled() or self.steps % self.every:
            return
        x = inputs[0].detach()
        if isinstance(module, nn.Conv2d):
            if module.groups > 1 or not isinstance(module.padding, tuple):
                return
            x = torch.nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
        x = x.reshape(-1, x.shape[-1])
        seen = self._inputs.get(module.weight)
        moment = x.T @ x / len(x)
        self._inputs[module.weight] = moment if seen is None else seen + moment

    def _gradient(self, p: Tensor, g: Tensor) -> Tensor:
        state, moment = self.state[p], self._inputs.pop(p, None)
        if moment is not None:
            known = state.setdefault("second_moment", moment.clone()).lerp_(moment, 1 - self.decay)
            eye = torch.eye(len(known), dtype=known.dtype, device=known.device)
            damped = known + (self.ridge * known.trace() / len(known) + 1e-8) * eye
            state["inverse"] = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        if "inverse" not in state:  # a matrix that is no layer's weight: Muon
            return g
        scaled: Tensor = g @ state["inverse"]
        return scaled


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About the polar factor, by Muon's Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-30)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.mT if matrix.shape[0] > matrix.shape[1] else x
    return found
