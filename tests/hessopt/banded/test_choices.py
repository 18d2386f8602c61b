"""bandwidth="auto" and the space of the solves."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hessopt import AutoBandwidth, BandedNewton, Fixed, LeastSquares, LineSearch
from hessopt.banded.bandwidth import bandwidth_cliques, candidates, coupling_radius
from hessopt.network.cliques import Cliques
from hessopt.search.gain import Candidate, most_gain
from tests.helpers.kronecker_reference import (
    LAMBDA,
    batch,
    chain,
    closure_of,
    dense,
    flat,
    losses,
    regression,
    relative,
    resumes,
    skip,
    step_of,
)

RTOL = 1e-8


@pytest.mark.parametrize("space", ["sample", "parameter"])
@pytest.mark.parametrize("bandwidth", [0, "full"])
def test_chosen_space_gives_the_dense_solve(space: Any, bandwidth: Any) -> None:
    net = skip()
    expected = dense(net, batch()[0], losses(2)["mse"])
    matrix = expected.ggn + LAMBDA * torch.eye(len(expected.ggn), dtype=torch.float64)
    if bandwidth == 0:
        matrix = torch.block_diag(*(matrix[s, s] for s in expected.slices))
    step = step_of(net, closure_of(net, "mse"), bandwidth=bandwidth, space=space)
    assert relative(step, -torch.linalg.solve(matrix, expected.gradient)) < RTOL


@pytest.mark.parametrize("space", ["sample", "parameter"])
@pytest.mark.parametrize("bandwidth", [0, "full", "auto"])
def test_loss_without_curvature_in_the_output_gives_a_damped_gradient_step(space: Any, bandwidth: Any) -> None:
    """Linear in the output, so that the Gauss-Newton matrix is zero and its factors have no rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.randn(9, 3, dtype=torch.float64)
    gradients = torch.autograd.grad(net(x).mean(), list(net.parameters()))
    optimizer = BandedNewton(net, bandwidth=bandwidth, space=space, search=Fixed(0.5))
    optimizer.step(lambda: net(x).mean())
    for p, old, g in zip(net.parameters(), before, gradients, strict=True):
        assert torch.allclose(p, old - g / 0.5, rtol=1e-12, atol=1e-15)


