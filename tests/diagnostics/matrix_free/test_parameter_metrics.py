"""Metrics of groups of parameters against dense blocks of the parameters' Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.matrix_free.discarded import discarded_share
from diagnostics.matrix_free.node_metrics import estimate_metrics
from diagnostics.matrix_free.parameter_metrics import estimate_parameter_metrics
from diagnostics.operators.curvature import CurvatureProducts, GaussNewtonOperator, HessianOperator, TensorOperator
from diagnostics.operators.group_spectra import group_spectra
from diagnostics.operators.parameter_groups import ParameterGroups
from diagnostics.results.metric_table import MetricTable
from diagnostics.results.pair_formulas import EPSILON
from tests.helpers.curvature import CASES, Dense, dense
from tests.helpers.networks import Chain

METRICS = ("resonance", "coupling", "stable_rank", "gn_gap", "gn_norm", "tensor_norm")
STREAMED: dict[str, Any] = {"deflate": 0, "spectral_rounds": 0}
PLAIN: dict[str, Any] = {"deflate": 0}


class Net(nn.Module):
    """Groups of more entries than probes, one module that is frozen, one that is small, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.stem = nn.Linear(6, 8)
        self.frozen = nn.Linear(8, 8)
        self.mid = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.mid.weight
        self.head = nn.Linear(8, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.frozen(torch.tanh(self.stem(x))))
        h = torch.nn.functional.silu(self.mid(h)) * self.scale
        return self.head(torch.tanh(self.again(h)))


GROUPS = ("(model)", "stem", "mid", "again", "head")


def _problem(device: torch.device | str = "cpu") -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network and ragged batches."""
    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.7
    x, y = torch.randn(11, 6, dtype=torch.float64).to(device), torch.arange(11).to(device) % 3
    return model.to(device), list(zip(x.split(4), y.split(4), strict=True))


def _joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _one_batch() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model, batches = _problem()
    return model, _joined(batches)


def _whole(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Dense:
    return dense(model, _joined(batches), F.cross_entropy, [p for p in model.parameters() if p.requires_grad])


def _exact(parts: Dense, index: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics by their definitions."""
    matrices = {"H": parts.hessian, "G": parts.gn, "T": parts.hessian - parts.gn}
    norms = {
        name: torch.stack([torch.stack([m[i][:, j].norm() for j in index.values()]) for i in index.values()])
        for name, m in matrices.items()
    }
    blocks = [[parts.hessian[i][:, j] for j in index.values()] for i in index.values()]
    largest = torch.stack([torch.stack([torch.linalg.matrix_norm(b, 2) for b in row]) for row in blocks])
    at = norms["H"].diagonal()
    return {
        "resonance": norms["H"],
        "coupling": norms["H"] / (at.unsqueeze(1) * at).sqrt(),
        "stable_rank": (norms["H"] / largest).square(),
        "gn_gap": norms["T"] / (norms["G"] + EPSILON),
        "gn_norm": norms["G"],
        "tensor_norm": norms["T"],
    }


def _index(op: HessianOperator, groups: Any = None) -> dict[str, Tensor]:
    """Entries of the groups by the names of parameters alone."""
    entries = {name: torch.arange(op.shape[0]).to(op.device)[where] for name, where in op.space.slices.items()}
    if groups == "parameter":
        return entries
    if groups is None:
        owner = {name: name.split(".")[0] if "." in name else "(model)" for name in entries}
        return {g: torch.cat([e for n, e in entries.items() if owner[n] == g]) for g in dict.fromkeys(owner.values())}
    return {group: torch.cat([entries[n] for n in names]) for group, names in groups.items()}


@pytest.fixture(scope="module")
def op() -> HessianOperator:
    return HessianOperator(*_problem(), F.cross_entropy)


@pytest.fixture(scope="module")
def parts() -> Dense:
    return _whole(*_problem())


