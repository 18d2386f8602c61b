"""Estimated metrics against the exact ones: unbiased, with honest errors, exact where they can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.errors import DiagnosticsError
from diagnostics.matrix_free.node_metrics import estimate_metrics
from diagnostics.matrix_free.shared_krylov import SharedKrylov
from diagnostics.matrix_free.square_norms import Samples, jackknife
from diagnostics.results.metric_table import MetricErrors, MetricTable
from tests.helpers.networks import Chain, DeadEnd, Diamond, ResidualCat

METRICS = ("resonance", "coupling", "stable_rank", "gn_gap", "gn_norm", "tensor_norm")
PLAIN: dict[str, Any] = {"deflate": 0, "exact_gn": False}


def wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


def _labelled(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z), device=z.device) % z.shape[1])


class Branches(nn.Module):
    """Nodes with more entries than probes: two branches into a nonlinear merge, one of them with a skip."""

    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(20, 40), nn.GELU())
        self.left, self.right = nn.Linear(40, 36), nn.Sequential(nn.Linear(40, 45), nn.SiLU())
        self.merge = nn.Sequential(nn.Linear(81, 44), nn.Tanh())
        self.head = nn.Linear(44, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.merge(torch.cat([torch.tanh(self.left(h)) + h[:, :36], self.right(h)], 1)))


def _graph(
    loss: Callable[[Tensor], Tensor] = _labelled, device: str | torch.device = "cpu", **options: Any
) -> diagnostics.Graph:
    torch.manual_seed(0)
    model = Branches().double().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2  # so that the tensor part is not small
    return diagnostics.capture(model, torch.randn(8, 20, dtype=torch.float64).to(device), loss, **options)


@pytest.fixture(scope="module")
def graph() -> diagnostics.Graph:
    return _graph()


@pytest.fixture(scope="module")
def exact(graph: diagnostics.Graph) -> MetricTable:
    return diagnostics.metrics(diagnostics.hessian_blocks(graph))


def _seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _errors(table: MetricTable) -> MetricErrors:
    assert table.standard_errors is not None
    return table.standard_errors


def _upper(values: Tensor) -> Tensor:
    v, w = torch.triu_indices(*values.shape)
    return values[v, w]


def _close(table: MetricTable, expected: MetricTable, tolerance: float) -> None:
    for name in METRICS:
        found, value = getattr(table, name), getattr(expected, name)
        assert torch.allclose(found, value, rtol=tolerance, atol=1e-14, equal_nan=True), name
        assert found.dtype == value.dtype
    assert table.nodes == expected.nodes
    assert torch.equal(table.distance, expected.distance)


@pytest.mark.parametrize("options", [{}, PLAIN, {"distribution": "gaussian"}, {"per_sample": True}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_as_many_probes_as_entries_are_exact(options: dict[str, Any], reduction: str, device: torch.device) -> None:
    graph = _graph(device=device, reduction=reduction)
    per_sample = options.get("per_sample", False)
    expected = diagnostics.metrics(diagnostics.hessian_blocks(graph), per_sample=per_sample)
    table = estimate_metrics(graph, 50, **options)
    _close(table, expected, 1e-9)
    for name in METRICS:
        assert (getattr(_errors(table), name) <= 1e-10 * getattr(expected, name)).all()


@pytest.mark.parametrize("options", [{}, PLAIN, {"exact_gn": False}, {"per_sample": True}], ids=str)
def test_many_probes_converge(options: dict[str, Any], device: torch.device) -> None:
    """Nodes with a few more entries than probes: errors are small, and true."""
    torch.manual_seed(0)
    model = Branches().double().to(device)
    x = torch.randn(3, 20, dtype=torch.float64).to(device)
    graph = diagnostics.capture(model, x, _labelled)
    expected = diagnostics.metrics(diagnostics.hessian_blocks(graph), per_sample=options.get("per_sample", False))
    table = estimate_metrics(graph, 35, generator=_seed(3), spectral_tolerance=1e-6, **options)
    for name in METRICS:
        value, error = getattr(expected, name), getattr(_errors(table), name)
        assert ((getattr(table, name) - value).abs() <= 5 * error + 1e-5 * value).all(), name
        assert (error <= (0.3 if name == "stable_rank" else 0.2) * value + 1e-12).all()


GAUSSIAN = {"exact_gn": False, "distribution": "gaussian"}


@pytest.mark.parametrize(
    "options", [PLAIN, {"exact_gn": False}, pytest.param(GAUSSIAN, marks=pytest.mark.slow)], ids=str
)
def test_squares_are_unbiased(options: dict[str, Any], graph: diagnostics.Graph, exact: MetricTable) -> None:
    """z-tests of the mean of R², ‖G‖² and ‖T‖² over many seeds: the deflated directions owe nothing to the probes."""
    runs = [estimate_metrics(graph, 4, generator=_seed(s), spectral_rounds=0, **options) for s in range(80)]
    for name in ("resonance", "gn_norm", "tensor_norm"):
        squares = torch.stack([_upper(getattr(table, name)).square() for table in runs])
        expected = _upper(getattr(exact, name)).square()
        spread = squares.std(0)
        sampled = spread > 1e-10 * expected  # a part of low rank is exact behind enough directions
        assert sampled.sum() >= (9 if name != "tensor_norm" else 6)
        z = (squares.mean(0) - expected)[sampled] / spread[sampled] * len(runs) ** 0.5
        assert z.abs().max() < 4, name


@pytest.mark.parametrize("options", [{}, PLAIN, {"exact_gn": False}, {"per_sample": True}], ids=str)
def test_intervals_cover_the_truth(options: dict[str, Any], graph: diagnostics.Graph) -> None:
    """95 % intervals over 24 seeds: at least 90 % of the pairs, and the errors are not merely large."""
    expected = diagnostics.metrics(diagnostics.hessian_blocks(graph), per_sample=options.get("per_sample", False))
    quantile = float(scipy.stats.t.ppf(0.975, 29))
    tables = [estimate_metrics(graph, generator=_seed(s), **options) for s in range(24)]
    for name in ("resonance", "coupling", "gn_gap", "stable_rank"):
        value = _upper(getattr(expected, name))
        found = torch.stack([_upper(getattr(table, name)) for table in tables])
        error = torch.stack([_upper(getattr(_errors(table), name)) for table in tables])
        sampled = error.mean(0) > 1e-9 * value.abs()
        assert sampled.sum() >= 6
        inside = ((found - value).abs() <= quantile * error)[:, sampled]
        assert inside.double().mean() >= 0.9, name
        if name != "stable_rank":  # whose error also holds what iterations may have left out
            ratio = (
                error[:, sampled].square().mean(0).sqrt() / (found[:, sampled] - value[sampled]).square().mean(0).sqrt()
            )
            assert 0.6 < ratio.median() < 1.8, name


def test_common_probes_and_deflation_make_the_gap_better(graph: diagnostics.Graph, exact: MetricTable) -> None:
    """The noise of T and G from one probe cancels in their ratio, in part; what remains is made small."""
    deviation: dict[str, list[Tensor]] = {"independent": [], "common": [], "default": []}
    truth = _upper(exact.gn_gap)
    bent = truth > 0
    for seed in range(16):
        one = estimate_metrics(graph, generator=_seed(seed), spectral_rounds=0, **PLAIN)
        other = estimate_metrics(graph, generator=_seed(1000 + seed), spectral_rounds=0, **PLAIN)
        full = estimate_metrics(graph, generator=_seed(seed), spectral_rounds=0)
        pairs = {"independent": (one, other), "common": (one, one), "default": (full, full)}
        for name, (tensor, gn) in pairs.items():
            gap = _upper(tensor.tensor_norm / gn.gn_norm)
            deviation[name].append((gap / truth - 1)[bent].square().mean())
    size = {name: torch.stack(squares).mean().sqrt() for name, squares in deviation.items()}
    assert size["common"] < 0.95 * size["independent"]
    assert size["default"] < 0.4 * size["common"]


def test_the_stable_rank_is_biased_by_no_more_than_the_tolerance(graph: diagnostics.Graph, exact: MetricTable) -> None:
    for tolerance in (1e-1, 1e-3):
        table = estimate_metrics(graph, generator=_seed(0), spectral_tolerance=tolerance)
        found = (table.resonance / table.stable_rank.sqrt()) / (exact.resonance / exact.stable_rank.sqrt())
        assert (found <= 1 + 1e-9).all()  # a lower bound of the spectral norm
        assert (found >= 1 - 2 * tolerance).all()
    rough = estimate_metrics(graph, 4, generator=_seed(0), deflate=0, spectral_rounds=0)
    sharp = estimate_metrics(graph, 4, generator=_seed(0), deflate=0, spectral_tolerance=1e-4)
    assert (sharp.stable_rank <= rough.stable_rank + 1e-12).all()
    assert (sharp.stable_rank < 0.9 * rough.stable_rank).any()
    assert _errors(sharp).products > _errors(rough).products


def test_the_error_of_the_stable_rank_holds_what_iterations_left_out() -> None:
    """Without a tensor part R is exact, and D is wrong by the spectral norm alone."""
    torch.manual_seed(0)
    model = Chain(20, 40, 45, 50, 5, activation=nn.ReLU).double()
    graph = diagnostics.capture(model, torch.randn(8, 20, dtype=torch.float64), _labelled)
    expected = diagnostics.metrics(diagnostics.hessian_blocks(graph))
    rough = estimate_metrics(graph, 3, deflate=0, spectral_rounds=0)
    assert torch.allclose(rough.resonance, expected.resonance, rtol=1e-10)
    wrong = rough.stable_rank - expected.stable_rank
    assert (wrong > 0.02 * expected.stable_rank).any()
    assert (_errors(rough).stable_rank >= 0.3 * wrong).all()


def test_a_node_with_few_entries_makes_its_pairs_exact(graph: diagnostics.Graph, exact: MetricTable) -> None:
    """36 entries, 38 probes: the samples from the other node of the pair are not needed."""
    table = estimate_metrics(graph, 38, **PLAIN)
    small = table.nodes.index("left")
    for name in ("resonance", "gn_norm", "tensor_norm"):
        assert torch.allclose(getattr(table, name)[small], getattr(exact, name)[small], rtol=1e-10, atol=1e-15)
        assert not getattr(_errors(table), name)[small].any()
        assert not getattr(_errors(table), name)[:, small].any()
    assert _errors(table).resonance[0, 2] > 0


@pytest.mark.parametrize("samples", [1, 3])
def test_shared_subspaces_find_all_spectral_norms(samples: int) -> None:
    torch.manual_seed(0)
    sizes = {"a": 30, "b": 20, "c": 40}
    n = sum(sizes.values())
    rotation = torch.linalg.qr(torch.randn(samples, n, n, dtype=torch.float64))[0]
    matrix = rotation * torch.linspace(1, 0.01, n, dtype=torch.float64) ** 3 @ rotation.mT
    splits = list(sizes.values())
    columns = dict(zip(sizes, matrix.split(splits, 2), strict=True))
    blocks = {w: dict(zip(sizes, column.split(splits, 1), strict=True)) for w, column in columns.items()}
    asked: list[int] = []

    def multiply(w: str, x: Tensor) -> dict[str, Tensor]:
        asked.append(x.shape[2])
        assert torch.allclose(x.norm(dim=1), torch.ones_like(x[:, 0]))
        return {v: block @ x for v, block in blocks[w].items()}

    starts = {w: torch.randn(samples, size, 3, dtype=torch.float64) for w, size in sizes.items()}
    first = {w: {v: block @ starts[w] for v, block in blocks[w].items()} for w in sizes}
    found, missing = SharedKrylov(starts, first, multiply).run(1e-7, 50)
    exact_norms = torch.stack([torch.stack([torch.linalg.matrix_norm(blocks[w][v], 2) for w in sizes]) for v in sizes])
    assert torch.allclose(found, exact_norms, rtol=1e-5)
    assert (missing <= 1e-7).all()
    assert sum(asked) < n  # fewer products than a full column each
    _, missing = SharedKrylov(starts, first, multiply).run(1e-7, 1)
    assert (missing > 1e-7).any()  # says that it has not converged


def test_every_pair_is_sampled_from_both_sides(graph: diagnostics.Graph, exact: MetricTable) -> None:
    """The variance of an off-diagonal pair is that of twice as many probes."""
    runs = [estimate_metrics(graph, 10, generator=_seed(s), spectral_rounds=0, **PLAIN) for s in range(50)]
    for v, w in ((0, 1), (0, 2), (1, 3)):
        block = diagnostics.hessian_blocks(graph).mean().total[exact.nodes[v], exact.nodes[w]]
        squares = torch.stack([t.resonance[v, w].square() for t in runs])
        gram, turned = block.T @ block, block @ block.T
        variances = [2 * (g.square().sum() - g.diagonal().square().sum()) / 10 for g in (gram, turned)]
        expected = (sum(variances) / 4).sqrt()
        assert 0.7 < squares.std() / expected < 1.4
        assert torch.equal(runs[0].resonance, runs[0].resonance.T)


@pytest.mark.parametrize("exact_gn", [None, False])
def test_conventions_for_zero_and_nan(exact_gn: bool | None) -> None:
    torch.manual_seed(0)
    model = DeadEnd().double()
    graph = diagnostics.capture(model, torch.randn(4, 5, dtype=torch.float64), wavy)
    _close(estimate_metrics(graph, exact_gn=exact_gn), diagnostics.metrics(diagnostics.hessian_blocks(graph)), 1e-9)

    class Wide(nn.Module):  # with probes instead of unit vectors
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(5, 40), nn.Linear(40, 42), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.used(x))
            self.unused(h)
            return self.head(h)

    wide = diagnostics.capture(Wide().double(), torch.randn(4, 5, dtype=torch.float64), wavy)
    table = estimate_metrics(wide, exact_gn=exact_gn)
    expected = diagnostics.metrics(diagnostics.hessian_blocks(wide))
    for name in METRICS:
        assert torch.equal(getattr(table, name).isnan(), getattr(expected, name).isnan()), name
        assert torch.equal(getattr(table, name) == 0, getattr(expected, name) == 0), name
        assert torch.equal(getattr(_errors(table), name).isnan(), getattr(expected, name).isnan()), name


def test_one_node_and_the_output() -> None:
    torch.manual_seed(0)
    model = Chain(20, 40, 40, 35).double()
    x = torch.randn(6, 20, dtype=torch.float64)
    graph = diagnostics.capture(model, x, wavy, ["1"])
    alone = estimate_metrics(graph)
    assert alone.nodes == ("1",)
    assert estimate_metrics(graph, include_output=True).nodes == ("1", "output")
    exact_alone = diagnostics.metrics(diagnostics.hessian_blocks(graph))
    assert (alone.resonance - exact_alone.resonance).abs() <= 4 * _errors(alone).resonance
    assert (alone.stable_rank - exact_alone.stable_rank).abs() <= 4 * _errors(alone).stable_rank


def test_coupled_samples_have_the_batch_means_of_metrics() -> None:
    torch.manual_seed(0)
    normalised = nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
    model = nn.Sequential(nn.Linear(5, 6), normalised, nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    graph = diagnostics.capture(model, torch.randn(7, 5, dtype=torch.float64), wavy, ["0", "2"])
    assert graph.coupled
    _close(estimate_metrics(graph), diagnostics.metrics(diagnostics.hessian_blocks(graph)), 1e-9)
    with pytest.raises(DiagnosticsError, match=r"samples of this batch are coupled.*model\.eval"):
        estimate_metrics(graph, per_sample=True)
    with pytest.raises(DiagnosticsError, match="exact_gn=True needs"):
        estimate_metrics(graph, exact_gn=True)


def test_a_wide_output_is_not_differentiated_entry_by_entry() -> None:
    torch.manual_seed(0)
    model = Branches(outputs=200).double()
    x = torch.randn(4, 20, dtype=torch.float64)
    graph = diagnostics.capture(model, x, wavy, ["stem", "merge"])
    wide = _errors(estimate_metrics(graph, 30, generator=_seed(0), spectral_rounds=0))
    assert wide.products == wide.passes == 2 * 40  # 30 probes and 10 directions at each of two nodes
    many = _errors(estimate_metrics(graph, 30, generator=_seed(0), spectral_rounds=0, exact_gn=True))
    assert many.products == 80
    assert many.passes == 200
    assert not many.gn_norm.any()


def test_the_global_random_state_and_the_generator() -> None:
    graph = _graph()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = estimate_metrics(graph, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.resonance, estimate_metrics(graph, 5).resonance)
    generator = _seed(1)
    second = estimate_metrics(graph, 5, generator=generator)
    assert not torch.equal(second.resonance, first.resonance)
    assert not torch.equal(second.resonance, estimate_metrics(graph, 5, generator=generator).resonance)
    assert not any(value.requires_grad for value in (first.resonance, first.coupling, first.stable_rank))


def test_memory_is_kept_by_taking_probes_in_parts() -> None:
    graph = _graph()
    little = estimate_metrics(graph, 31, memory_limit=3 * 8 * graph.whole.entries, exact_gn=True)
    assert torch.allclose(little.resonance, estimate_metrics(graph, 31).resonance, rtol=1e-10)


def test_bad_arguments_are_refused() -> None:
    graph = _graph()
    with pytest.raises(ValueError, match="probes must be at least 3"):
        estimate_metrics(graph, 2)
    with pytest.raises(ValueError, match="distribution must be"):
        estimate_metrics(graph, distribution="cauchy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deflate and spectral_rounds"):
        estimate_metrics(graph, deflate=-1)
    with pytest.raises(ValueError, match="spectral_tolerance more than 0"):
        estimate_metrics(graph, spectral_tolerance=0.0)


def test_tables_show_errors_and_convert(graph: diagnostics.Graph) -> None:
    table = estimate_metrics(graph, 5)
    assert "±" in str(table)
    assert json.loads(json.dumps(table.to_dict()))["standard_errors"]["probes"] == 5
    frame = table.to_pandas()
    assert frame["resonance_error"].gt(0).any()
    assert len(table.by_distance().rows) == 3
    plain = diagnostics.metrics(diagnostics.hessian_blocks(diagnostics.capture(Diamond(), torch.randn(3, 5), wavy)))
    assert "±" not in str(plain)
    assert "standard_errors" not in plain.to_dict()
    assert "resonance_error" not in plain.to_pandas()


def test_the_control_variate_takes_a_known_error_away() -> None:
    """Samples that are a line in the control have no error left; the jackknife says so."""
    torch.manual_seed(0)
    control = torch.rand(1, 1, 1, 20, dtype=torch.float64) + 1
    known = torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    samples, reference = Samples(known, 2 * control + 1), Samples(torch.zeros_like(known), control)
    full, without = samples.controlled(reference, torch.full_like(known, 1.7))
    assert torch.allclose(full, known + 2 * 1.7 + 1)
    assert jackknife(full, without).item() < 1e-12
    plain, plain_without = samples.estimates()
    assert torch.allclose(plain, known + samples.random.mean(-1))
    assert torch.allclose(jackknife(plain, plain_without), samples.random.std(-1) / 20**0.5)
    constant = Samples(known, torch.full_like(control, 2.0))
    assert torch.allclose(samples.controlled(constant, known + 2.0)[0], plain)


def test_a_residual_network_of_small_nodes_is_exact() -> None:
    torch.manual_seed(0)
    model = ResidualCat().double()
    graph = diagnostics.capture(model, torch.randn(6, 5, dtype=torch.float64), wavy)
    table = estimate_metrics(graph)
    _close(table, diagnostics.metrics(diagnostics.hessian_blocks(graph)), 1e-9)
    assert _errors(table).products == sum(graph.size(graph[name]) for name in graph.chosen)
