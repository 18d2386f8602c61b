"""Gauss-Newton factors: exact against double back-propagation, cut ones against their bounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diagnostics
from diagnostics.blocks.gn_factors import gauss_newton_factors
from tests.helpers.networks import Attention, CalledTwice, Chain, DeadEnd, Diamond, Normalised, ResidualCat
from tests.helpers.oracle import double_backprop
from tests.helpers.random_dags import Plan, build, plans

TOLERANCE = 1e-12


def _indefinite(z: Tensor) -> Tensor:
    """A loss with curvature of both signs."""
    return (torch.sin(z) * z).sum() / len(z)


def _cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z), device=z.device) % z.shape[1])


@pytest.mark.parametrize("loss", [_indefinite, _cross_entropy])
@pytest.mark.parametrize(
    ("build_model", "shape", "names", "output"),
    [
        (ResidualCat, (3, 5), ["stem", "block1", "block2", "merge"], "head"),
        (Diamond, (3, 5), ["stem", "left", "right", "merge"], "head"),
        (CalledTwice, (3, 5), ["enter", "step", "step@1"], "head"),
        (Normalised, (3, 5), ["layers.0", "layers.1", "layers.2"], "head"),
        (Attention, (2, 4, 3), ["q", "k", "v", "out"], "output"),
    ],
)
def test_factors_without_a_cut_are_exact(build_model, shape, names, output, loss, device: torch.device) -> None:
    torch.manual_seed(0)
    model, x = build_model().double(), torch.randn(shape, dtype=torch.float64)
    expected = double_backprop(model, x, loss, names, output).per_sample("gn")
    nodes = names if output == "output" else None
    factors = gauss_newton_factors(diagnostics.capture(model.to(device), x.to(device), loss, nodes))
    assert factors.nodes == (*names, output)
    for (v, w), block in expected.items():
        assert (factors[v, w].cpu() - block).norm() <= TOLERANCE * block.norm()
        assert not factors.factors(v, w).bound.any()
    averaged = factors.mean()
    assert all(
        (averaged[pair].cpu() - block.sum(0)).norm() <= TOLERANCE * block.norm() for pair, block in expected.items()
    )


def test_the_rank_of_cross_entropy_is_one_less_than_its_classes() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 5, dtype=torch.float64)
    graph = diagnostics.capture(Chain(5, 9, 8, 7, 4).double(), x, _cross_entropy)
    assert set(gauss_newton_factors(graph).ranks.values()) == {3}
    assert set(gauss_newton_factors(graph, rank=2).ranks.values()) == {2}
    narrow = diagnostics.capture(Chain(5, 9, 2, 7, 4).double(), x, _cross_entropy)
    assert gauss_newton_factors(narrow).ranks == {"0": 2, "1": 2, "2": 3, "3": 3}  # what "1" has no entries for is gone


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(), rank=st.integers(0, 3), tolerance=st.sampled_from([0.8, 0.3, 0.05, 1e-4]))
def test_bounds_hold_on_random_dags(plan: Plan, rank: int, tolerance: float) -> None:
    model, x, names = build(plan)
    try:
        graph = diagnostics.capture(model, x, _indefinite, names)
    except diagnostics.CaptureError:
        assume(False)  # the chosen nodes miss the output
    exact = gauss_newton_factors(graph)
    gn = diagnostics.hessian_blocks(graph).gn
    scale = gn.assemble().norm()
    for v, w in gn:
        assert (exact[v, w] - gn[v, w]).norm() <= TOLERANCE * gn[v, w].norm() + 1e-15 * scale
    for cut in (gauss_newton_factors(graph, rank=rank), gauss_newton_factors(graph, tolerance=tolerance)):
        for v in gn.nodes:
            lost = torch.linalg.matrix_norm(exact.root(v) - cut.root(v))
            size = torch.linalg.matrix_norm(exact.root(v))
            rounding = 1e-13 * (size + scale.sqrt())
            assert (lost <= cut.bounds[v] + rounding).all()
            assert cut.ranks[v] <= exact.ranks[v]
            for w in gn.nodes:
                block = cut.factors(v, w)
                assert (block.error(gn[v, w]) <= block.bound * (1 + 1e-10) + 1e-13 * scale).all()


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(), tolerance=st.sampled_from([0.8, 0.3, 0.05, 1e-4]))
def test_a_tolerance_is_kept_at_every_node_and_sample(plan: Plan, tolerance: float) -> None:
    model, x, names = build(plan)
    try:
        graph = diagnostics.capture(model, x, _indefinite, names)
    except diagnostics.CaptureError:
        assume(False)
    exact, cut = gauss_newton_factors(graph), gauss_newton_factors(graph, tolerance=tolerance)
    for v in exact.nodes:
        size = torch.linalg.matrix_norm(exact.root(v))
        assert (cut.bounds[v] <= tolerance * size * (1 + 1e-12)).all()  # known without `exact`
        assert (torch.linalg.matrix_norm(exact.root(v) - cut.root(v)) <= tolerance * size * (1 + 1e-10)).all()
        assert cut.ranks[v] <= exact.ranks[v]


def test_ranks_fall_as_the_tolerance_grows() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(
        Chain(6, 12, 12, 12, 10).double(), torch.randn(2, 6, dtype=torch.float64), lambda z: z.square().sum()
    )
    exact = gauss_newton_factors(graph)
    assert set(exact.ranks.values()) == {10}
    ranks = [gauss_newton_factors(graph, tolerance=t).ranks["0"] for t in (0.01, 0.1, 0.3, 0.6, 0.9)]
    assert ranks == sorted(ranks, reverse=True)
    values = torch.linalg.svdvals(exact.root("0"))
    tails = (values.square().flip(1).cumsum(1).flip(1) / values.square().sum(1, keepdim=True)).sqrt()
    for tolerance, rank in zip((0.01, 0.1, 0.3, 0.6, 0.9), ranks, strict=True):
        assert rank >= (tails > tolerance).sum(1).max()  # no factor of that error is thinner
    assert ranks[-1] < 5


def _diagonal_chain(curvature: Tensor, *layers: Tensor) -> diagnostics.Graph:
    """Diagonal linear layers under the loss ½ zᵀ diag(curvature) z: every singular value is written down."""
    chain = nn.Sequential(*(nn.Linear(len(curvature), len(curvature), bias=False) for _ in range(len(layers) + 1)))
    with torch.no_grad():
        for layer, diagonal in zip(chain[1:], layers, strict=True):
            layer.weight.copy_(torch.diag(diagonal))
    x = torch.randn(1, len(curvature), dtype=torch.float64)
    every = [str(i) for i in range(len(chain))]
    return diagnostics.capture(chain.double(), x, lambda z: 0.5 * (curvature * z.square()).sum(), every)


def _assert_keeps(graph: diagnostics.Graph, tolerance: float) -> None:
    exact, cut = gauss_newton_factors(graph), gauss_newton_factors(graph, tolerance=tolerance)
    assert sum(cut.ranks.values()) < sum(exact.ranks.values())
    for v in exact.nodes:
        allowed = tolerance * torch.linalg.matrix_norm(exact.root(v)) * (1 + 1e-12)
        assert (cut.bounds[v] <= allowed).all()
        assert (torch.linalg.matrix_norm(exact.root(v) - cut.root(v)) <= allowed).all()


def test_what_later_layers_amplify_is_not_cut() -> None:
    small = torch.tensor([1.0, 1e-4, 1e-4, 1e-4], dtype=torch.float64)  # singular values 1, 0.01, …
    grow = torch.tensor([1.0, 100.0, 0.01, 0.01], dtype=torch.float64)
    _assert_keeps(_diagonal_chain(small, grow, grow), 0.5)


def test_what_many_layers_cut_adds_up_within_the_tolerance() -> None:
    flat = torch.cat([torch.ones(1), torch.full((63,), 0.05**2)]).double()
    _assert_keeps(_diagonal_chain(flat, *[torch.ones(64).double()] * 6), 0.3)


def test_errors_of_a_fixed_rank_are_real_and_below_their_bounds() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(
        Chain(6, 12, 12, 12, 10).double(), torch.randn(2, 6, dtype=torch.float64), lambda z: z.square().sum()
    )
    table = gauss_newton_factors(graph, rank=4).compare(diagnostics.hessian_blocks(graph).gn)
    assert (table.error > 1e-3 * table.norm).all()
    assert (table.error <= table.bound).all()


def test_the_bound_of_a_linear_chain_is_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    graph = diagnostics.capture(model, x, lambda z: 0.5 * z.square().sum(), ["0", "1", "2"])
    cut = gauss_newton_factors(graph, rank=2)
    # ∇²ℓ = I, so A_z is orthogonal: two of its six unit singular values are kept, whichever
    assert torch.allclose(cut.bounds["2"], torch.full((2,), 2.0, dtype=torch.float64))
    bound = 2.0
    kept = cut.root("2")
    for name, weight in (("1", model[2].weight.detach()), ("0", model[1].weight.detach())):
        carried = weight.T @ kept
        values = torch.linalg.svdvals(carried)
        bound = torch.linalg.matrix_norm(weight, 2).item() * bound + values[0, 2:].norm().item()
        assert cut.bounds[name].tolist() == pytest.approx([bound, bound], rel=1e-12)
        kept = cut.root(name)


def test_a_loss_without_curvature_and_a_node_off_the_path_have_rank_zero() -> None:
    torch.manual_seed(0)
    factors = gauss_newton_factors(diagnostics.capture(DeadEnd(), torch.randn(2, 5), _cross_entropy))
    assert factors.ranks["unused"] == 0
    assert not factors["unused", "used"].any()
    assert factors["unused", "used"].shape == (2, 2, 4)
    linear = gauss_newton_factors(diagnostics.capture(DeadEnd(), torch.randn(2, 5), lambda z: z.sum()))
    assert set(linear.ranks.values()) == {0}
    assert not linear.assemble().any()


def test_coupled_samples_give_joint_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 3)).double()
    graph = diagnostics.capture(model, torch.randn(4, 3, dtype=torch.float64), _cross_entropy, ["0"])
    gn = diagnostics.hessian_blocks(graph).gn
    factors = gauss_newton_factors(graph)
    assert factors["0", "0"].shape == (1, 8, 8)
    assert (factors["0", "0"] - gn["0", "0"]).norm() <= TOLERANCE * gn["0", "0"].norm()
    assert (factors.mean()["0", "0"] - gn.mean()["0", "0"]).norm() <= TOLERANCE * gn["0", "0"].norm()


def test_wrong_arguments_are_named() -> None:
    graph = diagnostics.capture(Chain(5, 4, 3), torch.randn(3, 5), _cross_entropy)
    with pytest.raises(ValueError, match="give either rank or tolerance"):
        gauss_newton_factors(graph, rank=1, tolerance=0.1)
    for wrong in ({"rank": -1}, {"tolerance": 1.0}, {"tolerance": float("nan")}):
        with pytest.raises(ValueError, match="need rank ≥ 0 and 0 ≤ tolerance < 1"):
            gauss_newton_factors(graph, **wrong)
    with pytest.raises(diagnostics.MemoryBudgetError, match="raise memory_limit"):
        gauss_newton_factors(graph, memory_limit=10)