@pytest.fixture(scope="module")
def dense_op(parts: Dense) -> HessianOperator:
    """An operator whose products are those of the dense matrices: for tests of many seeds."""
    model, batches = _problem()
    op = HessianOperator(model, batches, F.cross_entropy)
    tensor = parts.hessian - parts.gn
    op.products = lambda v: CurvatureProducts(parts.hessian @ v, parts.gn @ v, tensor @ v)  # type: ignore[method-assign]
    op.matmat = lambda v: parts.hessian @ v  # type: ignore[method-assign]
    return op


@pytest.fixture(scope="module")
def exact(op: HessianOperator, parts: Dense) -> dict[str, Tensor]:
    return _exact(parts, _index(op))


def _seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _errors(table: MetricTable) -> diagnostics.results.metric_table.MetricErrors:
    assert table.standard_errors is not None
    return table.standard_errors


def _upper(values: Tensor) -> Tensor:
    v, w = torch.triu_indices(*values.shape)
    return values[v, w]


MAPPING = {"both": ["mid.weight", "head.weight"], "first": ["stem.bias", "stem.weight"]}


@pytest.mark.parametrize("groups", [None, "parameter", MAPPING], ids=["modules", "parameters", "mapping"])
@pytest.mark.parametrize("options", [{}, STREAMED], ids=["deflated", "streamed"])
def test_small_groups_are_exact(groups: Any, options: dict[str, Any], device: torch.device) -> None:
    """Over ragged batches, with a tied and frozen parameters; groups that are not adjacent, in any order."""
    model, batches = _problem(device)
    op = HessianOperator(model, batches, F.cross_entropy)
    index = _index(op, groups)
    expected = _exact(_whole(model, batches), index)
    table = estimate_parameter_metrics(op, groups, 100, **options)
    assert table.nodes == tuple(index)
    for name in METRICS:
        assert torch.allclose(getattr(table, name), expected[name], rtol=1e-9, atol=1e-13), name
        assert (getattr(_errors(table), name) <= 1e-9 * expected[name] + 1e-13).all()
    assert _errors(table).products == sum(len(entries) for entries in index.values())


def test_default_groups_are_modules_in_order_and_a_tied_weight_is_the_firsts(op: HessianOperator) -> None:
    groups = ParameterGroups(op)
    assert groups.names == GROUPS
    assert groups.parameters["mid"] == ("mid.weight", "mid.bias")
    assert groups.parameters["again"] == ("again.bias",)
    assert ParameterGroups(op, {"a": "again.weight"}).parameters == {"a": ("mid.weight",)}
    assert [groups.size(name) for name in groups.names] == [1, 56, 72, 8, 27]
    part = HessianOperator(*_problem(), F.cross_entropy, parameters=["mid.*", "head.bias"])
    assert ParameterGroups(part).parameters == {"mid": ("mid.weight", "mid.bias"), "head": ("head.bias",)}
    assert ParameterGroups(part, {"m": "*.bias"}).parameters == {"m": ("mid.bias", "head.bias")}


