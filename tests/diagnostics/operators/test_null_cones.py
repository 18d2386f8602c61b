"""Null vectors: the identity, isotropy, parity, the bound that inertia sets, and their lift from a Krylov space."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diagnostics
from diagnostics.estimators.linear_operator import MatrixOperator
from diagnostics.estimators.null_vectors import inertia, null_vectors, standard_pairing
from diagnostics.operators.curvature import HessianOperator
from diagnostics.operators.null_channel import loss_at
from diagnostics.operators.null_cones import krylov_space, null_cone
from tests.helpers.matrices import symmetric
from tests.helpers.networks import Chain, ResidualCat

F64 = torch.float64


def goe(size: int, seed: int) -> Tensor:
    drawn = torch.randn(size, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return (drawn + drawn.mT) / 2


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def isotropy(matrix: Tensor, vectors: Tensor) -> float:
    q = torch.linalg.qr(vectors).Q
    return norm(q.mT @ matrix @ q) / norm(matrix)


sizes = st.integers(2, 14)
seeds = st.integers(0, 2**31 - 1)


@given(size=sizes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_spectral_pairing_is_null_isotropic_orthonormal_and_attains_the_bound(size: int, seed: int) -> None:
    matrix = goe(size, seed)
    found = null_vectors(matrix)
    values = torch.linalg.eigvalsh(matrix)
    m = min(int((values > 0).sum()), int((values < 0).sum()))
    assert found.vectors.shape == (size, m)
    assert found.inertia == (int((values > 0).sum()), int((values < 0).sum()), 0)
    if m:
        forms = (found.vectors * (matrix @ found.vectors)).sum(0).abs()
        assert forms.max() <= 1e-13 * norm(matrix)
        assert norm(found.vectors.mT @ matrix @ found.vectors) <= 1e-13 * norm(matrix)
        assert norm(found.vectors.mT @ found.vectors - torch.eye(m)) <= 1e-13
        # Two vectors of one pair, of opposite μ, are not orthogonal under H: the largest |vᵢᵀHvⱼ| is far from 0.
        both = null_vectors(matrix, sign="both").vectors
        assert norm(both.mT @ matrix @ both) > 1e-3 * norm(matrix) * float(values.abs().min() / values.abs().max())


@given(size=sizes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_spectral_pairs_solve_the_pencil_of_their_antisymmetric_matrix(size: int, seed: int) -> None:
    matrix = goe(size, seed)
    values, u = torch.linalg.eigh(matrix)
    found = null_vectors(matrix, sign="both")
    m = found.pairs
    j = sum(
        (torch.outer(u[:, -1 - i], u[:, i]) - torch.outer(u[:, i], u[:, -1 - i]) for i in range(m)),
        torch.zeros_like(matrix),
    )
    assert torch.equal(j, -j.mT)
    residual = j @ found.vectors - found.mu * (matrix @ found.vectors)
    assert residual.shape == (size, 2 * m)
    assert (residual.abs() <= 1e-12 * max(1.0, float(values.abs().max() / values.abs().min()))).all()
    assert torch.equal(found.mu[:m], -found.mu[m:])


@given(size=sizes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_standard_pairing_is_null_and_isotropic_on_one_sign(size: int, seed: int) -> None:
    matrix = goe(size, seed)
    found = null_vectors(matrix, "standard")
    assert (found.mu > 0).all()
    if len(found.mu):
        images = matrix @ found.vectors
        # a backward stable solver leaves residuals of eps (‖J‖ + μ ‖H‖), however ill-conditioned the eigenvalues
        size_of_terms = 1 + found.mu * norm(matrix)
        assert ((found.vectors * images).sum(0).abs() <= 1e-12 * size_of_terms / found.mu).all()
        pencil = standard_pairing(size) @ found.vectors - found.mu * images
        assert (torch.linalg.vector_norm(pencil, dim=0) <= 1e-12 * size_of_terms).all()
    assert len(found.mu) <= found.inertia.isotropic


def test_the_span_of_mu_positive_is_isotropic_and_that_of_all_real_eigenvectors_is_not() -> None:
    one, both = [], []
    for seed in range(40):
        matrix = goe(50, seed)
        vectors = null_vectors(matrix, "standard").vectors
        if vectors.shape[1] < 2:
            continue
        one.append(isotropy(matrix, vectors))
        both.append(isotropy(matrix, null_vectors(matrix, "standard", sign="both").vectors))
    assert len(one) > 20
    assert max(one) <= 1e-13
    assert min(both) > 1e-3
    assert sorted(both)[len(both) // 2] > 0.05


@pytest.mark.parametrize("J", ["spectral", "standard"])
def test_parity_of_the_number_of_pairs(J: str) -> None:
    counts = set()
    for seed in range(200):
        found = null_vectors(goe(8, seed), J)  # type: ignore[arg-type]
        assert found.parity is True
        assert (found.pairs - found.inertia.negative) % 2 == 0
        counts.add(found.pairs)
    assert {len(found.mu) == 0 for found in (null_vectors(torch.eye(8, dtype=F64), J),)} == {True}  # type: ignore[arg-type]
    assert len(counts) >= 3


def test_no_parity_statement_for_odd_or_singular_matrices_and_the_kernel_of_an_odd_J_is_not_null() -> None:
    odd = goe(7, 0)
    assert null_vectors(odd, "standard").parity is None
    assert null_vectors(symmetric(torch.tensor([2.0, 1, 0, -1])), "standard").parity is None
    for seed in range(483):  # nor is it returned, although its μ comes out as rounding
        matrix = goe(3, seed)  # seed 482 is such a case
        assert null_vectors(matrix, "standard").pairs <= 1
    kernel = torch.eye(7, dtype=F64)[:, -1]
    assert not (standard_pairing(7) @ kernel).any()
    assert abs(float(kernel @ odd @ kernel)) > 0.1


@given(size=sizes, seed=seeds, sign=st.sampled_from([1.0, -1.0]))
@settings(max_examples=40, deadline=None)
def test_definite_matrices_have_none(size: int, seed: int, sign: float) -> None:
    factor = torch.randn(size, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    matrix = sign * (factor @ factor.mT + torch.eye(size))
    for j in ("spectral", "standard"):
        assert null_vectors(matrix, j).vectors.shape == (size, 0)  # type: ignore[arg-type]


def test_the_number_of_standard_pairs_depends_on_the_order_of_coordinates() -> None:
    matrix = goe(50, 0)
    counts = set()
    for seed in range(20):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
        counts.add(null_vectors(matrix[order][:, order], "standard").pairs)
        assert null_vectors(matrix[order][:, order]).pairs == null_vectors(matrix).pairs
    assert len(counts) >= 3


def test_inertia_counts_zeros_to_rounding() -> None:
    matrix = symmetric(torch.tensor([3.0, 1e-17, 0.0, -2.0, -1.0]))
    assert inertia(torch.linalg.eigvalsh(matrix)) == (1, 2, 2)
    assert inertia(torch.tensor([1.0, 1e-3, -1.0]), 1e-2) == (1, 1, 1)
    assert null_vectors(matrix).vectors.shape == (5, 1)


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(diagnostics.DiagnosticsError, match="not symmetric"):
        null_vectors(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    with pytest.raises(diagnostics.DiagnosticsError, match="finite"):
        null_vectors(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="J must be"):
        null_vectors(torch.eye(2), "other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sign must be"):
        null_vectors(torch.eye(2), sign="negative")  # type: ignore[arg-type]


def _operator(device: torch.device, make: Callable[[], nn.Module] = lambda: Chain(5, 6, 4, 3)) -> HessianOperator:
    torch.manual_seed(0)
    net = make().double().to(device)
    x, y = torch.randn(12, 5, dtype=F64).to(device), torch.randint(0, 3, (12,)).to(device)
    return HessianOperator(net, [(x[:8], y[:8]), (x[8:], y[8:])], F.cross_entropy, progress=False)


def _dense(op: HessianOperator) -> Tensor:
    """By double back-propagation, row by row."""
    parameters = list(op.space.parameters.values())
    model, loss = op.replay.model, torch.zeros((), dtype=F64, device=op.device)
    for batch in op.batches:
        loss = loss + F.cross_entropy(model(batch.inputs), batch.targets, reduction="sum") / 12
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in gradient]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.mark.parametrize("J", ["spectral", "standard"])
@pytest.mark.parametrize("start", ["gradient", "random"])
def test_null_vectors_of_a_network(J: str, start: str, device: torch.device) -> None:
    op = _operator(device, ResidualCat)
    cone = null_cone(op, 20, start, J=J)  # type: ignore[arg-type]
    dense, m = _dense(op), cone.basis.shape[1]
    assert m >= 1
    assert cone.inertia.negative > 0
    assert (m == cone.inertia.isotropic) == (J == "spectral")
    torch.testing.assert_close(torch.linalg.vector_norm(cone.basis, dim=0), torch.ones(m, dtype=F64, device=device))
    images = dense @ cone.basis
    top = cone.norm
    assert top == pytest.approx(norm(dense), rel=0.05)
    assert top <= norm(dense) * (1 + 1e-12)
    assert (cone.basis * images).sum(0).abs().max() <= 1e-12 * top
    torch.testing.assert_close(cone.lengths, torch.linalg.vector_norm(images, dim=0) / top, rtol=1e-9, atol=1e-12)
    assert cone.residuals.max() <= 1e-12
    assert cone.isotropy <= 1e-12
    assert isotropy(dense, cone.basis) <= 1e-12
    assert cone.lengths.min() > 1e-3  # null is not flat
    assert cone.parity is True
    assert cone.index_width == cone.inertia.isotropic / 20
    assert cone.chance_share == pytest.approx(math.sqrt(m / 20))
    q = torch.linalg.qr(cone.basis).Q
    gradient = op.loss_and_gradient()[1]
    krylov = torch.linalg.qr(cone.ritz.vectors).Q
    share = torch.linalg.vector_norm(q.mT @ gradient) / torch.linalg.vector_norm(krylov.mT @ gradient)
    assert cone.gradient_share == pytest.approx(share.item(), rel=1e-9)
    if start == "gradient":
        assert share == pytest.approx((q.mT @ gradient).norm().item() / gradient.norm().item(), rel=1e-9)
    pieces = cone.by_parameter
    assert list(pieces) == list(op.space.parameters)
    assert torch.equal(torch.cat([piece.reshape(m, -1) for piece in pieces.values()], 1).mT, cone.basis)
    assert f"{m} null vectors" in str(cone)


def test_the_lift_is_exact() -> None:
    """``vᵀHv`` of v = Wc is cᵀTc, whatever c, by a dense Hessian that Lanczos never saw."""
    op = _operator(torch.device("cpu"))
    ritz = krylov_space(op, 15, op.loss_and_gradient()[1])
    dense = _dense(op)
    w = ritz.vectors @ ritz.coefficients.mT
    t = ritz.coefficients * ritz.values @ ritz.coefficients.mT
    assert norm(w.mT @ w - torch.eye(15)) <= 1e-13
    assert norm(w.mT @ dense @ w - t) <= 1e-13 * norm(dense)
    assert t.triu(2).abs().max() <= 1e-12 * norm(dense)  # tridiagonal: it is Lanczos' own
    first = op.loss_and_gradient()[1]
    torch.testing.assert_close(w[:, 0].abs(), (first / first.norm()).abs(), rtol=1e-9, atol=1e-12)


def test_two_calls_give_the_same_and_other_seeds_another() -> None:
    op = _operator(torch.device("cpu"))
    state = torch.get_rng_state()
    first, second = (null_cone(op, 10, "random") for _ in range(2))
    other = null_cone(op, 10, "random", generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.basis, second.basis)
    assert not torch.equal(first.basis[:, :1], other.basis[:, :1])
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_of_the_model_is_changed() -> None:
    op = _operator(torch.device("cpu"))
    model = op.replay.model
    frozen = next(iter(model.parameters()))
    before = copy.deepcopy(model.state_dict())
    frozen.grad = torch.ones_like(frozen)
    cone = null_cone(op, 10)
    diagnostics.channel_width(op, cone, directions=1)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert torch.equal(frozen.grad, torch.ones_like(frozen))
    assert all(p.grad is None for p in model.parameters() if p is not frozen)


def test_a_convex_loss_has_no_null_vectors_and_no_channel() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=F64), torch.randn(20, 2, dtype=F64)
    op = HessianOperator(nn.Linear(3, 2).double(), (x, y), F.mse_loss)
    cone = null_cone(op, 8)
    assert cone.basis.shape == (8, 0)
    assert (cone.inertia.negative, cone.isotropy, cone.index_width) == (0, 0.0, 0.0)
    with pytest.raises(diagnostics.DiagnosticsError, match="no null vectors"):
        diagnostics.channel_width(op, cone)


def test_a_space_that_is_exhausted_goes_on_or_stops() -> None:
    op = MatrixOperator(torch.diag(torch.tensor([2.0, 2, 2, -1, -1, -1], dtype=F64)))
    start = torch.ones(6, dtype=F64)
    assert len(krylov_space(op, 6, start).values) == 6
    short = krylov_space(op, 6, start, stop_early=True)
    assert len(short.values) == short.products == 2
    torch.testing.assert_close(short.values, torch.tensor([-1.0, 2.0], dtype=F64))


def test_the_half_width_of_a_quadratic_and_of_a_quartic() -> None:
    """L = 1 + ½ wᵀAw + c w₀⁴ at 0: along e, ε²/2 eᵀAe; along the null vector of A only the quartic counts."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w

    def loss(z: Tensor, _: None) -> Tensor:
        return 1 + (z[0].square() - z[1].square()) / 2 + 3 * z[0].pow(4) + z[1]

    op = HessianOperator(Plain(), (torch.ones(1), None), loss)
    cone = null_cone(op, 2)
    assert torch.allclose(cone.basis.abs(), torch.full((2, 1), math.sqrt(0.5), dtype=F64))
    width = diagnostics.channel_width(op, cone, tolerance=0.02)
    exact = (0.02 / (3 / 4)) ** 0.25  # 3 (ε/√2)⁴ = τ
    assert width.null[0] == pytest.approx(exact, rel=0.011)
    assert width.null[0] <= exact
    assert width.index == 0.5
    assert width.ratio == width.null[0] / width.random[0]
    v = torch.tensor([1.0, 0.0], dtype=F64)
    assert loss_at(op, 0.5 * v) == pytest.approx(1 + 0.125 + 3 / 16)
    assert loss_at(op, None) == 1


