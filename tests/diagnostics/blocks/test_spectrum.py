"""Eigenpairs, negative curvature and escape directions against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

import diagnostics
from diagnostics.blocks import spectrum
from diagnostics.blocks.spectrum import effective_rank, eigenpairs, escape_direction, negative_curvature, symmetrise
from diagnostics.graph.local import differentiate
from diagnostics.results.pair_formulas import stable_rank
from tests.helpers.networks import Chain, ResidualCat
from tests.helpers.random_dags import Plan, build, plans


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


def _convex(z: Tensor) -> Tensor:
    return z.square().sum() / len(z)


@pytest.fixture
def graph(device: torch.device) -> diagnostics.Graph:
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    return diagnostics.capture(ResidualCat().double().to(device), x, _wavy)


def _matrix(blocks: diagnostics.BlockMatrix, names: list[str]) -> np.ndarray:
    whole = np.block([[blocks[v, w].cpu().numpy() for w in names] for v in names])
    return (whole + whole.T) / 2


def test_effective_rank_is_the_nuclear_norm_over_the_spectral_norm(graph: diagnostics.Graph) -> None:
    blocks = diagnostics.hessian_blocks(graph).total
    for v, w in blocks:
        values = np.linalg.svd(blocks[v, w].cpu().numpy(), compute_uv=False)
        expected = values.sum(-1) / values.max(-1)
        assert effective_rank(blocks[v, w]).cpu().numpy() == pytest.approx(expected, rel=1e-10)
    assert effective_rank(torch.eye(4)[:, :3]) == 3
    assert effective_rank(torch.zeros(2, 3)).isnan()


def test_stable_rank_is_at_most_effective_rank_at_most_rank() -> None:
    torch.manual_seed(0)
    block = torch.randn(20, 7, 3, dtype=torch.float64) @ torch.randn(20, 3, 5, dtype=torch.float64)
    d_eff = effective_rank(block)
    assert (stable_rank(block) < d_eff).all()
    assert (d_eff < 3).all()


def test_negative_curvature_is_the_sum_of_the_negative_eigenvalues(graph: diagnostics.Graph) -> None:
    blocks = diagnostics.hessian_blocks(graph)
    whole = blocks.total.assemble()
    for mass, matrix in zip(negative_curvature(whole), whole.cpu().numpy(), strict=True):
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        assert mass.item() == pytest.approx(-values[values < 0].sum(), rel=1e-12)
        assert mass > 1e-4


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_gauss_newton_part_of_a_convex_loss_has_no_negative_curvature(plan: Plan) -> None:
    model, x, names = build(plan)
    try:
        blocks = diagnostics.hessian_blocks(diagnostics.capture(model, x, _convex, names))
    except diagnostics.CaptureError:
        assume(False)
    for part in (blocks.gn, blocks.mean().gn):
        whole = part.assemble()
        assert (negative_curvature(whole) <= 1e-14 * whole.shape[-1] * torch.linalg.matrix_norm(whole)).all()


def test_symmetrising_averages_rounding_and_refuses_more(graph: diagnostics.Graph) -> None:
    total = diagnostics.hessian_blocks(graph).total
    whole = total.assemble()
    assert torch.equal(symmetrise(whole), symmetrise(whole).mT)
    assert (symmetrise(whole) - whole).abs().max() < 1e-15
    with pytest.raises(diagnostics.DiagnosticsError, match="not symmetric"):
        symmetrise(total["block1", "stem"])
    with pytest.raises(diagnostics.DiagnosticsError, match="not square"):
        symmetrise(total["merge", "stem"])
    with pytest.raises(diagnostics.DiagnosticsError, match="not square"):
        negative_curvature(torch.ones(3))


@pytest.mark.parametrize("which", ["smallest", "largest", "magnitude"])
@pytest.mark.parametrize("k", [None, 1, 3])
def test_eigenpairs_are_those_of_the_assembled_matrix(graph: diagnostics.Graph, which: str, k: int | None) -> None:
    total = diagnostics.hessian_blocks(graph).mean().total
    names = ["stem", "block1", "block2", "merge"]
    pairs = eigenpairs(total, k, which)
    matrix = _matrix(total, names)
    values = np.linalg.eigvalsh(matrix)
    key = {"smallest": values, "largest": -values, "magnitude": -np.abs(values)}[which]
    expected = values[np.argsort(key)][:k]
    assert pairs.nodes == tuple(names)
    assert pairs.values.cpu().numpy() == pytest.approx(expected, abs=1e-14)
    vectors = pairs.vectors.cpu().numpy()
    assert vectors.shape == (17, 17 if k is None else k)
    assert np.abs(matrix @ vectors - vectors * expected).max() < 1e-14
    assert np.abs(vectors.T @ vectors - np.eye(vectors.shape[1])).max() < 1e-13
    assert torch.equal(pairs.by_node["block2"], pairs.vectors[8:12])
    assert torch.allclose(pairs.energy.sum(0), torch.ones_like(pairs.values), rtol=1e-13)
    assert torch.allclose(pairs.energy[3], pairs.vectors[12:].square().sum(0))


def test_eigenpairs_of_samples_and_with_the_output(graph: diagnostics.Graph) -> None:
    total = diagnostics.hessian_blocks(graph).total
    pairs = eigenpairs(total, 2, include_output=True)
    assert pairs.nodes[-1] == "head"
    assert pairs.values.shape == (6, 2)
    assert pairs.vectors.shape == (6, 20, 2)
    assert pairs.by_node["head"].shape == (6, 3, 2)
    residual = symmetrise(total.assemble()) @ pairs.vectors - pairs.vectors * pairs.values.unsqueeze(1)
    assert residual.abs().max() < 1e-14


@pytest.mark.parametrize("which", ["smallest", "largest", "magnitude"])
def test_few_eigenpairs_of_a_big_matrix_by_lanczos_equal_the_dense_ones(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    wide = diagnostics.capture(Chain(5, 60, 60, 3).double(), torch.randn(8, 5, dtype=torch.float64), _wavy)
    total = diagnostics.hessian_blocks(wide).mean().total
    dense = eigenpairs(total, 4, which)
    monkeypatch.setattr(spectrum, "LANCZOS_FROM", 100)
    monkeypatch.setattr(torch.linalg, "eigh", None)  # would fail if it were called
    iterative = eigenpairs(total, 4, which)
    assert torch.allclose(iterative.values, dense.values, rtol=1e-10, atol=1e-15)
    overlap = (iterative.vectors * dense.vectors).sum(0).abs()
    assert torch.allclose(overlap, torch.ones_like(overlap), rtol=1e-8)


def test_repeated_eigenvalues_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "LANCZOS_FROM", 100)
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(120, 120, dtype=torch.float64)).Q
    values = torch.linspace(1, 2, 120, dtype=torch.float64)
    values[:5] = -3.0
    for matrix, expected in (((basis * values) @ basis.T, [-3.0] * 5), (torch.zeros(120, 120).double(), [0.0] * 5)):
        found, vectors = spectrum._decompose(symmetrise(matrix), 5, "smallest")
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
        assert torch.allclose(vectors.T @ vectors, torch.eye(5, dtype=torch.float64), atol=1e-10)


def test_a_missed_eigenvalue_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "LANCZOS_FROM", 100)
    real = spectrum.eigsh

    def forgetful(matrix, k, **options):
        values, vectors = real(matrix, k=k + (k > 1), **options)
        kept = np.argsort(values)[k > 1 :]  # without the smallest, in the first run
        return values[kept], vectors[:, kept]

    monkeypatch.setattr(spectrum, "eigsh", forgetful)
    matrix = torch.diag(torch.arange(-50.0, 70.0).double())
    values, _ = spectrum._decompose(matrix, 3, "smallest")
    assert values.tolist() == pytest.approx([-50, -49, -48])


def test_eigenpairs_refuse_what_does_not_exist(graph: diagnostics.Graph) -> None:
    total = diagnostics.hessian_blocks(graph).mean().total
    for k in (0, 18):
        with pytest.raises(ValueError, match="k must be between 1 and 17"):
            eigenpairs(total, k)
    with pytest.raises(ValueError, match="which must be"):
        eigenpairs(total, 1, "LA")
    output = diagnostics.hessian_blocks(graph, pairs=[("head", "head")]).mean().total
    with pytest.raises(diagnostics.DiagnosticsError, match="pass include_output=True"):
        eigenpairs(output)


def test_the_escape_direction_is_downhill_to_first_and_second_order(graph: diagnostics.Graph) -> None:
    blocks = diagnostics.hessian_blocks(graph)
    names = ["stem", "block1", "block2", "merge"]
    gradient = {name: signal.sum(0) for name, signal in differentiate(graph).signals.items()}
    escape = escape_direction(blocks, gradient)
    assert escape is not None
    matrix = _matrix(blocks.mean().total, names)
    vector = torch.cat([escape.direction[name] for name in names]).cpu().numpy()
    assert escape.curvature == pytest.approx(np.linalg.eigvalsh(matrix)[0], rel=1e-12)
    assert np.linalg.norm(vector) == pytest.approx(1, rel=1e-13)
    assert vector @ matrix @ vector == pytest.approx(escape.curvature, rel=1e-10)
    slope = vector @ torch.cat([gradient[name] for name in names]).cpu().numpy()
    assert escape.slope == pytest.approx(slope, rel=1e-12)
    assert slope < 0
    assert sum(escape.energy.values()) == pytest.approx(1, rel=1e-13)
    assert escape.energy["block2"] == pytest.approx((vector[8:12] ** 2).sum())

    opposite = escape_direction(blocks, {name: -part for name, part in gradient.items()})
    assert opposite is not None
    assert torch.equal(opposite.direction["stem"], -escape.direction["stem"])
    unsigned = escape_direction(blocks.mean())
    assert unsigned is not None
    assert unsigned.slope is None
    assert max(part.max() for part in unsigned.direction.values()) == max(
        part.abs().max() for part in unsigned.direction.values()
    )


def test_moving_along_the_escape_direction_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = ResidualCat().double()
    x = torch.randn(6, 5, dtype=torch.float64)
    graph = diagnostics.capture(model, x, _wavy)
    gradient = {name: signal.sum(0) for name, signal in differentiate(graph).signals.items()}
    escape = escape_direction(diagnostics.hessian_blocks(graph), gradient)
    assert escape is not None

    def loss_at(step: float) -> float:
        handles = [
            module.register_forward_hook(lambda _m, _i, out, part=escape.direction[name]: out + step * part)
            for name, module in model.named_children()
            if name in ("stem", "block1", "block2")
        ]
        # "merge" is a Sequential whose node is its last module
        handles.append(model.merge.register_forward_hook(lambda _m, _i, out: out + step * escape.direction["merge"]))
        loss = _wavy(model(x)).item()
        for handle in handles:
            handle.remove()
        return loss

    t = 1e-2
    change = loss_at(t) - loss_at(0)
    assert change == pytest.approx(escape.slope * t + 0.5 * escape.curvature * t**2, abs=3 * t**3)
    second = (loss_at(t) - 2 * loss_at(0) + loss_at(-t)) / t**2
    assert second == pytest.approx(escape.curvature, rel=1e-2)
    assert change < 0


def test_there_is_no_escape_where_nothing_curves_down() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    blocks = diagnostics.hessian_blocks(diagnostics.capture(model, torch.randn(4, 5, dtype=torch.float64), _convex))
    assert escape_direction(blocks) is None
    assert escape_direction(blocks, include_output=True) is None


def test_a_gradient_that_does_not_fit_is_named(graph: diagnostics.Graph) -> None:
    blocks = diagnostics.hessian_blocks(graph)
    signals = differentiate(graph).signals
    with pytest.raises(KeyError, match="no part for node 'stem'"):
        escape_direction(blocks, {"merge": signals["merge"].sum(0)})
    with pytest.raises(ValueError, match="sum the gradient over the batch"):
        escape_direction(blocks, signals)