@pytest.mark.parametrize("options", [PLAIN, {}], ids=["plain", "deflated"])
def test_squares_are_unbiased(options: dict[str, Any], dense_op: HessianOperator, exact: dict[str, Tensor]) -> None:
    """z-tests of the mean of R², ‖G‖² and ‖T‖² over many seeds."""
    options = {"spectral_rounds": 0, **options}
    runs = [estimate_parameter_metrics(dense_op, None, 4, generator=_seed(s), **options) for s in range(80)]
    for name in ("resonance", "gn_norm", "tensor_norm"):
        squares = torch.stack([_upper(getattr(table, name)).square() for table in runs])
        expected = _upper(exact[name]).square()
        spread = squares.std(0)
        sampled = spread > 1e-8 * expected
        assert sampled.sum() >= 6, name
        z = (squares.mean(0) - expected)[sampled] / spread[sampled] * len(runs) ** 0.5
        assert z.abs().max() < 4, name


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["deflated", "streamed"])
def test_intervals_cover_the_truth(
    options: dict[str, Any], dense_op: HessianOperator, exact: dict[str, Tensor]
) -> None:
    """95 % intervals over 40 seeds: at least 90 % of the pairs, also of the discarded share, and not merely large."""
    probes = 16
    quantile = float(scipy.stats.t.ppf(0.975, probes - 1))
    tables = [estimate_parameter_metrics(dense_op, None, probes, generator=_seed(s), **options) for s in range(40)]
    for name in ("resonance", "coupling", "gn_gap"):
        value = _upper(exact[name])
        found = torch.stack([_upper(getattr(table, name)) for table in tables])
        error = torch.stack([_upper(getattr(_errors(table), name)) for table in tables])
        sampled = error.mean(0) > 1e-7 * value
        assert sampled.sum() >= 5  # the three groups of more entries than probes
        assert ((found - value).abs() <= quantile * error)[:, sampled].double().mean() >= 0.9, name
        ratio = error[:, sampled].square().mean(0) / (found[:, sampled] - value[sampled]).square().mean(0)
        assert 0.6 < ratio.median().sqrt() < 1.8, name
    apart = torch.arange(5).unsqueeze(1) != torch.arange(5)
    for part, name in (("total", "resonance"), ("gn", "gn_norm"), ("tensor", "tensor_norm")):
        squares = exact[name].square()
        truth = squares[apart].sum() / squares.sum()
        shares = [getattr(discarded_share(table), part) for table in tables]
        value, error = (torch.stack([getattr(s, f) for s in shares]) for f in ("value", "standard_error"))
        assert ((value - truth).abs() <= quantile * error).double().mean() >= 0.9
        assert 0.5 < error.square().mean().sqrt() / (value - truth).square().mean().sqrt() < 2


def test_responses_that_are_not_kept_give_the_same(dense_op: HessianOperator) -> None:
    """Against a run that keeps them, with iterations that end at once: D and its error included."""
    streamed = estimate_parameter_metrics(dense_op, None, 6, **STREAMED)
    iterated = estimate_parameter_metrics(dense_op, None, 6, deflate=0, spectral_rounds=1, spectral_tolerance=1e9)
    for name in METRICS:
        assert torch.allclose(getattr(streamed, name), getattr(iterated, name), rtol=1e-12, equal_nan=True), name
        assert torch.allclose(getattr(_errors(streamed), name), getattr(_errors(iterated), name), rtol=1e-9), name
    sharp = estimate_parameter_metrics(dense_op, None, 6, deflate=0, spectral_tolerance=1e-5)
    assert (sharp.stable_rank < 0.9 * streamed.stable_rank).any()


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["deflated", "streamed"])
def test_the_stable_rank_is_an_upper_bound(
    options: dict[str, Any], dense_op: HessianOperator, exact: dict[str, Tensor]
) -> None:
    table = estimate_parameter_metrics(dense_op, None, 12, spectral_tolerance=1e-4, **options)
    found = (table.resonance.square() / table.stable_rank).sqrt()
    norm = (exact["resonance"].square() / exact["stable_rank"]).sqrt()
    assert (found <= norm * (1 + 1e-9)).all()
    if not options:
        assert (found >= norm * (1 - 1e-3)).all()