def test_losses_away_from_the_parameters_average_over_samples() -> None:
    op = _operator(torch.device("cpu"))
    offset = 0.1 * torch.randn(op.shape[0], dtype=F64, generator=torch.Generator().manual_seed(0))
    moved = copy.deepcopy(op.replay.model)
    with torch.no_grad():
        for (name, p), part in zip(moved.named_parameters(), op.unflatten(offset).values(), strict=True):
            assert name in op.space.parameters
            p.add_(part)
    batches = list(op.batches)
    x, y = torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])
    assert loss_at(op, offset) == pytest.approx(F.cross_entropy(moved(x), y).item(), rel=1e-13)


def test_what_cannot_be_asked_is_refused() -> None:
    op = _operator(torch.device("cpu"))
    plain = MatrixOperator(torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(diagnostics.DiagnosticsError, match='no gradient to start from: pass start="random"'):
        null_cone(plain)
    assert null_cone(plain, start="random").gradient_share is None
    with pytest.raises(diagnostics.DiagnosticsError, match="no named parameters"):
        _ = null_cone(plain, start="random").by_parameter
    with pytest.raises(ValueError, match='start must be "gradient"'):
        null_cone(op, start="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k is a number"):
        null_cone(op, 0)
    with pytest.raises(ValueError, match="tolerance > 0"):
        diagnostics.channel_width(op, null_cone(op, 6), tolerance=0)
    cone = null_cone(op, 6)
    with torch.no_grad():
        next(iter(op.space.parameters.values())).add_(1)
    with pytest.raises(diagnostics.StaleGraphError):
        diagnostics.channel_width(op, cone)
    zero = nn.Linear(2, 1).double()
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    flat = HessianOperator(zero, (torch.ones(1, 2, dtype=F64), torch.zeros(1, 1, dtype=F64)), F.mse_loss)
    with pytest.raises(diagnostics.DiagnosticsError, match="gradient is zero"):
        null_cone(flat)
