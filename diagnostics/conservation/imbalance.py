"""What the imbalance of layers will be after training, by the tangent kernel or the Hessian at the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diagnostics.autograd.kernels import plain_autograd
from diagnostics.autograd.refusals import check_model
from diagnostics.autograd.substitution import run_model
from diagnostics.autograd.tape import batched_vjp
from diagnostics.autograd.trees import tensors
from diagnostics.conservation.homogeneous_pairs import homogeneous_pairs
from diagnostics.conservation.quantity import ConservedQuantity
from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.estimators.lanczos import extreme_eigenpairs
from diagnostics.estimators.symmetric_eigen import eigh
from diagnostics.operators.curvature import GaussNewtonOperator, HessianOperator

_EDGE = 1.8  # ηλ_max beyond which the closed forms are refused: at 2 the linear dynamics diverge, the network's do not


@dataclass(frozen=True, eq=False)
class ImbalancePrediction:
    """``S(η) = Σ_t (‖∇_consumers‖² − ‖∇_sources‖²)`` as predicted at the start; made by :func:`predict_imbalance`.

    Attributes:
        quantities: What is predicted, q of them.
        learning_rates: η, ``(n,)``.
        gradient_sum: S, ``(q, n)``.
        drift: ``η² S``, ``(q, n)``.
        stability: ηλ_max at the start, ``(n,)``: of the Hessian, or of the Gauss-Newton matrix for ``"ntk"``.
        method: ``"ntk"`` or ``"hessian"``.
        closed_form: Whether S is the closed form; False for the roll-out of a loss that is not quadratic.
    """

    quantities: tuple[ConservedQuantity, ...]
    learning_rates: Tensor
    gradient_sum: Tensor
    drift: Tensor
    stability: Tensor
    method: str
    closed_form: bool


def predict_imbalance(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss_fn: Callable[[Any, Any], Tensor],
    learning_rates: float | Sequence[float] | Tensor,
    steps: int,
    *,
    method: Literal["ntk", "hessian"] = "ntk",
    memory_limit: int = 8 * 2**30,
) -> ImbalancePrediction:
    """Predict ``S(η)`` of full-batch gradient descent from the network at the start.

    ``"ntk"``: linearise the outputs f, all N of the batch in one vector. With the tangent kernel ``K = J Jᵀ`` of all
    trained parameters and ``D = J S Jᵀ``, which is K₂ − K₁ for two layers, the residual ``r = ∂L/∂f`` moves by
    ``f ← f − ηKr`` and ``S(η) = Σ_t r_tᵀ D r_t``. For a loss quadratic in f, ``r = κ(f − y)`` (κ = 2/N for
    ``mse_loss``), with the eigenpairs (λ, U) of κK, ``ê = Uᵀ(f₀ − y)``, ``Q = κ² UᵀDU`` and ``ρ = 1 − ηλ``:

        S(η) = Σ_jk ê_j ê_k Q_jk (1 − (ρ_j ρ_k)^T) / (1 − ρ_j ρ_k).

    For other losses (cross-entropy) the T steps are rolled out, at two N × N products each.

    ``"hessian"``: the published form, with eigenpairs (λ, v) of the Hessian and the gradient g at the start,
    ``S(η) = Σ_k c_k (1 − ρ_k^{2T}) / (ηλ_k (2 − ηλ_k))`` and, as in the published code, ``c_k = (v_kᵀg)² δ₀/‖g‖²``:
    the imbalance of the first step, ``δ₀ = gᵀSg``, goes to eigenvectors in proportion to the gradient's energy,
    whatever their own imbalance ``v_kᵀSv_k`` is. It drops pairs j ≠ k, freezes the loss's curvature, and leaves
    eigenvalues λ_k ≤ 0 out, whose terms grow without bound. So it is off by more, most for cross-entropy.

    Both assume that gradients of the network move little from their linearisation: wide layers or short training.

    Args:
        model: The network; deterministic, in the mode in which it is trained.
        batch: ``(inputs, targets)``, the whole training set.
        loss_fn: ``loss_fn(z, targets) -> scalar``.
        learning_rates: η, one or several.
        steps: T.
        method: Which form.
        memory_limit: Bytes for Jacobian and kernels, or Hessian and eigenvectors.

    Raises:
        ValueError: ``steps``, ``learning_rates`` or ``method`` is out of range.
        DiagnosticsError: The network has no exact balanced quantity; ηλ_max is above 1.8, where the closed forms fail
            (a roll-out is refused where it diverges); the output is not one floating-point tensor.
        MemoryBudgetError: The matrices would take more than ``memory_limit``.

    Source: arXiv 2604.07405 for ``"hessian"``; the kernel form is this package's.
    """
    if method not in ("ntk", "hessian"):
        raise ValueError(f'method is "ntk" or "hessian", got {method!r}.')
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    eta = torch.as_tensor(learning_rates, dtype=torch.float64).reshape(-1)
    if len(eta) == 0 or not ((eta > 0) & eta.isfinite()).all():
        raise ValueError(f"learning rates must be positive and finite, got {eta.tolist()}.")
    check_model(model)
    found = homogeneous_pairs(model, batch[0])
    quantities = tuple(q for q in found if q.exact and q.kind == "balanced")
    if not quantities:
        reasons = "; ".join(q.reason for q in found if q.reason) or "no two layers follow each other"
        raise DiagnosticsError(f"no balanced pair of layers is conserved, so no imbalance is defined: {reasons}.")
    predict = _by_kernel if method == "ntk" else _by_hessian
    sums, stability, closed = predict(model, batch, loss_fn, quantities, eta, steps, memory_limit)
    return ImbalancePrediction(quantities, eta, sums, eta.square() * sums, stability, method, closed)


def geometric_sum(ratio_gap: Tensor, steps: int) -> Tensor:
    """``Σ_{t<T} x^t`` for ``x = 1 − ratio_gap``, entry by entry, without cancellation where x is near 1."""
    x = 1 - ratio_gap
    near = x > 0.5
    power = torch.expm1(steps * torch.log1p(-torch.where(near, ratio_gap, 0.5)))
    gap = torch.where(ratio_gap == 0, 1.0, ratio_gap)
    one_minus = torch.where(near, -power, 1 - x**steps)
    return torch.where(ratio_gap == 0, float(steps), one_minus / gap)


Prediction = tuple[Tensor, Tensor, bool]


def _by_kernel(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss_fn: Callable[[Any, Any], Tensor],
    quantities: tuple[ConservedQuantity, ...],
    eta: Tensor,
    steps: int,
    memory_limit: int,
) -> Prediction:
    output, kernel, differences = _kernels(model, batch[0], quantities, memory_limit)
    eta = eta.to(output.device)

    def slope(z: Tensor) -> Tensor:
        with plain_autograd():
            leaf = z.reshape(output.shape).requires_grad_()
            (gradient,) = torch.autograd.grad(loss_fn(leaf.to(_dtype(model)), batch[1]), leaf)
        return gradient.double().reshape(-1)

    start, r = output.reshape(-1), slope(output.reshape(-1))
    kappa = _quadratic(slope, start, r, torch.finfo(_dtype(model)).eps)
    if kappa is not None:
        values, basis = eigh(kappa * kernel)
        stability = eta * values[-1]
        _refuse_edge(eta, stability, "the tangent kernel")
        error = basis.mT @ r  # κê
        weights = torch.stack([basis.mT @ d @ basis for d in differences]) * torch.outer(error, error)
        sums = [
            (weights * geometric_sum(h * (values + values[:, None] - h * torch.outer(values, values)), steps)).sum(
                (1, 2)
            )
            for h in eta
        ]
        return torch.stack(sums, 1).cpu(), stability.cpu(), True
    top = extreme_eigenpairs(
        GaussNewtonOperator(model, batch, loss_fn, progress=False), which="largest"
    ).values.double()
    f = start[:, None].repeat(1, len(eta))  # all learning rates at once: the matrices are read once a step
    matrices = torch.cat([kernel, *differences])
    totals = start.new_zeros(len(quantities), len(eta))
    for _ in range(steps):
        residuals = torch.stack([slope(column) for column in f.unbind(1)], 1)
        moved, *turned = (matrices @ residuals).split(len(start))
        totals += torch.stack([(residuals * d).sum(0) for d in turned])
        f = f - eta * moved
    for h, ends in zip(eta, (totals.isfinite().all(0) & f.isfinite().all(0)).tolist(), strict=True):
        if not ends:
            raise DiagnosticsError(
                f"the linearised network diverges at η = {h.item():g} (ηλ_max = {(h * top[0]).item():.2f} at the "
                "start, stable below 2): choose a smaller learning rate."
            )
    return totals.cpu(), (eta * top).cpu(), False


def _by_hessian(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss_fn: Callable[[Any, Any], Tensor],
    quantities: tuple[ConservedQuantity, ...],
    eta: Tensor,
    steps: int,
    memory_limit: int,
) -> Prediction:
    op = HessianOperator(model, batch, loss_fn, progress=False)
    _check_memory(3 * 8 * op.shape[0] ** 2, memory_limit, f"the Hessian of {op.shape[0]} parameters")
    hessian = op.to_dense(memory_limit=memory_limit).double()
    values, vectors = eigh((hessian + hessian.mT) / 2)
    gradient = op.loss_and_gradient()[1].double()
    eta = eta.to(values.device)
    stability = eta * values[-1]
    _refuse_edge(eta, stability, "the Hessian")
    signs = torch.stack([_signs(op.space.slices, q, gradient) for q in quantities])
    kept = values > 0
    values, vectors = values[kept], vectors[:, kept]
    first = signs @ gradient.square() / gradient.square().sum().clamp_min(torch.finfo(gradient.dtype).tiny)
    c = first.unsqueeze(1) * (vectors.mT @ gradient).square()  # (q, positive eigenvalues)
    sums = [(c * geometric_sum(h * values * (2 - h * values), steps)).sum(1) for h in eta]
    return torch.stack(sums, 1).cpu(), stability.cpu(), True


def _kernels(
    model: nn.Module, inputs: Any, quantities: tuple[ConservedQuantity, ...], memory_limit: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The output, K = J Jᵀ and D = J S Jᵀ of each quantity, in float64."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with plain_autograd():
        found = tensors(run_model(model, inputs, {n: b.clone() for n, b in model.named_buffers()}))
        if len(found) != 1 or not found[0].is_floating_point():
            raise DiagnosticsError(f"the model must return one floating-point tensor, it returns {len(found)}.")
        z = found[0]
        n = z.numel()
        largest = max(p.numel() for p in parameters.values())
        _check_memory(8 * n * (3 * n + 2 * largest), memory_limit, f"the tangent kernels of {n} outputs")
        eye = torch.eye(n, dtype=z.dtype, device=z.device).reshape(n, *z.shape)
        kernel = torch.zeros(n, n, dtype=torch.float64, device=z.device)
        differences = [torch.zeros_like(kernel) for _ in quantities]
        for name, parameter in parameters.items():
            (rows,) = batched_vjp([z], [parameter], [eye])
            if rows is None:
                continue
            jacobian = rows.detach().double().reshape(n, -1)
            square = jacobian @ jacobian.mT
            kernel += square
            for quantity, difference in zip(quantities, differences, strict=True):
                sign = sum(sign for slices, sign in quantity.terms if slices.name == name)
                if sign:
                    difference += sign * square
    return z.detach().double(), kernel, differences


def _quadratic(slope: Callable[[Tensor], Tensor], start: Tensor, r: Tensor, eps: float) -> float | None:
    """κ if the loss is ``κ/2 ‖f − y‖²`` plus a constant, else None: by the slope at two other outputs."""
    generator = torch.Generator().manual_seed(0)
    away = torch.randn(start.shape, generator=generator, dtype=start.dtype).to(start.device)
    away = away * (1 + start.norm() / away.norm())
    near, far = ((slope(start + c * away) - r) / c for c in (1.0, 3.0))
    kappa = (near @ away / (away @ away)).item()
    straight = all((g - kappa * away).norm() <= 1e3 * eps * near.norm() for g in (near, far))
    return kappa if straight and kappa > 0 else None


def _signs(slices: dict[str, slice], quantity: ConservedQuantity, like: Tensor) -> Tensor:
    """The diagonal of S over all trained parameters, ``(P,)``."""
    signs = torch.zeros_like(like)
    for term, sign in quantity.terms:
        signs[slices[term.name]] += sign
    return signs


def _refuse_edge(eta: Tensor, stability: Tensor, whose: str) -> None:
    worst = int(stability.argmax())
    if stability[worst] > _EDGE:
        raise DiagnosticsError(
            f"ηλ_max = {stability[worst].item():.3f} at η = {eta[worst].item():g}, λ_max being that of {whose} at the "
            f"start: near 2 and above the linear dynamics grow without bound and the network's do not, so no "
            f"prediction is made beyond {_EDGE}. Choose η below {(_EDGE * eta / stability).min().item():.3g}."
        )


def _check_memory(needed: int, limit: int, what: str) -> None:
    if needed > limit:
        raise MemoryBudgetError(
            f"{what} take {needed / 2**30:.1f} GiB, more than the limit of {limit / 2**30:.1f} GiB: use fewer samples "
            "or a smaller network, or raise memory_limit."
        )


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p for p in model.parameters() if p.is_floating_point()).dtype
