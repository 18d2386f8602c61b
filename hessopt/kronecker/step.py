"""The update rule around :class:`hessopt.kronecker.band.KroneckerBand`: trust region, momentum, decay, adaptation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diagnostics.ranks.spread import is_distributed, local
from hessopt.averages.evaluation import evaluate
from hessopt.averages.gathering import Curvature
from hessopt.averages.options import KroneckerAveraging, NamedLoss
from hessopt.averages.recorder import check_strided
from hessopt.averages.sharded import part_of, whole
from hessopt.closure.loss_curvature import LOSSES
from hessopt.closure.protocol import Closure
from hessopt.closure.runner import ClosureRunner
from hessopt.errors import ClosureError
from hessopt.kronecker.band import KroneckerBand
from hessopt.kronecker.bandwidth import KroneckerBandwidth
from hessopt.kronecker.damped_inverse import Direction
from hessopt.network.cliques import Bandwidth
from hessopt.network.processes import agreed
from hessopt.network.saved_state import Group, Groups
from hessopt.search.rules import KroneckerDamping


@dataclass
class _Changes:
    """What a step is going to write.

    Attributes:
        momentum: Of all parameters that have one.
        parameters: Those that move, as far as this process has them.
        change: What is added to them, in their dtype.
    """

    momentum: dict[Tensor, Tensor]
    parameters: list[Tensor] = field(default_factory=list)
    change: list[Tensor] = field(default_factory=list)


class KroneckerStep:
    r"""Mini-batch Newton steps with tapered Kronecker curvature P.

    .. math::
       \begin{aligned}
            &d \leftarrow P^{-1} g, \quad \sigma \leftarrow \min\big(1, \sqrt{\Delta / g^\top d}\big)  \\
            &m \leftarrow \mu m + \sigma d, \quad \theta \leftarrow (1 - \gamma \omega) \theta - \gamma m
       \end{aligned}

    P is damped and :math:`g^\top d = d^\top P d`, so σ bounds the model's measure of what enters the momentum by Δ. The
    learning rate is not in it: a schedule that lowers γ shortens the steps, also those at the bound. As in
    :mod:`torch.optim`, a parameter whose gradient is None stays as it is.

    Args:
        model: The network.
        groups: Param groups with ``lr`` (γ), ``weight_decay`` (ω), ``momentum`` (μ) and ``maximize``.
        bandwidth: k, ``"full"`` or what chooses it.
        curvature: ``"fisher"``, ``"ggn"`` or ``"empirical"``.
        loss: What is declared of it: by name, the module that computes it, or None.
        damping: λ.
        trust: Δ; None for no bound; ``"graft"``: each parameter's step gets the norm of its gradient.
        averages: Options of the averages.
        group: Process group of those who train the network; None: the default one, if there is one.

    Attributes:
        band: The engine.
        gradient_norm: ‖g‖ of all parameters together, before the last step, if it had a closure.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        bandwidth: Bandwidth | KroneckerBandwidth,
        curvature: Curvature,
        loss: NamedLoss | nn.Module | None,
        damping: KroneckerDamping,
        trust: float | Literal["graft"] | None,
        averages: KroneckerAveraging,
        group: Any = None,
    ) -> None:
        self.group = group
        self.model, self.bandwidth, self.curvature, self.loss = model, bandwidth, curvature, loss
        self.damping, self.trust, self.averages = damping, trust, averages
        self.choice = bandwidth if isinstance(bandwidth, KroneckerBandwidth) else None
        self.momentum: dict[Tensor, Tensor] = {}
        self.gradient_norm: float | None = None
        self.band = self._engine(groups)

    def _engine(self, groups: Groups) -> KroneckerBand:
        bandwidth = 0 if isinstance(self.bandwidth, KroneckerBandwidth) else self.bandwidth
        band = KroneckerBand(
            self.model, _all(groups), bandwidth, self.curvature, self.damping, self.loss, self.averages, self.group
        )
        band.seeds.sign = -1 if groups[0]["maximize"] else 1
        return band

    def restart(self, groups: Groups) -> None:
        """Gather curvature anew, for other parameters."""
        self.band.detach()
        self.band = self._engine(groups)

    @torch.no_grad()
    def step(
        self,
        groups: Groups,
        closure: Closure | None,
        check: Callable[[Sequence[Tensor | None], int], None] = lambda gradients, steps: None,
    ) -> Tensor | None:
        """Take one step; returns the loss before it, if there is a closure.

        Args:
            groups: Param groups.
            closure: Evaluates the loss, or None.
            check: Called with the gradients and the number of steps that were taken, before anything is changed.

        Raises:
            ClosureError: a closure is needed, or does not give a finite, differentiable loss; or the network was not
                called since the last step.
            ModelError: a gradient is sparse, or the output or the loss cannot be treated.
        """
        known = set(self.band.parameters)
        added = any(p.requires_grad and p not in known for p in _all(groups))
        if closure is None and self.loss is None and self.curvature != "empirical":
            raise ClosureError(
                "KroneckerNewton.step() needs the loss, for its curvature. Declare it, "
                f"`loss={' | '.join(map(repr, LOSSES))}` or the loss module itself, use `curvature='empirical'`, or "
                "pass a closure, `optimizer.step(lambda: loss_fn(model(x), y))`."
            )
        if closure is None and self.damping.adapt_every is not None:
            raise ClosureError(
                "KroneckerDamping(adapt_every=…) adapts the damping by further evaluations of the closure: pass one, "
                "`optimizer.step(lambda: loss_fn(model(x), y))`."
            )
        if closure is not None and added:
            self.restart(groups)
        runner, loss, norm = None, None, None
        gradients: list[Tensor | None] = [p.grad for p in self.band.parameters]
        sign = self.band.seeds.sign = -1 if groups[0]["maximize"] else 1
        if closure is not None:
            found = evaluate(
                self.band.gathering, self.band.gathering.ranks, self.model, closure, _all(groups), self.band.parameters
            )
            runner, loss, gradients, norm = found.runner, found.loss, found.gradients, found.norm
        else:
            check_strided(gradients)
            gradients = [None if g is None else whole(g) for g in gradients]
        check(gradients, self.band.steps)
        if sign < 0:
            gradients = [None if g is None else -g for g in gradients]
        self._move(groups, gradients, runner, loss)
        self.gradient_norm = norm
        if added and closure is None:
            self.restart(groups)  # the parameters that were added are trained from the next step on
        return loss

    def _move(
        self, groups: Groups, gradients: list[Tensor | None], runner: ClosureRunner | None, loss: Tensor | None
    ) -> None:
        parameters = self.band.parameters
        self.band.commit(gradients)
        if self.choice is not None:
            self.choice.watch(self.band, gradients)
        direction = self.band.direction(gradients)
        steps = self._scaled(direction, gradients)
        every = self.damping.adapt_every
        adapt = every is not None and runner is not None and self.band.steps % every == 0
        before = [whole(p).clone() for p in parameters] if adapt else []
        moving = {p: s for p, s, g in zip(parameters, steps, gradients, strict=True) if g is not None}
        new = _Changes(dict(self.momentum))
        for group in groups:
            self._add_changes(group, moving, direction.sound, new)
        self._write(new)
        if adapt:
            assert runner is not None
            assert loss is not None
            self._adapt(
                runner, loss, [whole(p) - b for p, b in zip(parameters, before, strict=True)], gradients, groups
            )

    def _scaled(self, direction: Direction, gradients: list[Tensor | None]) -> list[Tensor]:
        steps = direction.steps
        if isinstance(self.trust, float | int):
            tiny = torch.finfo(direction.decrement.dtype).tiny
            scale = (self.trust * self.band.scale / direction.decrement.clamp_min(tiny)).sqrt().clamp_max(1.0)
            torch._foreach_mul_(direction.flat, scale)
        elif self.trust == "graft":
            norms = torch._foreach_norm(steps)
            slopes = [torch.zeros_like(n) if g is None else g.norm() for n, g in zip(norms, gradients, strict=True)]
            tiny = torch.finfo(norms[0].dtype).tiny
            steps = [s * (g / n.clamp_min(tiny)) for s, g, n in zip(steps, slopes, norms, strict=True)]
        return steps

    def _add_changes(self, group: Group, steps: dict[Tensor, Tensor], sound: Tensor, new: _Changes) -> None:
        """Work out what a group's parameters and momentum become. Nothing does, where steps were not finite."""
        own = [p for p in group["params"] if p in steps]
        if not own:
            return
        part: Sequence[Tensor] = [steps[p] for p in own]
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if group["momentum"]:
            buffers = [
                self.momentum[p] if p in self.momentum else torch.zeros_like(s) for p, s in zip(own, part, strict=True)
            ]
            kept = _foreach_scaled(buffers, sound, float(group["momentum"]), 1.0)
            torch._foreach_add_(kept, list(part))
            new.momentum.update(zip(own, kept, strict=True))
            part = kept
        change = _foreach_scaled(part, sound, -lr, 0.0)
        if any(is_distributed(p) for p in own):
            change = [part_of(c, p) for p, c in zip(own, change, strict=True)]
            own = [local(p) for p in own]
        if decay:  # in the precision of the steps
            exact = [p.to(c.dtype) for p, c in zip(own, change, strict=True)]
            torch._foreach_add_(change, _foreach_scaled(exact, sound, -lr * decay, 0.0))
        new.parameters += own
        new.change += [c.to(p.dtype) for p, c in zip(own, change, strict=True)]

    def _write(self, new: _Changes) -> None:
        """Change momentum and parameters: an interrupt finds both changed, or neither, without a copy of anything.

        Parameters are written by one call, the last one; by their version one sees whether that has been.
        """
        if not new.parameters:
            return
        before, version = self.momentum, new.parameters[0]._version
        try:
            self.momentum = new.momentum
            torch._foreach_add_(new.parameters, new.change)
        except BaseException:
            if new.parameters[0]._version == version:
                self.momentum = before
            raise

    def _adapt(
        self,
        runner: ClosureRunner,
        loss: Tensor,
        change: list[Tensor],
        gradients: list[Tensor | None],
        groups: Groups,
    ) -> None:
        """Levenberg-Marquardt: λ follows the ratio of actual to predicted change of the loss (Martens and Grosse)."""
        ranks = self.band.gathering.ranks
        slope = sum(float((g * c).sum()) for g, c in zip(gradients, change, strict=True) if g is not None)
        predicted = slope + float(self.band.quadratic(change)) / 2
        with self.band.paused():
            more = agreed(ranks, lambda: runner.trial_loss() - loss.item())
        if ranks.size > 1:
            mean = change[0].new_full((), more)
            ranks.mean_([mean])
            more = float(mean)
        actual = more
        ratio = actual * (-1 if groups[0]["maximize"] else 1) / predicted if predicted < 0 else 0.0
        if ratio > 0.75:
            self.band.damping *= self.damping.factor
        elif not ratio >= 0.25:
            self.band.damping /= self.damping.factor

    def state_dict(self, groups: Groups) -> dict[str, Any]:
        """What the next steps depend on: tensors, numbers and plain containers."""
        momentum = {i: self.momentum[p] for i, p in enumerate(_all(groups)) if p in self.momentum}
        return {"band": self.band.state_dict(), "momentum": momentum}

    def load_state_dict(self, state: dict[str, Any], groups: Groups) -> None:
        """Take up a state.

        Raises:
            ValueError: it is of another network or bandwidth.
        """
        self.band.load_state_dict(state["band"], () if self.choice is None else self.choice.candidates)
        parameters = _all(groups)
        self.momentum = {
            parameters[i]: whole(m).to(parameters[i].device, copy=True) for i, m in state["momentum"].items()
        }


def _all(groups: Groups) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def _foreach_scaled(tensors: Sequence[Tensor], sound: Tensor, factor: float, otherwise: float) -> list[Tensor]:
    """New tensors, times one of two factors, by a decision on the device; in one pass where they share their dtype."""
    chosen = {
        dtype: torch.where(sound, sound.new_full((), factor, dtype=dtype), sound.new_full((), otherwise, dtype=dtype))
        for dtype in {t.dtype for t in tensors}
    }
    if len(chosen) == 1:
        return list(torch._foreach_mul(list(tensors), chosen[tensors[0].dtype]))
    return [t * chosen[t.dtype] for t in tensors]