def test_space_is_chosen_by_operations(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hessopt.banded.space"):
        for width, space in ((2, "parameter"), (40, "sample")):
            caplog.clear()
            net, x = chain(2, width=width, outputs=1), batch(40)[0]
            optimizer = BandedNewton(net, bandwidth=0)
            for _ in range(2):
                optimizer.step(lambda net=net, x=x: net(x).square().mean())
            assert [r.getMessage().split(":")[0] for r in caplog.records] == [f'space="{space}"']


def path(count: int) -> np.ndarray:
    index = np.arange(float(count))
    return np.abs(index[:, None] - index)


def test_candidates() -> None:
    assert candidates(path(1), 0) == [0]
    assert candidates(path(2), 1) == [0, 1]
    assert candidates(path(7), 6) == [0, 1, 2, 4, 6]
    assert candidates(path(9), 8) == [0, 1, 2, 4, 8]
    assert candidates(path(9), 3) == [0, 1, 2, 4]
    assert candidates(path(9), 2) == [0, 1, 2]
    assert candidates(path(9), 0) == [0]
    apart = path(3)
    apart[0, 1:] = apart[1:, 0] = np.inf
    assert candidates(apart, np.inf) == [0, 1, 2]


def test_coupling_radius() -> None:
    norms = torch.tensor([[4.0, 1.0, 0.1], [1.0, 1.0, 0.5], [0.1, 0.5, 1.0]])
    # couplings 0.5, 0.05 and 0.5
    assert coupling_radius(norms, path(3), 0.4) == 1
    assert coupling_radius(norms, path(3), 0.04) == 2
    assert coupling_radius(norms, path(3), 0.6) == 0
    assert coupling_radius(torch.zeros(3, 3), path(3), 0.1) == 0


@pytest.mark.parametrize(
    ("operations", "tried", "chosen"),
    [
        ({0: 1.0, 1: 2.0, 2: 3.0, 4: 4.0}, [0, 1, 2, 4], 0),
        ({0: 4.0, 1: 5.0, 2: 2.0, 4: 3.0}, [2, 4], 2),
        ({0: 9.0, 1: 9.0, 2: 9.0, 4: 9.0}, [], 4),
    ],
)
def test_a_bandwidth_that_costs_no_less_than_a_larger_one_is_not_tried(
    operations: dict[int, float], tried: list[int], chosen: int
) -> None:
    distances = (np.arange(5.0)[:, None] - np.arange(5.0)).__abs__()
    bandwidth_of = {len(bandwidth_cliques(distances, k).cliques[0]) - 1: k for k in operations}
    solved: list[int] = []

    class System:
        def operations(self, cliques: Cliques) -> float:
            return operations[bandwidth_of[len(cliques.cliques[0]) - 1]]

        def block_norms(self) -> Tensor:
            return torch.ones(5, 5)

    class Model:
        def step(self, damping: float, cliques: Cliques, system: object) -> int:
            solved.append(bandwidth_of[len(cliques.cliques[0]) - 1])
            return solved[-1]

        def predicted_reduction(self, step: int) -> float:
            return 1.0

    arguments: Any = (distances, Model(), System(), 0.1)
    assert (AutoBandwidth().choose({}, *arguments), solved) == (4, [])  # nothing is tried at the first step
    found = AutoBandwidth().choose({"step": 10, "bandwidth": 4}, *arguments)
    assert (solved, found) == (tried, chosen)


def test_most_gain_with_hysteresis() -> None:
    found = [Candidate(0, 1.0, 1.0), Candidate(1, 2.1, 2.0), Candidate(2, 9.0, 4.0), Candidate(4, -1.0, 1e-3)]
    assert most_gain(found, None, 0.1) == 2
    assert most_gain(found, 0, 0.1) == 2
    assert most_gain(found[:2], 0, 0.1) == 0
    assert most_gain(found[:2], None, 0.1) == 1
    assert most_gain(found[:2], 2, 0.1) == 1
    assert most_gain([Candidate(0, 0.0, 0.0)], None, 0.1) == 0


@pytest.mark.parametrize("options", [{}, {"rule": "radius"}, {"cost": "measured"}])
def test_auto_decides_logs_and_keeps(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, bandwidth=AutoBandwidth(every=3, **options))
    with caplog.at_level(logging.INFO, logger="hessopt.banded.bandwidth"):
        values = [optimizer.step(closure).item() for _ in range(7)]
    assert len(caplog.records) == 3
    assert "bandwidth" in caplog.records[0].getMessage()
    assert optimizer.state[net[0].weight]["bandwidth"] in (0, 1, 2, 3)
    assert values[-1] < values[0]


def test_radius_rule_is_the_radius() -> None:
    net, closure = regression()
    steps = []
    for epsilon in (1e-9, 0.999999):
        net, closure = regression()
        optimizer = BandedNewton(net, bandwidth=AutoBandwidth("radius", epsilon=epsilon))
        optimizer.step(closure)
        steps.append(optimizer.state[net[0].weight]["bandwidth"])
    assert steps == [3, 0]


@pytest.mark.parametrize("through_file", [False, True])
def test_resume_with_auto_bit_for_bit(through_file: bool) -> None:
    (net, closure), (other, again) = regression(), regression(seed=9)
    optimizer, resumed = (BandedNewton(m, bandwidth=AutoBandwidth(every=3)) for m in (net, other))
    resumes((net, optimizer, closure), (other, resumed, again), through_file)


@pytest.mark.parametrize("space", ["sample", "parameter"])
def test_rescaling_of_adjacent_relu_layers_changes_nothing(space: Any) -> None:
    """The full Gauss-Newton step without damping does not depend on how a function is parametrized."""
    changes = []
    for scale in (1.0, 3.0):
        net = chain(3, width=4, outputs=1, in_place=True)
        x = batch(5)[0]
        with torch.no_grad():
            net.layers[0].weight *= scale
            net.layers[0].bias *= scale
            net.layers[1].weight /= scale
        y = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(1)
        before = net(x).detach()
        direction = {p: p.detach().clone() for p in net.parameters()}
        BandedNewton(net, bandwidth="full", space=space, search=Fixed(1e-9)).step(
            lambda net=net, x=x, y=y: LeastSquares(net(x) - y)
        )
        # the change of the function to first order
        step = {name: p.detach() - direction[p] for name, p in net.named_parameters()}
        old = {name: direction[p] for name, p in net.named_parameters()}
        jacobians = torch.func.jacrev(lambda values, n=net, x=x: torch.func.functional_call(n, values, (x,)))(old)
        assert torch.equal(before, torch.func.functional_call(net, old, (x,)))
        changes.append(sum(torch.tensordot(jacobians[name], step[name], dims=step[name].ndim) for name in step))
    assert relative(changes[1], changes[0]) < 1e-5
    assert changes[0].norm() > 1e-2


@pytest.mark.parametrize("maximize", [False, True])
def test_line_search(maximize: bool) -> None:
    net, closure = regression()
    sign = -1 if maximize else 1
    options = {"search": LineSearch(1e-8, adapt=False), "maximize": maximize}
    optimizer = BandedNewton(net, weight_decay=1e-3, **options)
    for _ in range(15):
        before = flat([list(net.parameters())]).detach().clone()
        loss = optimizer.step(lambda: sign * closure())
        step, after = optimizer.last_step, flat([list(net.parameters())]).detach()
        penalty = 5e-4 * (after.square().sum() - before.square().sum())
        reduction = sign * (loss - sign * closure()) - penalty
        assert step.accepted
        assert step.actual_reduction == pytest.approx(reduction.item(), rel=1e-6, abs=1e-13)
        assert reduction > 0
        assert step.closure_runs >= 2
    # no better length is next to the one that was taken
    assert step.damping == 1e-8


@pytest.mark.parametrize("adapt", [True, False])
def test_damping_of_a_line_search_has_a_floor_relative_to_the_trace(adapt: bool) -> None:
    """The trace by back-propagation of every output; 50 ε of it at least, which is all where nothing is adapted."""
    net, closure = regression()
    optimizer = BandedNewton(net, search=LineSearch(adapt=adapt))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # regression()'s own
    used, floors = [], []
    for _ in range(25):
        rows = [torch.autograd.grad(z, list(net.parameters()), retain_graph=True) for z in net(x).flatten()]
        trace = 2 / 64 * sum(g.square().sum().item() for row in rows for g in row)
        optimizer.step(closure)
        assert optimizer.last_step is not None
        used.append(optimizer.last_step.damping)
        floors.append(50 * torch.finfo(torch.float64).eps * trace)
    if adapt:
        assert used[0] == 1e-2
        assert all(a >= b * (1 - 1e-6) for a, b in zip(used, floors, strict=True))
        assert used[-1] < 1e-6
    else:
        assert used == pytest.approx(floors, rel=1e-6)


def test_line_search_that_finds_nothing_leaves_the_parameters() -> None:
    net, closure = regression()
    before, count = [p.detach().clone() for p in net.parameters()], 0

    def rises() -> Tensor:
        nonlocal count
        count += 1
        return closure() + count

    optimizer = BandedNewton(net, search=LineSearch(adapt=False))
    optimizer.step(rises)
    assert not optimizer.last_step.accepted
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert count == optimizer.last_step.closure_runs == 32


def test_networks_of_other_layers_train(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)
    ).double()
    x = torch.randn(12, 1, 4, 4, dtype=torch.float64)
    labels = torch.arange(12) % 3
    optimizer = BandedNewton(net)
    with caplog.at_level(logging.WARNING, logger="hessopt.factors.exact_curvature"):
        values = [optimizer.step(lambda: nn.functional.cross_entropy(net(x), labels)).item() for _ in range(15)]
    assert values[-1] < 0.05 * values[0]
    assert [r.getMessage()[:44] for r in caplog.records] == ["no closed form for layers '0', '1' (samples "]
    assert net[1].num_batches_tracked == 15


def test_tape_is_freed() -> None:
    import weakref

    net, x = regression()[0], torch.randn(64, 2, dtype=torch.float64)
    outputs = []

    def closure() -> LeastSquares:
        inner = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(inner).sum(), inner, create_graph=True)
        outputs.append(weakref.ref(slope.grad_fn))
        outputs.append(weakref.ref(inner))
        return LeastSquares(slope[:, 0] - 1)

    BandedNewton(net, search=Fixed()).step(closure)
    assert outputs[1]() is None