class TestDiscardedShare:
    def test_of_exact_tables(self) -> None:
        torch.manual_seed(0)
        model = Chain(5, 4, 4, 4, 3).double()
        graph = diagnostics.capture(model, torch.randn(4, 5, dtype=torch.float64), lambda z: z.sin().square().mean())
        table = diagnostics.metrics(diagnostics.hessian_blocks(graph))
        squares = table.resonance.square()
        for width in (0, 1, 2):
            kept = sum(squares[i, j] for i in range(3) for j in range(3) if abs(i - j) <= width)
            share = discarded_share(table, width)
            assert torch.allclose(share.total.value, 1 - kept / squares.sum(), atol=1e-12)
            assert share.total.standard_error == 0
        assert share.total.value == share.gn.value == share.tensor.value == 0
        assert "beyond distance 2" in str(share)

    def test_of_estimated_nodes(self) -> None:
        torch.manual_seed(0)
        model = Chain(20, 30, 30, 3).double()
        graph = diagnostics.capture(model, torch.randn(6, 20, dtype=torch.float64), lambda z: z.sin().square().mean())
        truth = discarded_share(diagnostics.metrics(diagnostics.hessian_blocks(graph))).total.value
        share = discarded_share(estimate_metrics(graph, 20, deflate=0, exact_gn=False)).total
        assert share.standard_error > 0
        assert (share.value - truth).abs() < 4 * share.standard_error

    def test_of_nothing_is_nan(self) -> None:
        torch.manual_seed(0)
        model, x = Chain(5, 4, 4, 3, activation=nn.ReLU), torch.randn(4, 5)
        graph = diagnostics.capture(model, x, lambda z: z.square().mean())
        share = discarded_share(diagnostics.metrics(diagnostics.hessian_blocks(graph)))
        assert share.tensor.value.isnan()
        assert share.total.value == share.gn.value

    def test_negative_bandwidths_are_refused(self, op: HessianOperator) -> None:
        with pytest.raises(ValueError, match="bandwidth is a distance of at least 0"):
            discarded_share(estimate_parameter_metrics(op, None, 3, **STREAMED), -1)


class TestDistances:
    def test_order_graph_and_given(self) -> None:
        model, batch = _one_batch()
        op = HessianOperator(model, batch, F.cross_entropy)
        order = estimate_parameter_metrics(op, None, 3, **STREAMED).distance
        assert order.tolist() == [[abs(i - j) for j in range(5)] for i in range(5)]
        graph = diagnostics.capture(model, batch[0], lambda z: F.cross_entropy(z, batch[1]), ["stem", "mid", "again"])
        found = estimate_parameter_metrics(op, None, 3, graph=graph, **STREAMED).distance
        # stem → mid → again → output; the scale is used by `again`, mid.weight by mid and again
        nodes = {"(model)": [2], "stem": [0], "mid": [1, 2], "again": [2], "head": [3]}
        expected = [[min(abs(i - j) for i in v for j in w) for w in nodes.values()] for v in nodes.values()]
        assert found.tolist() == expected
        given = torch.ones(5, 5)
        assert torch.equal(estimate_parameter_metrics(op, None, 3, distance=given, **STREAMED).distance, given)
        with pytest.raises(ValueError, match="either graph or distance"):
            estimate_parameter_metrics(op, None, 3, graph=graph, distance=given)
        with pytest.raises(DiagnosticsError, match=r"symmetric \(5, 5\) tensor"):
            estimate_parameter_metrics(op, None, 3, distance=torch.ones(4, 4))
        with pytest.raises(DiagnosticsError, match=r"symmetric \(5, 5\) tensor"):
            estimate_parameter_metrics(op, None, 3, distance=torch.arange(25.0).view(5, 5))

    def test_a_group_outside_the_graph(self, op: HessianOperator) -> None:
        other = diagnostics.capture(Chain(5, 4, 3), torch.randn(4, 5), lambda z: z.square().mean())
        with pytest.raises(DiagnosticsError, match=r"group '\(model\)' has no place in the graph"):
            estimate_parameter_metrics(op, None, 3, graph=other)


