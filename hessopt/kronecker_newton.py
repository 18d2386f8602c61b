"""The update rule around :class:`hessopt.kronecker_band.KroneckerBand`: trust region, momentum, decay, adaptation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.cliques import Bandwidth
from hessopt.errors import ClosureError
from hessopt.kronecker_band import Direction, KroneckerBand


class KroneckerNewton(Optimizer):
    r"""Mini-batch Newton method with tapered Kronecker curvature.

    .. math::
       \begin{aligned}
            &d \leftarrow P^{-1} g, \quad \sigma \leftarrow \min\big(1, \sqrt{\Delta / (\gamma^2 g^\top d)}\big)  \\
            &m \leftarrow \mu m + \sigma d, \quad \theta \leftarrow (1 - \gamma \omega) \theta - \gamma m
       \end{aligned}

    P is damped, :math:`g^\top d = d^\top P d`, so σ bounds the model's measure of a step without momentum by Δ.

    Args:
        model: The network.
        lr: γ.
        bandwidth: k, see :class:`hessopt.kronecker_band.KroneckerBand`, as are further arguments.
        momentum: μ.
        trust: Δ, in units of the engine's ``scale``, or None.
        weight_decay: ω, decoupled.
        graft: ``"sgd"``: each parameter's step gets the norm of its gradient.
        adapt_every: Steps between adaptations of λ by the reduction ratio, with a closure; None: λ is constant.
        adapt_rate: Factor on λ in each of these steps; to the power ``adapt_every``.
        maximize: Maximize the loss.
        **engine: Further arguments of the engine.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.5,
        bandwidth: Bandwidth = 0,
        *,
        momentum: float = 0.9,
        trust: float | None = 2e-4,
        weight_decay: float = 0.0,
        graft: Literal["sgd"] | None = None,
        adapt_every: int | None = None,
        adapt_rate: float = 0.95,
        maximize: bool = False,
        **engine: Any,
    ) -> None:
        for name, value, bound in (("lr", lr, None), ("weight_decay", weight_decay, None), ("momentum", momentum, 1.0)):
            if not 0 <= value < (float("inf") if bound is None else bound):
                raise ValueError(f"{name} must be at least 0{'' if bound is None else ' and below 1'}, got {value!r}.")
        if trust is not None and not trust > 0:
            raise ValueError(f"trust must be positive, or None for no trust region, got {trust!r}.")
        if graft not in (None, "sgd"):
            raise ValueError(f'graft must be "sgd" or None, got {graft!r}.')
        if adapt_every is not None and adapt_every < 1:
            raise ValueError(f"adapt_every must be at least 1, got {adapt_every!r}.")
        self.trust, self.graft, self.adapt_every, self.adapt_rate = trust, graft, adapt_every, adapt_rate
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__((p for p in model.parameters() if p.requires_grad), defaults)
        self.band = KroneckerBand(model, self._all(), bandwidth, **engine)

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Calls ``zero_grad`` and ``backward`` and returns the loss; or returns ``(loss, output)``, and does
                not call ``backward``. Not needed with a declared loss or the empirical Fisher matrix.
        """
        loss = None if closure is None else self._evaluate(closure)
        group = self.param_groups[0]
        parameters = self._all()
        gradients = [p.grad for p in parameters]
        if group["maximize"]:
            gradients = [None if g is None else -g for g in gradients]
        direction = self.band.direction(gradients)
        steps = self._scaled(direction, gradients, max(group["lr"] for group in self.param_groups))
        adapt = self.adapt_every is not None and closure is not None and self.band.steps % self.adapt_every == 0
        before = [p.clone() for p in parameters] if adapt else []
        self._move(parameters, steps)
        if adapt:
            assert closure is not None
            assert loss is not None
            self._adapt(closure, loss, parameters, before, gradients)
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Tensor:
        with torch.enable_grad():
            result = closure()
            if isinstance(result, tuple):
                loss, output = result
                self.band.gather(loss, output)
                self.zero_grad()
                loss.backward()
            else:
                loss = result
        if not isinstance(loss, Tensor):
            raise ClosureError("the closure must return the loss, or (loss, output), as tensors.")
        return loss.detach()

    def _scaled(self, direction: Direction, gradients: list[Tensor | None], lr: float) -> list[Tensor]:
        steps = direction.steps
        if self.trust is not None and lr > 0:
            tiny = torch.finfo(direction.decrement.dtype).tiny
            scale = (self.trust * self.band.scale / (lr**2 * direction.decrement).clamp_min(tiny)).sqrt().clamp_max(1.0)
            torch._foreach_mul_(direction.flat, scale)
        if self.graft == "sgd":
            norms = torch._foreach_norm(steps)
            slopes = [torch.zeros_like(n) if g is None else g.norm() for n, g in zip(norms, gradients, strict=True)]
            tiny = torch.finfo(norms[0].dtype).tiny
            steps = [s * (g / n.clamp_min(tiny)) for s, g, n in zip(steps, slopes, norms, strict=True)]
        return steps

    def _move(self, parameters: list[Tensor], steps: list[Tensor]) -> None:
        start = 0
        for group in self.param_groups:
            own, count = group["params"], len(group["params"])
            part = steps[start : start + count]
            start += count
            lr, decay = group["lr"], group["weight_decay"]
            if decay:
                torch._foreach_mul_(own, 1 - lr * decay)
            if group["momentum"]:
                buffers = []
                for p, s in zip(own, part, strict=True):
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p, dtype=s.dtype)
                    buffers.append(state["momentum"])
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, part)
                part = buffers
            torch._foreach_add_(own, part, alpha=-lr)

    def _adapt(
        self,
        closure: Callable[[], Any],
        loss: Tensor,
        parameters: list[Tensor],
        before: list[Tensor],
        gradients: list[Tensor | None],
    ) -> None:
        """Levenberg-Marquardt: λ follows the ratio of actual to predicted change of the loss (Martens and Grosse)."""
        kept = [None if p.grad is None else p.grad.clone() for p in parameters]
        change = [p - b for p, b in zip(parameters, before, strict=True)]
        slope = sum((g * c).sum() for g, c in zip(gradients, change, strict=True) if g is not None)
        predicted = slope + self.band.quadratic(change) / 2
        active, self.band._recorder.active = self.band._recorder.active, False
        result = torch.enable_grad()(closure)()
        self.band._recorder.active = active
        after = result[0] if isinstance(result, tuple) else result
        actual = (after.detach() - loss) * (-1 if self.param_groups[0]["maximize"] else 1)
        ratio = float(actual / predicted) if predicted < 0 else 0.0
        assert self.adapt_every is not None
        factor = self.adapt_rate**self.adapt_every
        if ratio > 0.75:
            self.band.damping *= factor
        elif not ratio >= 0.25:
            self.band.damping /= factor
        for p, g in zip(parameters, kept, strict=True):
            p.grad = g

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim, and the engine's state."""
        return {**super().state_dict(), "band": self.band.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, and the engine's state."""
        own = dict(state_dict)
        band = own.pop("band")
        super().load_state_dict(own)
        self.band.load_state_dict(band)
