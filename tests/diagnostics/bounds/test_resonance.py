"""Bounds hold on random networks, are attained where they are tight, and fail where the printed statements do."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diagnostics
from diagnostics.bounds.gains import local_gains, sum_over_paths
from diagnostics.bounds.resonance import decay_bounds, error_bounds, resonance_bounds
from diagnostics.graph.local import LOSS, LocalDerivatives, local_derivatives
from tests.helpers.networks import Chain, Diamond, ResidualCat
from tests.helpers.oracle import double_backprop
from tests.helpers.random_dags import Plan, build, plans

ROUNDING = 1 + 1e-10
LEVELS = ("jacobian", "path", "depth", "count", "geometric")


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z + z.square()).sum() / len(z)


def _graph(plan: Plan) -> tuple[nn.Module, Tensor, list[str], diagnostics.Graph]:
    edges = [(p, i) for i, v in enumerate(plan.vertices) for p in v.parents]
    reaches = nx.ancestors(nx.DiGraph(edges), len(plan.vertices) - 1)
    assume(any(v.chosen and i in reaches for i, v in enumerate(plan.vertices[:-1])))
    model, x, names = build(plan)
    return model, x, names, diagnostics.capture(model, x, _wavy, names)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_every_bound_holds_on_random_dags(plan: Plan) -> None:
    model, x, names, graph = _graph(plan)
    oracle = double_backprop(model, x, _wavy, names, "output")
    total, gn = oracle.per_sample("total"), oracle.per_sample("gn")
    expected = {"total": total, "gn": gn, "tensor": {pair: total[pair] - gn[pair] for pair in total}}
    blocks = diagnostics.hessian_blocks(graph)
    floor = 1e-13 * max(block.norm().item() for block in total.values())  # of blocks that are zero but for rounding
    for part, truth in expected.items():
        for per_sample in (False, True):
            table = resonance_bounds(graph, blocks, part=part, per_sample=per_sample, include_output=True)
            for i, v in enumerate(table.nodes):
                for j, w in enumerate(table.nodes):
                    block = truth[v, w] if per_sample else truth[v, w].sum(0)
                    norm = torch.linalg.matrix_norm(block)
                    assert (table.measured[..., i, j] - norm).abs().max() <= 1e-10 * norm.max() + floor
            levels = [getattr(table, level) for level in LEVELS]
            for lower, upper in [(table.measured, levels[0]), *pairwise(levels[:-1]), (levels[2], levels[4])]:
                assert (lower <= upper * ROUNDING + floor).all()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_decay_bounds_hold_on_random_dags(plan: Plan) -> None:
    *_, graph = _graph(plan)
    blocks = diagnostics.hessian_blocks(graph)
    table = decay_bounds(graph, blocks)
    scale = max(blocks.total[v, v].norm().item() for v in blocks.nodes)
    for i, (v, w) in enumerate(table.pairs):
        own = torch.linalg.matrix_norm(blocks.total[v, v])
        measured = torch.linalg.matrix_norm(blocks.total[v, w])
        for gain in (table.jacobian[:, i], table.path[:, i], table.geometric[i]):
            assert (measured <= own * gain * ROUNDING + 1e-13 * scale).all()


def _perturbed(local: LocalDerivatives, delta: float, generator: torch.Generator) -> LocalDerivatives:
    def noisy(block: Tensor, order: int | str, symmetric: bool = False) -> Tensor:
        noise = torch.randn(block.shape, generator=generator, dtype=block.dtype)
        noise = noise + noise.mT if symmetric else noise
        scale = torch.linalg.matrix_norm(block, order) / torch.linalg.matrix_norm(noise, order)
        return block + delta * scale[:, None, None] * noise

    jacobians = {u: {p: noisy(d, 2) for p, d in parents.items()} for u, parents in local.jacobians.items()}
    curvatures = {
        u: {(p, q): noisy(k, "fro", p == q) for (p, q), k in blocks.items()} for u, blocks in local.curvatures.items()
    }
    return LocalDerivatives(jacobians, local.signals, curvatures)


def _unrolled(graph: diagnostics.Graph, local: LocalDerivatives, part: str) -> dict[tuple[str, str], Tensor]:
    """Σ_u Σ_{p,q} J[p←v]ᵀ K_u[p,q] J[q←w], term by term."""
    names = [node.name for node in graph.nodes]
    size = {node.name: graph.size(node) for node in graph.nodes}
    jacobian = {}
    for w in names:
        for u in names:
            total = torch.zeros(graph.samples, size[u], size[w], dtype=torch.float64)
            if u == w:
                total = total + torch.eye(size[w], dtype=torch.float64)
            for p, d in local.jacobians[u].items():
                total = total + d @ jacobian[p, w]
            jacobian[u, w] = total
    blocks = {(v, w): torch.zeros(graph.samples, size[v], size[w], dtype=torch.float64) for v in names for w in names}
    for u, curvature in local.curvatures.items():
        if part == "total" or (part == "gn") == (u == LOSS):
            for (p, q), k in curvature.items():
                for v, w in blocks:
                    blocks[v, w] = blocks[v, w] + jacobian[p, v].mT @ k @ jacobian[q, w]
                    if p != q:
                        blocks[v, w] = blocks[v, w] + jacobian[q, v].mT @ k.mT @ jacobian[p, w]
    return blocks


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(most=5), delta=st.sampled_from([1e-8, 1e-3, 0.1, 1.0]), part=st.sampled_from(["total", "gn"]))
def test_errors_of_local_derivatives_stay_below_their_bound(plan: Plan, delta: float, part: str) -> None:
    *_, graph = _graph(plan)
    local = local_derivatives(graph)
    exact = _unrolled(graph, local, part)
    noisy = _unrolled(graph, _perturbed(local, delta, torch.Generator().manual_seed(plan.seed)), part)
    each = error_bounds(graph, delta, part=part, per_sample=True)
    mean = error_bounds(graph, delta, part=part)
    names = [node.name for node in graph.nodes]
    scale = max(block.norm().item() for block in exact.values())
    for i, v in enumerate(names):
        for j, w in enumerate(names):
            error = noisy[v, w] - exact[v, w]
            assert (torch.linalg.matrix_norm(error) <= each[:, i, j] * ROUNDING + 1e-14 * scale).all()
            assert error.sum(0).norm() <= mean[i, j] * ROUNDING + 1e-14 * scale


def test_the_error_bound_is_attained_in_a_chain_of_numbers() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(6)]).double()
    graph = diagnostics.capture(model, torch.ones(1, 1, dtype=torch.float64), lambda z: z.square().sum())
    local = local_derivatives(graph)
    delta = 1e-3
    worse = LocalDerivatives(
        {u: {p: (1 + delta) * d for p, d in parents.items()} for u, parents in local.jacobians.items()},
        local.signals,
        {u: {pair: (1 + delta) * k for pair, k in blocks.items()} for u, blocks in local.curvatures.items()},
    )
    exact, off = _unrolled(graph, local, "total")["0", "0"], _unrolled(graph, worse, "total")["0", "0"]
    assert ((off - exact).abs() / exact.abs()).item() == pytest.approx((1 + delta) ** 11 - 1, rel=1e-10)
    assert error_bounds(graph, delta)[0, 0].item() == pytest.approx((off - exact).abs().item(), rel=1e-10)
    assert error_bounds(graph, 0.0).count_nonzero() == 0
    assert error_bounds(graph, 1e-12)[0, 0].item() == pytest.approx(11e-12 * exact.abs().item(), rel=1e-9)
    with pytest.raises(ValueError, match="at least 0"):
        error_bounds(graph, -0.1)


def test_bounds_are_attained_by_a_linear_chain_of_equal_numbers() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(5)]).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.5)
    graph = diagnostics.capture(model, torch.ones(1, 1, dtype=torch.float64), lambda z: z.square().sum())
    table = resonance_bounds(graph, include_output=True)
    for level in LEVELS:
        assert torch.allclose(getattr(table, level), table.measured, rtol=1e-14)
    decay = decay_bounds(graph)
    assert torch.allclose(decay.ratio[0], 0.5 ** decay.distance.double(), rtol=1e-14)
    assert torch.allclose(decay.geometric, 0.5 ** decay.distance.double(), rtol=1e-14)


def test_the_coupling_of_a_chain_of_numbers_does_not_decay_however_small_rho_is() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(6)]).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.1)
    graph = diagnostics.capture(model, torch.ones(1, 1, dtype=torch.float64), lambda z: z.square().sum())
    assert local_gains(graph).rho == pytest.approx(0.1)
    table = diagnostics.metrics(diagnostics.hessian_blocks(graph))
    assert torch.allclose(table.coupling, torch.ones_like(table.coupling), rtol=1e-10)


def test_distance_does_not_bound_the_resonance_of_branches() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right, self.merge = (nn.Linear(3, 3) for _ in range(4))
            with torch.no_grad():
                for layer in (self.stem, self.left, self.right, self.merge):
                    layer.weight.copy_(0.1 * torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.merge(self.left(h) + self.right(h))

    graph = diagnostics.capture(Twins().double(), torch.ones(1, 3, dtype=torch.float64), lambda z: z.square().sum())
    figures = local_gains(graph)
    table = diagnostics.metrics(diagnostics.hessian_blocks(graph))
    i, j = table.nodes.index("left"), table.nodes.index("right")
    assert table.distance[i, j] == 2
    ratio = figures.children * figures.rho
    assert ratio == pytest.approx(0.2)
    assert (table.resonance[i, j] / table.resonance[i, i]).item() == pytest.approx(1)  # not ratio² = 0.04
    assert ("left", "right") not in decay_bounds(graph).pairs
    assert ("merge", "stem") in decay_bounds(graph).pairs


def test_the_rho_of_batch_means_does_not_bound_the_resonance() -> None:
    class Gate(nn.Module):
        """Slopes of one sample are large, of the others small."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(1, 1, bias=False) for _ in range(3))
            with torch.no_grad():
                for layer in (self.a, self.b, self.c):
                    layer.weight.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()).relu())

    x = torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64)
    graph = diagnostics.capture(Gate().double(), x, lambda z: 0.5 * z.square().mean())
    figures = local_gains(graph)
    assert figures.rho == 1
    # averaged, the slopes of a → b are 1/4; the product of two means would be 1/16, and the mean of the products is 1/4
    table = resonance_bounds(graph)
    assert table.measured[0, 0].item() == pytest.approx(0.25)
    norms = figures.norms.mean(0)
    assert norms.prod().square().item() < table.measured[0, 0].item() <= table.depth[0, 0].item()


