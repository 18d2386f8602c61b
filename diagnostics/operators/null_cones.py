"""Null vectors of the Hessian of a network, ``vᵀHv = 0``, from a few Lanczos steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.krylov import Krylov
from diagnostics.estimators.lanczos import checked_start
from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.estimators.null_vectors import Inertia, Pairing, inertia, null_vectors, pair_spectrally
from diagnostics.estimators.probes import Products, generator_for
from diagnostics.operators.curvature import CurvatureOperator
from diagnostics.operators.parameter_space import ParameterSpace


@dataclass(frozen=True, eq=False, repr=False)
class RitzPairs:
    """``T = WᵀHW`` of an orthonormal basis W of a Krylov space, by its eigenpairs; made by :func:`krylov_space`.

    Attributes:
        values: Ritz values θ, ascending, ``(k,)``, float64 on the CPU.
        vectors: Ritz vectors as columns, ``(P, k)``.
        coefficients: Those in the Lanczos basis, ``(k, k)``: ``T = C diag(θ) Cᵀ`` is tridiagonal.
        products: Matrix-vector products used.
    """

    values: Tensor
    vectors: Tensor
    coefficients: Tensor
    products: int


@dataclass(frozen=True, eq=False, repr=False)
class NullCone:
    """Null vectors of an operator H in a Krylov space of dimension k; made by :func:`null_cone`.

    Attributes:
        basis: Unit vectors v with μ > 0 as columns, ``(P, m)``; m may be 0.
        mu: μ of each, ``(m,)``.
        residuals: ``vᵀHv / ‖H‖₂`` in absolute value, with ``Hv`` by a product of its own, ``(m,)``.
        lengths: ``‖Hv‖ / ‖H‖₂``, ``(m,)``: null is not flat, and these are not small.
        isotropy: ``‖QᵀHQ‖₂ / ‖H‖₂`` of an orthonormal basis Q of their span; 0 without null vectors.
        norm: ``‖H‖₂``, from below: the largest absolute Ritz value.
        inertia: Signs of the Ritz values.
        pairs: Number of real ± pairs μ.
        parity: Whether ``pairs ≡ n₋ (mod 2)``; None where no statement can be made (k odd or T singular).
        J: The pairing.
        ritz: The Krylov space.
        gradient_share: ``‖Qᵀg‖ / ‖Wᵀg‖``, the share of the gradient (of its part in the Krylov space, which is all of
            it where that started from g) along null vectors. None where the operator has no gradient.
        products: Matrix-vector products used, those of the residuals included.
        space: The parameters, for :attr:`by_parameter`; None for an operator that has none.
    """

    basis: Tensor
    mu: Tensor
    residuals: Tensor
    lengths: Tensor
    isotropy: float
    norm: float
    inertia: Inertia
    pairs: int
    parity: bool | None
    J: Pairing
    ritz: RitzPairs
    gradient_share: float | None
    products: int
    space: ParameterSpace | None

    @property
    def index_width(self) -> float:
        """min(n₊, n₋) / k: the share of the Krylov space that is isotropic."""
        return self.inertia.isotropic / len(self.ritz.values)

    @property
    def chance_share(self) -> float:
        """√(m/k): :attr:`gradient_share` of a vector that has nothing to do with H."""
        return float((self.basis.shape[1] / len(self.ritz.values)) ** 0.5)

    @property
    def by_parameter(self) -> dict[str, Tensor]:
        """The null vectors by parameter name, ``(m, *parameter.shape)`` each."""
        if self.space is None:
            raise DiagnosticsError("the operator has no named parameters; `basis` has the vectors.")
        return dict(zip(self.space.parameters, self.space.split(self.basis), strict=True))

    def __str__(self) -> str:
        found = self.basis.shape[1]
        parity = {None: "no statement", True: "holds", False: "VIOLATED"}[self.parity]
        lines = [
            f"{found} null vectors in a Krylov space of dimension {len(self.ritz.values)} ({self.J} J)",
            f"inertia n+ {self.inertia.positive}, n- {self.inertia.negative}, zero {self.inertia.zero}; "
            f"index width {self.index_width:.2f}; parity {parity}",
        ]
        if found:
            worst, least, most = (float(x) for x in (self.residuals.max(), self.lengths.min(), self.lengths.max()))
            lines.append(f"|vᵀHv| ≤ {worst:.1e} ‖H‖, ‖Hv‖ {least:.2g} … {most:.2g} ‖H‖, ‖QᵀHQ‖ {self.isotropy:.1e} ‖H‖")
        if self.gradient_share is not None:
            lines.append(f"share of the gradient {self.gradient_share:.2f}, by chance {self.chance_share:.2f}")
        return "\n".join(lines)

    __repr__ = __str__


def krylov_space(
    op: LinearOperator,
    k: int,
    start: Tensor | None = None,
    *,
    stop_early: bool = False,
    memory_limit: int = 8 * 2**30,
    generator: torch.Generator | None = None,
) -> RitzPairs:
    """All Ritz pairs after k Lanczos steps with full (two-pass) reorthogonalisation; one product a step.

    Where the Krylov space is exhausted earlier, it goes on at a random vector orthogonal to it, or ends.

    Args:
        op: H, symmetric, ``(P, P)``.
        k: Steps; at most P are made.
        start: The first vector, ``(P,)``. None: random.
        stop_early: End where the space is exhausted: it holds all that products make of ``start``.
        memory_limit: Bytes that the basis may take.
        generator: Source of randomness. None: a new one with seed 0.

    Raises:
        ValueError: k is less than 1.
        DiagnosticsError: the operator is not symmetric, a product not finite, or ``start`` no vector to start from.
        MemoryBudgetError: the basis does not fit.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is a number of Lanczos steps of at least 1, got {k!r}.")
    products = Products(op, symmetric=True)
    steps = min(k, op.shape[0])
    space = Krylov(
        products,
        wanted=steps,
        steps=steps,
        reorthogonalise="full",
        memory_limit=memory_limit,
        generator=generator_for(op, generator),
        start=None if start is None else checked_start(start, op),
    )
    for _ in range(steps):
        space.step()
        if stop_early and space.exhausted:
            break
    ritz = space.ritz()
    return RitzPairs(ritz.values, space.vectors(ritz, torch.arange(space.size)), ritz.coefficients, products.count)


