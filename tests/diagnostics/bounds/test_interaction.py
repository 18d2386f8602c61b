"""Interaction radius and band errors, from tables with known entries and from assembled Hessians."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diagnostics
from diagnostics.bounds.gains import local_gains
from diagnostics.bounds.interaction import a_priori_radius, band_errors, interaction_radius
from diagnostics.bounds.resonance import decay_bounds
from tests.helpers.networks import Chain, Diamond, ResidualCat
from tests.helpers.random_dags import Plan, build, plans


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z + z.square()).sum() / len(z)


def _table(resonance: list[list[float]], distance: list[list[float]]) -> diagnostics.MetricTable:
    r = torch.tensor(resonance, dtype=torch.float64)
    coupling = r / (r.diagonal()[:, None] * r.diagonal()).sqrt()
    names = tuple("abcdef"[: len(r)])
    return diagnostics.MetricTable(names, r, coupling, r, r, r / 2, r / 3, torch.tensor(distance))


CHAIN = _table(
    [[1.0, 0.5, 0.05, 0.2], [0.5, 4.0, 0.3, 0.0], [0.05, 0.3, 1.0, 0.4], [0.2, 0.0, 0.4, 1.0]],
    [[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]],
)


def test_the_radius_is_the_largest_distance_of_a_pair_that_interacts() -> None:
    assert interaction_radius(CHAIN, 0.5) == 0  # C is .25, .05, .2, .15, 0, .4
    assert interaction_radius(CHAIN, 0.3) == 1
    assert interaction_radius(CHAIN, 0.2) == 1  # .2 does not exceed .2
    assert interaction_radius(CHAIN, 0.19) == 3
    # R(v,w) ≤ ε R(v,v) in both orders: .5/1 is the largest ratio of neighbours, whatever R(b,b) is
    assert interaction_radius(CHAIN, 0.45, criterion="resonance") == 1
    assert interaction_radius(CHAIN, 0.5, criterion="resonance") == 0
    # the least of the two own resonances counts, not the least of all
    apart = _table([[4.0, 0.5, 0.0], [0.5, 8.0, 0.0], [0.0, 0.0, 0.1]], [[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    assert interaction_radius(apart, 0.13, criterion="resonance") == 0
    assert interaction_radius(apart, 0.12, criterion="resonance") == 1


def test_unconnected_pairs_that_interact_have_an_infinite_radius_and_absent_ones_none() -> None:
    inf = math.inf
    assert interaction_radius(_table([[1.0, 0.5], [0.5, 1.0]], [[0, inf], [inf, 0]]), 0.1) == inf
    assert interaction_radius(_table([[1.0, 0.0], [0.0, 0.0]], [[0, 1], [1, 0]]), 0.1) == 0
    assert interaction_radius(_table([[0.0, 1.0], [1.0, 0.0]], [[0, 1], [1, 0]]), 0.1) == 1
    with pytest.raises(ValueError, match="epsilon must be positive"):
        interaction_radius(CHAIN, 0)
    with pytest.raises(ValueError, match="criterion must be"):
        interaction_radius(CHAIN, 0.1, criterion="gap")
    with pytest.raises(diagnostics.DiagnosticsError, match="not finite"):
        interaction_radius(_table([[1.0, inf], [inf, 1.0]], [[0, 1], [1, 0]]), 0.1)


def test_the_radius_by_coupling_ignores_the_scale_of_activations_and_that_by_resonance_does_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 4), nn.LeakyReLU(0.3), nn.Linear(4, 4), nn.LeakyReLU(0.3), nn.Linear(4, 4), nn.LeakyReLU(0.3)
    )
    model.append(nn.Linear(4, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    radii = []
    for scale in (1, 1e4):
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[0].bias.mul_(scale)
            model[2].weight.div_(scale)
        table = diagnostics.metrics(diagnostics.hessian_blocks(diagnostics.capture(model, x, _wavy)))
        epsilons = torch.logspace(-2, 2, 17).tolist()
        radii.append([[interaction_radius(table, e, c) for e in epsilons] for c in ("coupling", "resonance")])
    assert radii[0][0] == radii[1][0]
    assert radii[0][1] != radii[1][1]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ratio=st.floats(0.01, 0.99), epsilon=st.floats(1e-6, 2), constant=st.floats(0.01, 100))
def test_the_a_priori_radius_is_the_least_that_satisfies_its_definition(
    ratio: float, epsilon: float, constant: float
) -> None:
    k = int(a_priori_radius(ratio, epsilon, constant))
    assert all(constant * ratio**d <= epsilon for d in range(k + 1, k + 50))
    assert k == 0 or constant * ratio**k > epsilon


def test_a_model_that_does_not_decay_has_no_radius() -> None:
    assert a_priori_radius(1.0, 0.1) == math.inf
    assert a_priori_radius(1.3, 0.1, 1e-9) == math.inf
    assert a_priori_radius(1.0, 2.0) == 0
    assert a_priori_radius(0.0, 0.1) == 0
    assert a_priori_radius(0.5, 0.25) == 1  # .5^2 = .25
    with pytest.raises(ValueError, match="need ratio"):
        a_priori_radius(-0.1, 0.1)


def test_the_a_priori_radius_bounds_the_measured_decay_of_a_contracting_chain() -> None:
    torch.manual_seed(0)
    model = Chain(5, *[5] * 9, 3)
    with torch.no_grad():
        for layer in list(model)[:-1]:
            layer[0].weight.mul_(0.7 / torch.linalg.matrix_norm(layer[0].weight, 2))
        model[-1].weight.mul_(0.7 / torch.linalg.matrix_norm(model[-1].weight, 2))
    graph = diagnostics.capture(model.double(), torch.randn(4, 5, dtype=torch.float64), _wavy)
    figures, decay = local_gains(graph), decay_bounds(graph)
    assert figures.children == 1
    for epsilon in (0.5, 0.2, 0.1):
        k = a_priori_radius(figures.rho, epsilon)
        assert (decay.ratio[:, decay.distance > k] <= epsilon * (1 + 1e-12)).all()
        assert (decay.distance > k).any()


@pytest.mark.parametrize("part", ["total", "gn", "tensor"])
@pytest.mark.parametrize("model", [Diamond, ResidualCat])
def test_band_errors_equal_those_of_the_assembled_matrix(model: type[nn.Module], part: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64)
    blocks = diagnostics.hessian_blocks(diagnostics.capture(model().double(), x, _wavy))
    errors = band_errors(diagnostics.metrics(blocks, include_output=True), part)
    matrix = getattr(blocks.mean(), part)
    whole = matrix.assemble()
    layout = matrix.layout
    for i, k in enumerate(errors.bandwidth.tolist()):
        band = whole.clone()
        for a, v in enumerate(layout.names):
            for b, w in enumerate(layout.names):
                if layout.distances[a, b] > k:
                    band[layout.columns(v), layout.columns(w)] = 0
        outside = whole - band
        assert errors.frobenius[i].item() == pytest.approx(outside.norm().item(), rel=1e-12, abs=1e-15)
        share = (outside.norm() / whole.norm()).square().item()
        assert errors.share[i].item() == pytest.approx(share, rel=1e-12, abs=1e-15)
        assert torch.linalg.matrix_norm(outside, 2) <= errors.spectral[i] * (1 + 1e-12)
    assert errors.bandwidth.tolist() == sorted(set(layout.distances.flatten().tolist()))
    assert errors.share[-1] == 0


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_shares_of_random_dags_add_up_and_fall_with_bandwidth(plan: Plan) -> None:
    model, x, names = build(plan)
    try:
        graph = diagnostics.capture(model, x, _wavy, names)
    except diagnostics.CaptureError:
        assume(False)
    table = diagnostics.metrics(diagnostics.hessian_blocks(graph), include_output=True)
    assume(table.resonance.norm() > 0)
    errors = band_errors(table)
    assert errors.by_distance.sum().item() + errors.unconnected == pytest.approx(1, abs=1e-12)
    assert (errors.share.diff() <= 1e-15).all()
    kept = errors.by_distance.cumsum(0)
    assert torch.allclose(errors.share, 1 - kept, atol=1e-12)


def test_band_errors_print_and_refuse_a_zero_part() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    graph = diagnostics.capture(linear, torch.randn(6, 5, dtype=torch.float64), _wavy)
    table = diagnostics.metrics(diagnostics.hessian_blocks(graph), include_output=True)
    with pytest.raises(diagnostics.DiagnosticsError, match="tensor part of the Hessian is zero"):
        band_errors(table, "tensor")
    with pytest.raises(ValueError, match="part must be"):
        band_errors(table, "gap")
    assert len(str(band_errors(table)).splitlines()) == 2 + 2
