"""Spectral steps without factors: singular values of gradients are divided by a power law of curvature."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.ranks.group import processes
from diagnostics.ranks.spread import is_distributed
from hessopt.checks import check_type
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.backward_calls import gradients_of
from hessopt.closure.finite import gradient_norm
from hessopt.closure.protocol import Closure, Evaluation
from hessopt.closure.runner import ClosureRunner
from hessopt.errors import ClosureError, ModelError
from hessopt.network.arguments import Params, network_of
from hessopt.network.processes import check_alike, check_distributed, refuse_own_gradients, refuse_processes
from hessopt.network.saved_state import Group, SavedState, asks_for_state, members
from hessopt.spectral.exponent import Probe, measure_on_tape, smoothed
from hessopt.spectral.groups import Selection, exponent_of, is_matrix, left_to_adamw
from hessopt.spectral.optimizer import SpectralNewton
from hessopt.spectral.options import AdamWPart, Momentum, OnlineExponent, PowerLaw
from hessopt.spectral.step import (
    SpectralStep,
    apply_adamw_step,
    apply_matrix_step,
    check_spectral_group,
    momentum_direction,
)
from hessopt.spectral.transfer import spectral_map


class PowerLawSpectralNewton(SpectralNewton, coordinates=PowerLaw):
    r"""``SpectralNewton`` with a power law: weight matrices move along singular vectors, by ``T(σ; α)`` along each.

    .. math::
       \begin{aligned}
            &M \leftarrow \mu M + (1 - \mu) G, \qquad \tilde G = (1 - \mu) G + \mu M \;\;(\text{nesterov; else } M),
                \qquad \tilde G = U \Sigma V^\top                                                              \\
            &\Delta W = U \, T(\Sigma; \alpha) \, V^\top, \qquad T(\sigma; \alpha) =
                \frac{\hat\sigma}{\hat\sigma^\alpha + \delta}, \;\; \hat\sigma = \frac{\sigma}{\sigma_{\max}}, \;\;
                \lVert \Delta W \rVert_F = \sqrt{\min(m, n)} \sqrt{\max(1, m/n)}                               \\
            &W \leftarrow (1 - \gamma\lambda) W - \gamma \, \Delta W
       \end{aligned}

    If curvature along ``u_k v_kᵀ`` is ``h_k = c σ_k^α``, Newton's step along it is ``σ_k/h_k ∝ σ_k^(1−α)``. α = 0 is
    normalised gradient descent, α = 1, δ → 0 is Muon, α = 2 gives small singular values the longer steps. The form
    ``"published"``, ``T = σ/(σ^α + δ)`` without any scale, drops c: with δ = 0.1 it is about gradient descent of rate
    10 lr wherever σ^α ≪ 0.1, and needs another learning rate. See :func:`hessopt.spectral.transfer.spectral_map`, also
    for how it is computed without singular vectors; weights of equal shape are mapped together. Convolutions are
    flattened to (out, in·kh·kw).

    **AdamW** trains what is no matrix, embeddings and the head (:func:`hessopt.spectral.groups.left_to_adamw`). A
    network passed as ``params`` makes two groups named ``"spectral"`` and ``"adamw"``, the latter with ``adamw.ratio``
    times the learning rate. In groups and lists of parameters the choice is made for each (with ``model=`` by the same
    rule, else by shape alone), with the same ratio. A group's ``"method"``, ``"spectral"`` or ``"adamw"``, overrides
    it; the latter's learning rate is AdamW's as it is.

    **Online α** (``PowerLaw("online")``): every 100 steps α of each matrix is the slope of log h on log σ along the
    ``directions`` largest singular directions of the gradient, with exact Hessian-vector products (one SVD
    and as many products a layer, each about two gradients of what lies between it and the loss). It is measured on the
    batch of the step's closure, or on a fixed ``batch`` with ``loss_fn``; clamped to [0.5, 2.5], averaged
    exponentially, and 1 where R² < 0.8, which is logged. Fixed α need no closure: ``loss.backward()``, ``step()``.

    Args:
        params: The network, or parameters in any form that :mod:`torch.optim` takes.
        loss: Not needed.
        lr: γ. Default: None, 0.01.
        coordinates: The transfer, :class:`hessopt.PowerLaw`.
        model: The network, if ``params`` is not the network itself.
        momentum: μ in [0, 1). Default: None, 0.95.
        weight_decay: λ, decoupled. Default: 0.
        maximize: Maximize the loss.
        adamw: What AdamW trains, and how, :class:`hessopt.AdamWPart`. Default: embeddings, the head and what is no
            matrix, at the same rate.

    **Several processes.** Under DistributedDataParallel with ``loss.backward()``, and a fixed α, steps are those of one
    process. Under FSDP2 (``fully_shard``) α is 0 or 1, without ``newton_schulz``.

    Param groups may have their own ``lr``, ``alpha``, ``form``, ``delta``, ``momentum``, ``nesterov``,
    ``weight_decay``, ``maximize``, ``adamw_ratio``, ``betas``, ``eps`` and ``method``.

    Attributes:
        last_step: A :class:`SpectralStep`, or None before the first step.

    Raises:
        ValueError: an argument is out of range.
        TypeError: ``model`` is not a module.

    Source:
        arXiv 2606.02596 (the published form); Jordan et al., Muon (2024); the scale-free form is this package's.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = SpectralNewton(model, coordinates=PowerLaw())
        >>> [(group["name"], len(group["params"])) for group in optimizer.param_groups]
        [('spectral', 2), ('adamw', 4)]
        >>> x = torch.randn(64, 4)
        >>> losses = []
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(x), x.prod(dim=1, keepdim=True))
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < 0.5 * losses[0]
        True
    """

    _MARKED = False
    _OWN = ("newton_schulz", "online", "last_step")

    def __init__(
        self,
        params: Params,
        loss: None = None,
        lr: float | Tensor | None = None,
        *,
        coordinates: PowerLaw,
        model: nn.Module | None = None,
        momentum: float | Momentum | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        adamw: AdamWPart | None = None,
    ) -> None:
        if loss is not None:
            raise TypeError(
                f"coordinates=PowerLaw(…) need no loss, got loss={loss!r}; a learning rate is passed by name, lr=…."
            )
        adamw = AdamWPart() if adamw is None else adamw
        lr = 0.01 if lr is None else lr
        if isinstance(momentum, Momentum):
            raise TypeError("momentum must be a number with coordinates=PowerLaw(…), which clips no gradients.")
        momentum = 0.95 if momentum is None else momentum
        check_type("coordinates", coordinates, PowerLaw)
        check_type("adamw", adamw, AdamWPart)
        network = network_of(params, model)
        if adamw.select is not None and network is None:
            raise ValueError("AdamWPart(select=) chooses by name, for which the network is needed: pass model=.")
        self.online = OnlineExponent() if coordinates.online is None else coordinates.online
        if self.online.batch is not None and network is None:
            raise ValueError("a fixed batch for the online alpha needs the network: pass model=.")
        self.model = network
        self.newton_schulz = coordinates.newton_schulz
        self.last_step: SpectralStep | None = None
        self._adamw = _ids(network, adamw.select)
        self._compared = False
        defaults = {
            "lr": lr, "alpha": coordinates.alpha, "form": coordinates.form, "delta": coordinates.delta,
            "momentum": momentum, "nesterov": coordinates.nesterov, "weight_decay": weight_decay, "maximize": maximize,
            "adamw_ratio": adamw.ratio, "betas": adamw.betas, "eps": adamw.eps, "method": "auto",
        }  # fmt: skip
        SavedState.__init__(self, self._named_groups(params, lr, adamw.ratio), defaults)

    def _check_group(self, group: Group) -> None:
        check_spectral_group(group, self.newton_schulz)
        check_distributed("SpectralNewton", [p for _, p in members(self)], self.model)
        self._check_shards(group)

    def _check_shards(self, group: dict[str, Any]) -> None:
        """Raise ModelError for a matrix in parts whose map takes more than operations that PyTorch knows on these."""
        for p in group["params"]:
            if is_distributed(p) and not self._left_to_adamw(group, p):
                alpha = exponent_of(group["alpha"], p)
                if alpha not in (0, 1) or (alpha == 1 and self.newton_schulz is not None):
                    how = " with newton_schulz" if alpha == 1 else ""
                    raise ModelError(
                        f"a weight of shape {tuple(p.shape)} is a DTensor, of which each process has a part, and "
                        f"alpha={alpha!r}{how} is not mapped in parts: pass alpha=1.0 (Muon) without newton_schulz, or "
                        "train under DistributedDataParallel."
                    )

    @property
    def alphas(self) -> dict[str, float]:
        """α of every matrix as last used, by parameter name (its number, where names are not known)."""
        known = {} if self.model is None else {id(p): name for name, p in self.model.named_parameters()}
        found = {}
        for number, (group, p) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
            if not self._left_to_adamw(group, p):
                alpha = exponent_of(group["alpha"], p)
                used = self.state[p].get("alpha", math.nan) if alpha == "online" and p in self.state else alpha
                found[known.get(id(p), str(number))] = math.nan if used == "online" else float(used)
        return found

    def report(self) -> dict[str, str]:
        """How each parameter is treated, by its name (its number, where names are not known)."""
        known = {} if self.model is None else {id(p): name for name, p in self.model.named_parameters()}
        return {
            known.get(id(p), str(number)): "AdamW" if self._left_to_adamw(group, p) else "spectral"
            for number, (group, p) in enumerate(members(self))
        }

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Evaluates the loss, see :mod:`hessopt.closure.protocol`. None: the gradient is in ``.grad``.

        Returns:
            The loss before the step, detached; None without a closure.

        Raises:
            ClosureError: the closure does not give a finite, differentiable loss; the gradient is not finite; or α is
                to be measured and there is nothing to measure it on. Parameters are then as they were.
            ModelError: a gradient is sparse; or several processes train together, and α is to be measured, or
                parameters differ at the first step (:func:`hessopt.separate_networks`).

        In these cases, and where the step is interrupted or runs out of memory, parameters and state are as they were:
        copies of both are kept while they are written.
        """
        if asks_for_state(self, closure):
            for number, (group, p) in enumerate(members(self)):
                self.state[p].update(self._blank(number, group, p, lambda p=p: torch.zeros_like(p)))  # type: ignore[misc]
            return None
        trained = [(group, p) for group in self.param_groups for p in group["params"] if p.requires_grad]
        due = self._due(trained)
        if due:
            refuse_processes('SpectralNewton with alpha="online"', "exponents")
        if not self._compared and processes() > 1:
            check_alike("SpectralNewton", "the parameters", [p for _, p in trained])
            self._compared = True
        if due and closure is None and self.online.batch is None:
            raise ClosureError(
                'alpha="online" measures curvature, which cannot be had from `.grad` alone. Pass a closure, '
                "`optimizer.step(lambda: loss_fn(model(x), y))`; or a fixed batch to measure on, "
                'PowerLaw("online", online=OnlineExponent(batch=(x, y), loss_fn=…)); or a fixed alpha.'
            )
        evaluation, gradients = self._evaluate(closure, trained, tape=bool(due) and self.online.batch is None)
        moved = [(group, p, g) for (group, p), g in zip(trained, gradients, strict=True) if g is not None]
        norm = gradient_norm([g for *_, g in moved], [p for _, p, _ in moved], self.model)
        with AllOrNothing(state=self.state) as guard:
            fallbacks = self._measure(due, evaluation)
            guard.keep(p for _, p, _ in moved)
            guard.keep_state()
            with torch.no_grad():
                self._move(moved)
        loss = None if evaluation is None else evaluation.loss.detach()
        self.last_step = SpectralStep(math.nan if loss is None else float(loss), norm, len(due), fallbacks)
        return loss

    @property
    def gradient_norm(self) -> float | None:
        """‖∇f‖ over the parameters that the last step moved, before it; None before the first."""
        return None if self.last_step is None else self.last_step.gradient_norm

    def _blank(self, number: int, group: dict[str, Any], p: Tensor, zeros: Callable[[], Tensor]) -> dict[str, Any]:
        step = torch.tensor(0.0)
        if self._left_to_adamw(group, p):
            return {"step": step, "exp_avg": zeros(), "exp_avg_sq": zeros()}
        online = exponent_of(group["alpha"], p) == "online"
        exponent = {"alpha": math.nan, "alpha_good": False, "alpha_r2": math.nan} if online else {}
        return {"step": step, "momentum_buffer": zeros(), **exponent}

    def __getstate__(self) -> dict[str, Any]:
        left = None if self.model is None else [p for p in self.model.parameters() if id(p) in (self._adamw or ())]
        return {**super().__getstate__(), "_left": left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        left = state.pop("_left", "absent")
        super().__setstate__(state)
        self._compared = False
        if left != "absent":  # a copy; its parameters are others
            self._adamw = None if left is None else {id(p) for p in left}
        for group in self.param_groups:
            group.setdefault("method", "auto")
        for own in self.state.values():
            if "step" in own and not isinstance(own["step"], Tensor):
                own["step"] = torch.tensor(float(own["step"]))

    def _named_groups(self, params: Params, lr: float | Tensor, ratio: float) -> Any:
        if not isinstance(params, nn.Module):
            return params
        assert self._adamw is not None
        named = list(params.named_parameters())
        spectral = [(name, p) for name, p in named if id(p) not in self._adamw]
        rest = [(name, p) for name, p in named if id(p) in self._adamw]
        groups: list[dict[str, Any]] = [
            {"params": spectral, "name": "spectral", "method": "spectral"},
            {"params": rest, "name": "adamw", "method": "adamw", "lr": lr * ratio},
        ]
        return [group for group in groups if group["params"]]

    def _left_to_adamw(self, group: dict[str, Any], p: Tensor) -> bool:
        if group["method"] != "auto":
            return bool(group["method"] == "adamw") or not is_matrix(p)
        return not is_matrix(p) or (self._adamw is not None and id(p) in self._adamw)

    def _due(self, trained: list[tuple[dict[str, Any], Tensor]]) -> list[tuple[dict[str, Any], Tensor]]:
        """The matrices whose exponent is to be measured now."""
        return [
            (group, p)
            for group, p in trained
            if not self._left_to_adamw(group, p)
            and exponent_of(group["alpha"], p) == "online"
            and (p not in self.state or int(self.state[p].get("step", 0)) % self.online.every == 0)
        ]

    def _evaluate(
        self, closure: Closure | None, trained: list[tuple[dict[str, Any], Tensor]], *, tape: bool
    ) -> tuple[Evaluation | None, list[Tensor | None]]:
        """Run the closure; the gradient of each trained parameter, sign turned if maximizing."""
        parameters = [p for _, p in trained]
        evaluation = None
        gradients: list[Tensor | None]
        if closure is not None:
            if not parameters:
                raise ClosureError("none of the optimizer's parameters requires grad.")
            runner = ClosureRunner(closure, parameters, self.model, tape=tape, twice_differentiable=tape)
            evaluation = runner.evaluate()
        if evaluation is not None and not evaluation.backward_called:
            refuse_own_gradients("SpectralNewton")
            gradients = gradients_of(evaluation.loss, parameters, retain_graph=tape)
        else:
            gradients = [p.grad for p in parameters]
        for (_, p), g in zip(trained, gradients, strict=True):
            if g is not None and g.layout != torch.strided:
                raise ModelError(
                    f"the gradient of a parameter of shape {tuple(p.shape)} is sparse (nn.Embedding(sparse=True)?). "
                    "Set sparse=False."
                )
        return evaluation, [
            None if g is None else -g.detach() if group["maximize"] else g.detach()
            for (group, _), g in zip(trained, gradients, strict=True)
        ]

    def _measure(self, due: list[tuple[dict[str, Any], Tensor]], evaluation: Evaluation | None) -> int:
        if not due:
            return 0
        parameters = [p for _, p in due]
        signs = [-1.0 if group["maximize"] else 1.0 for group, _ in due]
        online = self.online
        if online.loss_fn is not None:
            assert self.model is not None
            probe = Probe(self.model, online.batch, online.loss_fn)
            fits = probe.measure(parameters, signs, online.directions)
        else:
            assert evaluation is not None
            fits = measure_on_tape(evaluation.loss, parameters, signs, online.directions)
        fallbacks = 0
        for p, fit in zip(parameters, fits, strict=True):
            state = self.state[p]
            before = state["alpha"] if state.get("alpha_good") else None
            name = f"a weight of shape {tuple(p.shape)}"
            state["alpha"], state["alpha_good"] = smoothed(before, fit, online.decay, name)
            state["alpha_r2"] = fit.r2
            fallbacks += not state["alpha_good"]
        return fallbacks

    def _move(self, moved: list[tuple[dict[str, Any], Tensor, Tensor]]) -> None:
        alike: dict[tuple[Any, ...], list[tuple[dict[str, Any], Tensor, Tensor]]] = defaultdict(list)
        rest = []
        for group, p, g in moved:
            if self._left_to_adamw(group, p):
                rest.append((group, p, g))
                continue
            direction = momentum_direction(group, self.state[p], g)
            alpha = exponent_of(group["alpha"], p)
            rule = (direction.shape, direction.dtype, p.device, alpha, group["form"], group["delta"])
            alike[rule].append((group, p, direction))
        for (_, dtype, device, alpha, form, delta), entries in alike.items():
            directions = [d for *_, d in entries]
            single = len(entries) == 1
            used: float | Tensor = alpha
            if alpha == "online":
                values = [self.state[p]["alpha"] for _, p, _ in entries]
                used = values[0] if single else torch.tensor(values, dtype=dtype, device=device)
            schulz = self.newton_schulz if alpha == 1 else None
            steps = spectral_map(
                directions[0] if single else torch.stack(directions), used, delta, form=form, newton_schulz=schulz
            )
            for (group, p, _), step in zip(entries, [steps] if single else steps, strict=True):
                apply_matrix_step(group, p, step)
        for group, p, g in rest:
            apply_adamw_step(group, self.state[p], p, g)


def _ids(network: nn.Module | None, selection: Selection) -> set[int] | None:
    if network is None:
        return None
    left = left_to_adamw(network, selection)
    return {id(p) for name, p in network.named_parameters() if left[name]}