def null_cone(
    op: LinearOperator,
    k: int = 40,
    start: Literal["gradient", "random"] | Tensor = "gradient",
    *,
    J: Pairing = "spectral",
    rtol: float | None = None,
    memory_limit: int = 8 * 2**30,
    generator: torch.Generator | None = None,
) -> NullCone:
    """Null vectors of the Hessian, in the space that k Lanczos steps reach.

    With an orthonormal W, ``(P, k)``, and ``T = WᵀHW``, every null vector c of T lifts to ``v = W c`` with
    ``vᵀHv = cᵀTc = 0``, without a limit k → P being taken: that is exact, and :attr:`NullCone.residuals` shows it by
    products of their own. The null vectors of T are those of :func:`diagnostics.null_vectors`: by pairing positive with
    negative Ritz values, always min(n₊, n₋) of them, or of the standard J, as published.

    A positive definite T has none, and none are returned. A vector with ``vᵀHv = 0`` is no direction along which the
    loss is flat: ``Hv`` is not zero, nor are third derivatives.

    Args:
        op: A :class:`diagnostics.HessianOperator`, or any symmetric operator (for others than curvature operators,
            ``start`` must not be ``"gradient"``).
        k: Lanczos steps, one product each.
        start: The first vector: the gradient, a random one, or ``(P,)`` of your own.
        J: See :func:`diagnostics.null_vectors`.
        rtol: Ritz values below this share of the largest are zero. None: k · eps of the operator's dtype.
        memory_limit: Bytes for the basis of the Krylov space, P · k numbers.
        generator: Source of randomness. None: a new one with seed 0, so that two calls give the same.

    Raises:
        ValueError: k, ``start`` or ``J`` is out of range.
        DiagnosticsError: the operator has no gradient, or one that is zero; it is not symmetric or not finite.

    Source: "Neural Null Cones", v6; spectral pairing in place of its fixed J.
    """
    if isinstance(start, str) and start not in ("gradient", "random"):
        raise ValueError(f'start must be "gradient", "random" or a vector, got {start!r}.')
    gradient = op.loss_and_gradient()[1] if isinstance(op, CurvatureOperator) else None
    first = start if isinstance(start, Tensor) else None
    if isinstance(start, str) and start == "gradient":
        if gradient is None:
            raise DiagnosticsError(f'{op!r} has no gradient to start from: pass start="random" or a vector.')
        if not gradient.any():
            raise DiagnosticsError('the gradient is zero, so nothing grows from it: pass start="random".')
        first = gradient
    ritz = krylov_space(op, k, first, memory_limit=memory_limit, generator=generator)
    share = len(ritz.values) * torch.finfo(op.dtype).eps if rtol is None else rtol
    signs = inertia(ritz.values, share)
    if J == "spectral":
        coefficients, mu = pair_spectrally(ritz.values, signs)
        pairs = len(mu)
    else:
        projected = ritz.coefficients * ritz.values @ ritz.coefficients.mT
        found = null_vectors((projected + projected.mT) / 2, J, rtol=share)
        coefficients, mu, pairs = ritz.coefficients.mT @ found.vectors, found.mu, found.pairs
    basis = ritz.vectors @ coefficients.to(ritz.vectors)
    norm = ritz.values.abs().amax().item()
    images = op @ basis if len(mu) else torch.zeros_like(basis)
    q = torch.linalg.qr(basis).Q
    form = q.mT @ (op @ q if J == "standard" and len(mu) else images)  # the spectral basis is orthonormal already
    within = None
    if gradient is not None:
        inside = torch.linalg.vector_norm(ritz.vectors.mT @ gradient)
        within = float(torch.linalg.vector_norm(q.mT @ gradient) / inside) if inside > 0 else float("nan")
    regular = len(ritz.values) % 2 == 0 and signs.zero == 0
    return NullCone(
        basis=basis,
        mu=mu.to(basis),
        residuals=(basis * images).sum(0).abs() / norm if norm else images.sum(0),
        lengths=torch.linalg.vector_norm(images, dim=0) / (norm or 1.0),
        isotropy=float(torch.linalg.matrix_norm(form, 2) / norm) if len(mu) else 0.0,
        norm=norm,
        inertia=signs,
        pairs=pairs,
        parity=(pairs - signs.negative) % 2 == 0 if regular else None,
        J=J,
        ritz=ritz,
        gradient_share=within,
        products=ritz.products + len(mu) * (2 if J == "standard" else 1),
        space=op.space if isinstance(op, CurvatureOperator) else None,
    )
