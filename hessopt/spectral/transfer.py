"""Spectral maps of gradient matrices: the singular vectors stay, the singular values go through T(σ; α)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.estimators.symmetric_eigen import eigh, eigvalsh

Form: TypeAlias = Literal["scale_free", "published"]
Method: TypeAlias = Literal["auto", "svd", "eigh", "cholesky"]


@dataclass(frozen=True)
class NewtonSchulz:
    """Approximate polar factors by matrix products alone: ``X ← aX + (bXXᵀ + c(XXᵀ)²)X`` from ``X = G/‖G‖_F``.

    Attributes:
        steps: Iterations. Default: 5.
        coefficients: (a, b, c). The default, Muon's, brings singular values into about [0.7, 1.2] in five steps and
            never closer; ``(1.875, -1.25, 0.375)`` converges to 1, in more steps.
        dtype: Of the iterations. None: that of G. Muon's is ``torch.bfloat16``.
        eps: Least norm to divide by. Default: 1e-7.

    Source:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """

    steps: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    dtype: torch.dtype | None = None
    eps: float = 1e-7

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps < 100:
            raise ValueError(f"steps must be an integer from 1 to 99, got {self.steps!r}.")
        if len(self.coefficients) != 3:
            raise ValueError(f"coefficients must be three numbers (a, b, c), got {self.coefficients!r}.")

    def polar(self, matrices: Tensor) -> Tensor:
        """About ``U Vᵀ`` of ``(…, m, n)``, in the dtype of the iterations."""
        a, b, c = self.coefficients
        tall = matrices.shape[-2] > matrices.shape[-1]
        x = matrices.to(self.dtype or matrices.dtype)
        x = x.mT if tall else x
        x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(self.eps)
        add = torch.addmm if x.ndim == 2 else torch.baddbmm
        for _ in range(self.steps):
            gram = x @ x.mT
            x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def transfer(sigma: Tensor, alpha: Tensor | float, delta: Tensor | float) -> Tensor:
    """``T(σ; α) = σ / (σ^α + δ)``, entry by entry; 0 where the denominator is 0."""
    return sigma * _weight(sigma, alpha, delta)


def spectral_map(
    matrices: Tensor,
    alpha: float | Tensor,
    delta: float = 0.1,
    *,
    form: Form = "scale_free",
    method: Method = "auto",
    newton_schulz: NewtonSchulz | None = None,
) -> Tensor:
    r"""``ΔW = U T(Σ; α) Vᵀ`` of the gradients ``G = U Σ Vᵀ``, ``(…, m, n)``, all together.

    .. math::
        \text{published: } T(\sigma) = \frac{\sigma}{\sigma^\alpha + \delta}, \qquad
        \text{scale-free: } T(\sigma) \propto \frac{\hat\sigma}{\hat\sigma^\alpha + \delta},\;
        \hat\sigma = \frac{\sigma}{\sigma_{\max}},\;
        \lVert \Delta W \rVert_F = \sqrt{\min(m, n)}\,\sqrt{\max(1, m / n)} .

    With curvature ``h = c σ^α``, Newton's step is ``σ/(c σ^α)``. The published form leaves c out, so that what δ damps
    depends on the scale of the gradient: for σ^α ≪ δ it is gradient descent with rate 1/δ. The scale-free form is the
    same for G and cG; at α = 1, δ → 0 its step is Muon's.

    α = 0 is the gradient itself, divided by 1 + δ. The others need no singular vectors:

    - α = 2: ``(GGᵀ + δI)⁻¹ G``, by a Cholesky factor of the smaller Gram matrix (``"cholesky"``);
    - any α: ``f(GGᵀ) G`` with ``f(λ) = 1/(λ^{α/2} + δ)``, by the eigenvectors of the smaller Gram matrix
      (``"eigh"``); at α = 1 that is ``(P + δI)⁻¹ G`` with the polar decomposition ``G = PQ``;
    - α = 1 with ``newton_schulz``: P and Q by Newton-Schulz iterations, approximately.

    Forming the Gram matrix squares the condition number: singular values below ``√eps · σ_max`` are lost in it. They
    make no difference where δ is larger than their σ̂^α; for smaller δ ``"auto"`` takes the singular value
    decomposition (``"svd"``).

    Args:
        matrices: G, in float32 or float64.
        alpha: α ≥ 0, one for all or one for each matrix, ``(…,)``.
        delta: δ ≥ 0; of σ̂^α in the scale-free form, of σ^α in the published one. Default: 0.1.
        form: ``"scale_free"`` or ``"published"``.
        method: ``"cholesky"`` is for α = 2 alone. Default: ``"auto"``.
        newton_schulz: For α = 1, in place of ``method``.

    Returns:
        ΔW, of the shape and dtype of G; zero for G = 0. Directions with σ = 0 stay zero, also for δ = 0.

    Raises:
        ValueError: an argument is out of range, or does not go with α.
    """
    one = not isinstance(alpha, Tensor)
    if form not in ("scale_free", "published"):
        raise ValueError(f'form must be "scale_free" or "published", got {form!r}.')
    if method not in ("auto", "svd", "eigh", "cholesky"):
        raise ValueError(f'method must be "auto", "svd", "eigh" or "cholesky", got {method!r}.')
    if not 0 <= delta < float("inf"):
        raise ValueError(f"delta must be a finite number of at least 0, got {delta}.")
    if (not 0 <= alpha < float("inf")) if one else not bool((alpha >= 0).all()):  # type: ignore[union-attr]
        raise ValueError(f"alpha must be at least 0, got {alpha}.")
    if newton_schulz is not None and alpha != 1:
        raise ValueError(f"Newton-Schulz iterations give the polar factor, of alpha = 1; alpha is {alpha}.")
    if method == "cholesky" and alpha != 2:
        raise ValueError(f'method="cholesky" is for alpha = 2, got alpha = {alpha}; use "eigh".')

    tall = matrices.shape[-2] > matrices.shape[-1]
    g = matrices.mT if tall else matrices
    size = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1)
    scale = size if form == "published" else torch.ones_like(size)
    unit = g / size  # so that squares neither over- nor underflow
    relative = form == "scale_free"
    if newton_schulz is not None:
        step = _by_newton_schulz(g, unit, scale, delta, relative, newton_schulz)
    elif one and alpha == 0:
        step = scale * unit / (1 + delta)
    elif method == "svd" or (method == "auto" and _too_small(delta, alpha, relative, unit)):
        step = _by_svd(unit, scale, alpha, delta, relative)
    elif method == "cholesky" or (method == "auto" and one and alpha == 2):
        step = _by_cholesky(unit, scale, delta, relative)
    else:
        step = _by_eigh(unit, scale, alpha, delta, relative)
    step = step.mT if tall else step
    return _rescaled(step) if relative else step


def _weight(sigma: Tensor, alpha: Tensor | float, delta: Tensor | float) -> Tensor:
    """``1 / (σ^α + δ)``; 0 where that is infinite, whose σ is 0."""
    below = sigma**alpha + delta
    return torch.where(below > 0, 1 / torch.where(below > 0, below, 1), 0)


def _damping(largest: Tensor, alpha: Tensor | float, delta: float, relative: bool) -> Tensor | float:
    return delta * largest**alpha if relative else delta


def _columns(alpha: float | Tensor) -> float | Tensor:
    return alpha.unsqueeze(-1) if isinstance(alpha, Tensor) else alpha


def _too_small(delta: float, alpha: float | Tensor, relative: bool, unit: Tensor) -> bool:
    """Whether singular values that a Gram matrix loses would count."""
    if delta == 0 or not relative:
        return delta == 0
    lost = (max(unit.shape[-2:]) * torch.finfo(unit.dtype).eps) ** 0.5
    largest = float(alpha.max()) if isinstance(alpha, Tensor) else alpha
    return delta < lost**largest if largest > 0 else False


def _by_svd(unit: Tensor, scale: Tensor, alpha: float | Tensor, delta: float, relative: bool) -> Tensor:
    u, sigma, vh = torch.linalg.svd(unit, full_matrices=False)
    floor = max(unit.shape[-2:]) * torch.finfo(sigma.dtype).eps * sigma[..., :1]
    a = _columns(alpha)
    values = scale.squeeze(-1) * torch.where(sigma > floor, sigma, 0)
    mapped = transfer(values, a, _damping(values[..., :1], a, delta, relative))
    step: Tensor = (u * torch.where(values > 0, mapped, 0).unsqueeze(-2)) @ vh
    return step


def _by_eigh(unit: Tensor, scale: Tensor, alpha: float | Tensor, delta: float, relative: bool) -> Tensor:
    values, vectors = eigh(unit @ unit.mT)
    sigma = scale.squeeze(-1) * values.clamp_min(0).sqrt()
    a = _columns(alpha)
    weights = _weight(sigma, a, _damping(sigma[..., -1:], a, delta, relative))
    step: Tensor = scale * (((vectors * weights.unsqueeze(-2)) @ vectors.mT) @ unit)
    return step


def _by_cholesky(unit: Tensor, scale: Tensor, delta: float, relative: bool) -> Tensor:
    gram = scale.square() * (unit @ unit.mT)
    damping: Tensor | float = delta
    if relative:
        largest = eigvalsh(gram)[..., -1:].unsqueeze(-1)
        damping = delta * torch.where(largest > 0, largest, 1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # The inverse and one product: triangular solves with n right-hand sides take several times as long.
    return scale * (torch.cholesky_inverse(torch.linalg.cholesky(gram + damping * eye)) @ unit)


def _by_newton_schulz(
    g: Tensor, unit: Tensor, scale: Tensor, delta: float, relative: bool, iterations: NewtonSchulz
) -> Tensor:
    q = iterations.polar(g).to(g.dtype)
    if delta == 0:
        return q
    p = scale * (unit @ q.mT)
    p = (p + p.mT) / 2
    damping: Tensor | float = delta
    if relative:
        largest = eigvalsh(p)[..., -1:].unsqueeze(-1)
        damping = delta * torch.where(largest > 0, largest, 1)
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    step: Tensor = scale * (torch.linalg.inv(p + damping * eye) @ unit)
    return step


def _rescaled(step: Tensor) -> Tensor:
    m, n = step.shape[-2:]
    norm = torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True)
    target = min(m, n) ** 0.5 * max(1.0, m / n) ** 0.5
    return step * torch.where(norm > 0, target / torch.where(norm > 0, norm, 1), 0)