def test_coupling_of_the_gauss_newton_part_is_at_most_one_and_of_the_hessian_is_not() -> None:
    torch.manual_seed(3)
    x, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    graph = diagnostics.capture(ResidualCat().double(), x, lambda z: nn.functional.cross_entropy(z, labels))
    means = diagnostics.hessian_blocks(graph).mean()
    for v in means.nodes:
        for w in means.nodes:
            assert means.gn[v, w].norm() <= (means.gn[v, v].norm() * means.gn[w, w].norm()).sqrt() * ROUNDING
    # L = f_a f_b: the diagonal blocks vanish and the one between them does not
    product = _Product()
    graph = diagnostics.capture(product.double(), x, lambda z: z.sum(), ["a", "b"])
    assert diagnostics.metrics(diagnostics.hessian_blocks(graph)).coupling[0, 1] == float("inf")


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def test_adding_an_edge_raises_path_sums_and_can_lower_the_resonance() -> None:
    class Skip(nn.Module):
        def __init__(self, skip: float) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(5, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
            self.skip = skip

        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem(x)
            block = self.block(stem)
            return self.head(block + self.skip * stem) if self.skip else self.head(block)

    tables = []
    for skip in (0.0, -1.0):
        torch.manual_seed(0)
        model = Skip(skip).double()
        with torch.no_grad():
            model.block.weight.copy_(torch.eye(4))
        graph = diagnostics.capture(model, torch.randn(6, 5, dtype=torch.float64), lambda z: z.square().sum())
        tables.append(resonance_bounds(graph, part="gn"))
    without, with_skip = tables
    for level in ("path", "depth"):
        assert (getattr(with_skip, level) >= getattr(without, level) / ROUNDING).all()
    assert without.measured[0, 0] > 0.1
    assert with_skip.measured[0, 0] < 1e-15  # the skip cancels the block


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=st.integers(2, 7), data=st.data())
def test_an_edge_never_lowers_a_sum_over_paths(n: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    steps = torch.rand(n, n, generator=generator, dtype=torch.float64).tril(-1)
    steps = steps * (torch.rand(n, n, generator=generator) < 0.6)
    u = data.draw(st.integers(1, n - 1))
    p = data.draw(st.integers(0, u - 1))
    more = steps.clone()
    more[u, p] += data.draw(st.floats(0, 2))
    assert (sum_over_paths(more) >= sum_over_paths(steps)).all()


@pytest.mark.parametrize("seed", range(3))
def test_coupling_does_not_change_when_activations_are_rescaled(seed: int) -> None:
    class Scaled(nn.Module):
        """Nodes are multiplied by constants that the layers behind them divide out again."""

        def __init__(self, scales: list[float]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in scales)
            self.nodes = nn.ModuleList(nn.Identity() for _ in scales)
            self.head, self.scales = nn.Linear(5, 3), scales

        def forward(self, x: Tensor) -> Tensor:
            early = None
            for layer, node, scale in zip(self.layers, self.nodes, self.scales, strict=True):
                x = node(scale * torch.tanh(layer(x if early is None else x + early))) / scale
                early = x
            return self.head(x)

    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(3 * torch.randn(4, generator=generator)).tolist()
    tables = []
    for factors in ([1.0] * 4, scales):
        torch.manual_seed(seed)
        model = Scaled(factors).double()
        x = torch.randn(6, 5, dtype=torch.float64)
        graph = diagnostics.capture(model, x, _wavy, ["nodes.*"])
        tables.append(diagnostics.metrics(diagnostics.hessian_blocks(graph)))
    before, after = tables
    assert torch.allclose(after.coupling, before.coupling, rtol=1e-10)
    weight = torch.tensor(scales, dtype=torch.float64)
    assert torch.allclose(after.resonance * weight * weight[:, None], before.resonance, rtol=1e-10)
    assert not torch.allclose(after.resonance, before.resonance, rtol=0.1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bounds_of_coupled_samples_and_of_sum_losses_hold(reduction: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64)
    for loss in (_wavy, lambda z: torch.logsumexp(z @ z.mT, dim=(0, 1)), lambda z: z.mean(0).square().sum()):
        graph = diagnostics.capture(Chain(5, 4, 4, 3).double(), x, loss, reduction=reduction)
        assert graph.coupled == (loss is not _wavy)
        table = resonance_bounds(graph, include_output=True)
        means = diagnostics.hessian_blocks(graph).mean()
        assert table.measured[0, 1].item() == pytest.approx(means.total[table.nodes[0], table.nodes[1]].norm().item())
        assert (table.measured <= table.jacobian * ROUNDING).all()


def test_tables_print_and_refuse_what_is_not_there(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64, device=device)
    graph = diagnostics.capture(Diamond().double().to(device), x, _wavy)
    blocks = diagnostics.hessian_blocks(graph)
    lines = str(resonance_bounds(graph, blocks)).splitlines()
    assert lines[1].split() == ["v", "w", "measured", *LEVELS]
    assert len(lines) == 3 + 10
    assert len(str(decay_bounds(graph, blocks)).splitlines()) == 3 + len(decay_bounds(graph, blocks).pairs)
    with pytest.raises(ValueError, match="part must be"):
        resonance_bounds(graph, part="everything")
    with pytest.raises(diagnostics.DiagnosticsError, match="not to batch means"):
        resonance_bounds(graph, blocks.mean(), per_sample=True)
    with pytest.raises(diagnostics.DiagnosticsError, match="not their means"):
        decay_bounds(graph, blocks.mean())