class TestErrors:
    def test_groups(self, op: HessianOperator) -> None:
        with pytest.raises(DiagnosticsError, match=r"'mid\.weight' is in group 'a' and in 'b'"):
            estimate_parameter_metrics(op, {"a": "mid.*", "b": ["again.weight"]})
        with pytest.raises(DiagnosticsError, match=r"Did you mean 'stem\.weight'"):
            estimate_parameter_metrics(op, {"a": "stem.weigth"})
        with pytest.raises(DiagnosticsError, match="only parameters that do not require grad"):
            estimate_parameter_metrics(op, {"a": "frozen.*"})
        with pytest.raises(DiagnosticsError, match="groups is empty"):
            estimate_parameter_metrics(op, {})
        with pytest.raises(DiagnosticsError, match="group 'a' is empty"):
            estimate_parameter_metrics(op, {"a": []})
        with pytest.raises(TypeError, match='groups must be None, "parameter" or a mapping'):
            estimate_parameter_metrics(op, ["stem.*"])  # type: ignore[arg-type]
        part = HessianOperator(*_problem(), F.cross_entropy, parameters=["mid.*"])
        with pytest.raises(DiagnosticsError, match=r"'a' has none of the operator's parameters: 'stem\.bias' were not"):
            estimate_parameter_metrics(part, {"a": "stem.bias"})

    def test_operators_and_numbers(self, op: HessianOperator) -> None:
        with pytest.raises(TypeError, match="must be a HessianOperator"):
            estimate_parameter_metrics(GaussNewtonOperator(*_problem(), F.cross_entropy))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="HessianOperator or its kin"):
            group_spectra(torch.eye(3))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="probes must be at least 3"):
            estimate_parameter_metrics(op, None, 2)

    def test_memory(self, op: HessianOperator) -> None:
        with pytest.raises(MemoryBudgetError, match="Use deflate=0 and spectral_rounds=0"):
            estimate_parameter_metrics(op, None, 30, memory_limit=2**19)
        estimate_parameter_metrics(op, None, 30, memory_limit=2**19, **STREAMED)
        with pytest.raises(MemoryBudgetError, match="Use fewer groups"):
            estimate_parameter_metrics(op, None, 30, memory_limit=2**16, **STREAMED)


def test_the_model_and_random_state_are_left_alone() -> None:
    model, batches = _problem()
    op = HessianOperator(model, batches, F.cross_entropy)
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    first = estimate_parameter_metrics(op, None, 3)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.resonance, estimate_parameter_metrics(op, None, 3).resonance)
    other = estimate_parameter_metrics(op, None, 3, generator=_seed(5))
    assert not torch.equal(first.resonance, other.resonance)
    assert not first.resonance.requires_grad


class TestSpectra:
    def test_against_dense_blocks(self, device: torch.device) -> None:
        model, batches = _problem(device)
        op = HessianOperator(model, _joined(batches), F.cross_entropy)
        parts, index = _whole(model, batches), _index(op)
        spectra = group_spectra(op, steps=30, probes=20)
        assert spectra.groups == GROUPS
        assert spectra.sizes == (1, 56, 72, 8, 27)
        for i, entries in enumerate(index.values()):
            values = torch.linalg.eigvalsh(parts.hessian[entries][:, entries])
            mass, error = spectra.negative_mass.value[i], spectra.negative_mass.standard_error[i]
            truth = values.clamp(max=0).abs().sum()
            assert (spectra.smallest[i] - values[0]).abs() <= spectra.smallest_error[i] + 1e-10
            assert (spectra.largest[i] - values[-1]).abs() <= spectra.largest_error[i] + 1e-10
            if len(entries) <= 30:
                assert error == spectra.smallest_error[i] == spectra.largest_error[i] == 0
                assert torch.allclose(mass.to(truth), truth, atol=1e-10)
            else:
                assert 0 < error < 0.3 * truth
                assert (mass.to(truth) - truth).abs() < 4 * error
        assert "λ_min" in str(spectra)

    def test_gauss_newton_has_no_negative_mass(self) -> None:
        spectra = group_spectra(GaussNewtonOperator(*_one_batch(), F.cross_entropy), steps=20)
        assert not spectra.negative_mass.value.any()
        assert (spectra.largest > 0).all()

    def test_groups_and_parts(self) -> None:
        model, batch = CASES["chain"].build()
        op = TensorOperator(model, batch, CASES["chain"].loss)
        parts = dense(model, batch, CASES["chain"].loss)
        spectra = group_spectra(op, {"all": "*"}, steps=200)
        values = torch.linalg.eigvalsh(parts.hessian - parts.gn)
        assert torch.allclose(spectra.smallest[0], values[0])
        assert torch.allclose(spectra.largest[0], values[-1])
        assert torch.allclose(spectra.negative_mass.value[0], -values.clamp(max=0).sum())
        assert spectra.products == op.shape[0]
