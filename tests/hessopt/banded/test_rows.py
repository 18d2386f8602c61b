"""Random rows of least squares: what is drawn, what it is the expectation of, growth, refusals, resuming."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessopt import BandedNewton, Damped, Fixed, LeastSquares, LineSearch, Rows
from hessopt.banded import step as steps
from hessopt.banded.rows import FEWEST, RowChoice, Subset, chances, draw, draw_by_residuals, systematic
from hessopt.errors import ClosureError
from tests.helpers.kronecker_reference import regression, relative, resumes

F64 = torch.float64
STRATA = (40, 24)


def problem(
    seed: int = 0, outputs: int = 1, device: torch.device | str = "cpu"
) -> tuple[nn.Sequential, Callable[[Tensor], LeastSquares]]:
    """A network, and the mean squared residuals of the 64 samples of :func:`regression`."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs)).double().to(device)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=F64).to(device)
    y = (x[:, :1] * x[:, 1:]).sin() * torch.arange(1, outputs + 1, device=device)
    return net, lambda rows: LeastSquares((net(x[rows]) - y[rows]) * (2 / 64) ** 0.5)


def vector(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def measured(net: nn.Module, subset: Subset) -> list[Tensor]:
    """Objective, gradient and Gauss-Newton matrix."""
    result = subset()
    jacobian = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(r, list(net.parameters()), retain_graph=True)])
            for r in result.residuals.flatten()
        ]
    )
    residuals = result.residuals.detach().flatten()
    return [result.loss.detach(), jacobian.T @ residuals, jacobian.T @ jacobian]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(("strata", "size"), [((5,), 2), ((3, 5), 3), ((1, 2, 4), 4), ((6, 2), 8)])
def test_objective_gradient_and_curvature_of_all_subsets_average_to_those_of_the_whole(
    strata: tuple[int, ...], size: int, outputs: int
) -> None:
    net, closure = problem(outputs=outputs)
    total = sum(strata)
    rows, scale = draw(Rows(strata), size, 0)
    starts = [sum(strata[:s]) for s in range(len(strata))]
    shares = [int(((rows >= start) & (rows < start + n)).sum()) for start, n in zip(starts, strata, strict=True)]
    subsets = [
        [start + i for start, own in zip(starts, parts, strict=True) for i in own]
        for parts in itertools.product(*map(itertools.combinations, map(range, strata), shares))
    ]
    found = [measured(net, Subset(closure, torch.tensor(subset), scale, total)) for subset in subsets]
    whole = measured(net, Subset(closure, torch.arange(total), None, total))
    for parts, expected in zip(zip(*found, strict=True), whole, strict=True):
        assert relative(sum(parts) / len(found), expected) < 1e-12


@pytest.mark.parametrize("size", [1, 3, 6, 8])
def test_rows_drawn_by_their_residuals_have_the_expectation_of_the_whole(size: int) -> None:
    net, closure = problem(outputs=2)
    whole = Subset(closure, torch.arange(9), None, 9)
    expected = measured(net, whole)
    assert whole.squares is not None
    chance = chances(whole.squares, size)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    ends = chance[order].cumsum(0) % 1
    edges = torch.cat([ends, torch.tensor([0.0, 1.0])]).sort().values  # in between, the rows stay the same
    total = [torch.zeros_like(part) for part in expected]
    drawn = torch.zeros(9, dtype=F64)
    for low, high in itertools.pairwise(edges.tolist()):
        if high - low < 1e-14:
            continue
        rows = systematic(chance, order, (low + high) / 2)
        assert len(rows) == size
        drawn[rows] += high - low
        parts = measured(net, Subset(closure, rows, chance[rows].rsqrt(), 9))
        total = [t + (high - low) * part for t, part in zip(total, parts, strict=True)]
    assert relative(drawn, chance) < 1e-12
    for part, value in zip(total, expected, strict=True):
        assert relative(part, value) < 1e-12


def test_chances_are_half_equal_and_half_in_proportion_to_the_squares_where_none_is_sure() -> None:
    squares = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=F64)
    assert torch.allclose(chances(squares, 1), 0.125 + squares / 16, rtol=1e-15)
    capped = chances(squares, 3)
    assert float(capped.sum()) == pytest.approx(3, rel=1e-14)
    assert capped[3] == 1
    assert torch.allclose(capped[1] / capped[0], torch.tensor(1.5, dtype=F64))
    for useless in (torch.zeros(4, dtype=F64), torch.tensor([1.0, math.inf, 1.0, 1.0]), squares * math.nan):
        assert torch.allclose(chances(useless.double(), 3), torch.full((4,), 0.75, dtype=F64))


def test_every_subset_is_drawn_equally_often() -> None:
    options = Rows((3, 4), seed=5)
    counts = Counter(tuple(draw(options, 4, step)[0].tolist()) for step in range(3600))
    assert len(counts) == math.comb(3, 2) * math.comb(4, 3)
    # 300 of each are expected, with a standard deviation of 17.
    assert all(abs(count - 300) < 75 for count in counts.values())


@pytest.mark.parametrize("size", [1, 7, 40, 99, 120])
def test_strata_have_their_shares(size: int) -> None:
    strata = (90, 27, 3)
    rows, scale = draw(Rows(strata), size, 3)
    assert torch.equal(rows, rows.unique())
    shares = [int(((rows >= a) & (rows < b)).sum()) for a, b in ((0, 90), (90, 117), (117, 120))]
    assert shares == [math.ceil(size * count / 120) for count in strata]
    if size == 120:
        assert scale is None
        assert torch.equal(rows, torch.arange(120))
    else:
        assert scale is not None
        expected = torch.cat([torch.full((n,), (c / n) ** 0.5, dtype=F64) for n, c in zip(shares, strata, strict=True)])
        assert torch.allclose(scale, expected, rtol=1e-15)


def test_draws_differ_from_step_to_step_and_by_seed() -> None:
    a, b, c = draw(Rows(100), 10, 0)[0], draw(Rows(100), 10, 1)[0], draw(Rows(100, seed=1), 10, 0)[0]
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(a, draw(Rows(100), 10, 0)[0])


@pytest.mark.parametrize("search", [Damped(), LineSearch(), Fixed(1e-3)])
@pytest.mark.parametrize("rows", [64, STRATA, Rows(64, first=64), Rows([1, 63], growth=1, first=64)])
def test_all_rows_are_the_step_without_rows(rows: Any, search: Any) -> None:
    (net, closure), (twin, again) = problem(), problem()
    optimizer, plain = BandedNewton(net, rows=rows, search=search), BandedNewton(twin, search=search)
    for _ in range(5):
        assert abs(optimizer.step(closure) - plain.step(lambda: again(torch.arange(64)))) < 1e-12
    assert optimizer.last_step is not None
    assert optimizer.last_step.rows == 64
    assert optimizer.last_step.whole_loss is None
    assert relative(vector(net), vector(twin)) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_a_step_on_rows_is_that_of_their_rescaled_residuals(momentum: float, decay: float) -> None:
    (net, closure), (twin, again) = problem(outputs=2), problem(outputs=2)
    settings: dict[str, Any] = {"search": Fixed(1e-2), "momentum": momentum, "weight_decay": decay}
    options = Rows(STRATA, first=10, growth=1)
    optimizer, plain = BandedNewton(net, rows=options, **settings), BandedNewton(twin, **settings)
    for step in range(4):
        rows, scale = draw(options, 10, step)
        assert scale is not None
        optimizer.step(closure)
        plain.step(lambda rows=rows, scale=scale: LeastSquares(again(rows).residuals * scale[:, None]))
        assert relative(vector(net), vector(twin)) < 1e-10


def test_trials_are_on_the_rows_of_the_step_and_a_rejected_one_leaves_no_trace() -> None:
    net, closure = problem()
    seen: list[Tensor] = []

    def rising(rows: Tensor) -> LeastSquares:
        seen.append(rows)
        return LeastSquares(closure(rows).residuals * (1.0 if len(seen) == 1 else 1e3))

    optimizer = BandedNewton(net, rows=Rows(64, first=8), search=Damped(max_rejections=2))
    before = vector(net)
    optimizer.step(rising)
    assert optimizer.last_step is not None
    assert not optimizer.last_step.accepted
    assert torch.equal(vector(net), before)
    assert len(seen) == 3
    assert all(torch.equal(rows, seen[0]) for rows in seen)


def test_subsets_grow_to_all_rows_where_the_objective_stalls() -> None:
    net, closure = problem()
    asked: list[int] = []

    def counting(rows: Tensor) -> LeastSquares:
        asked.append(len(rows))
        return closure(rows)

    optimizer = BandedNewton(net, lr=0.0, rows=Rows(64, first=10, every=2))
    sizes, wholes = [], []
    for _ in range(12):
        optimizer.step(counting)
        assert optimizer.last_step is not None
        sizes.append(optimizer.last_step.rows)
        wholes.append(optimizer.last_step.whole_loss)
    assert sizes == [10] * 4 + [20] * 2 + [40] * 2 + [64] * 4
    expected = closure(torch.arange(64)).item()
    assert [value is not None for value in wholes] == [False, True] * 4 + [False] * 4
    assert all(value is None or abs(value - expected) < 1e-12 for value in wholes)
    assert asked.count(64) == 4 + 4  # looks at all rows, and steps on them


def test_the_objective_on_all_rows_has_the_weight_decay() -> None:
    net, closure = problem()
    optimizer = BandedNewton(net, rows=Rows(64, first=10, every=1), weight_decay=0.1)
    optimizer.step(closure)
    expected = closure(torch.arange(64)).item() + 0.05 * float(vector(net).square().sum())
    assert optimizer.state[net[0].weight]["whole"] == pytest.approx(expected, rel=1e-12)


def test_the_subset_stays_while_the_objective_falls_and_where_it_is_to_stay() -> None:
    choice, squares = RowChoice(Rows(1000, first=10, growth=3)), torch.ones(1000, dtype=F64)
    state: dict[str, Any] = {"step": 10, "subset": 10, "start": 5.0}
    for objective, size in [(5.0, 10), (4.0, 10), (3.7, 30), (3.0, 30), (math.nan, 90), (math.inf, 270), (1.0, 270)]:
        assert not choice.learn(state, objective, squares)
        assert state["subset"] == size
    assert state["whole"] == 1.0
    choice.learn(state, 2.0, squares)
    choice.learn(state, 2.0, squares)
    assert state["subset"] == 1000
    assert not choice.follows(state)
    net, closure = problem()
    optimizer = BandedNewton(net, lr=0.0, rows=Rows(64, first=10, every=1, growth=1))
    for _ in range(4):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        assert (optimizer.last_step.rows, optimizer.last_step.whole_loss) == (10, None)


@pytest.mark.parametrize(
    ("first", "adapts", "start", "objectives", "begins"),
    [
        (10, True, 9.0, [2.9, 0.9], []),
        (10, True, 9.0, [3.1], [0]),
        (10, True, 9.0, [2.9, 1.0], [1]),
        (10, True, 9.0, [2.9, math.nan], [1]),
        (10, True, 9.0, [0.05, 0.05, 0.08], []),  # far down already
        (10, False, 9.0, [9.0, 9.0], []),
        (26, True, 9.0, [9.0], []),  # many of all rows
    ],
)
def test_draws_follow_the_residuals_where_the_objective_on_few_rows_falls_slowly(
    first: int, adapts: bool, start: float, objectives: list[float], begins: list[int]
) -> None:
    choice, squares = RowChoice(Rows(100, first=first), adapts), torch.ones(100, dtype=F64)
    state: dict[str, Any] = {"step": 10, "subset": first, "start": start}
    found = []
    for i, objective in enumerate(objectives):
        before = choice.size(state)
        if choice.learn(state, objective, squares):
            found.append(i)
            assert choice.size(state) == before
    assert found == begins
    assert choice.follows(state) == bool(begins)


def test_draws_that_follow_the_residuals_grow_by_the_least_objective_since_the_last_decision() -> None:
    choice, squares = RowChoice(Rows(100, every=3), True), torch.ones(100, dtype=F64)
    state: dict[str, Any] = {"step": 0, "subset": 10, "start": 9.0, "whole": 1.0, "squares": squares}
    for step, (objective, size) in enumerate([(0.8, 10), (5.0, 10), (7.0, 10), (0.9, 10), (5.0, 10), (0.75, 20)], 1):
        state["step"] = step
        assert choice.momentum(state) == pytest.approx(0.9, rel=1e-15)
        assert not choice.learn(state, objective, step * squares)
        assert choice.size(state) == size
        assert torch.equal(state["squares"], step * squares)
    assert choice.momentum(state) == pytest.approx(0.8, rel=1e-15)
    state["subset"] = 100
    assert choice.momentum(state) == 0


def test_steps_on_rows_that_follow_the_residuals_are_damped_with_momentum() -> None:
    """μ = 1 - 8/64."""
    (net, closure), (twin, again) = problem(), problem()
    options = Rows(64, first=8, every=1000, residuals=True)
    optimizer, plain = BandedNewton(net, rows=options), BandedNewton(twin, search=Damped(), momentum=0.875)
    own = optimizer.state[net[0].weight]
    own["squares"] = closure(torch.arange(64)).residuals.detach().square()[:, 0]
    for step in range(5):
        rows, scale = draw_by_residuals(options, 8, step, own["squares"])
        optimizer.step(closure)
        plain.step(lambda rows=rows, scale=scale: LeastSquares(again(rows).residuals * scale[:, None]))
        assert relative(vector(net), vector(twin)) < 1e-9
        expected = closure(torch.arange(64)).residuals.detach().square()[:, 0]
        assert torch.allclose(own["squares"], expected, rtol=1e-12)


def test_the_first_size_is_what_a_few_gradients_pay_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "FEW_GRADIENTS", 6)
    monkeypatch.setattr(steps, "ROW_FLOOR", 0)
    choice = RowChoice(Rows(1000))
    for most, size in [(137, 137), (499, 499), (1000, 500), (5, FEWEST)]:
        state: dict[str, Any] = {}
        choice.settle(state, torch.tensor(7.0), lambda rows, most=most: rows <= most)
        assert state == {"subset": size}
    adapts: dict[str, Any] = {}
    RowChoice(Rows(1000), adapts=True).settle(adapts, torch.tensor(7.0), lambda rows: True)
    assert adapts == {"subset": 500, "start": 7.0}
    state = {"subset": 3}
    choice.settle(state, torch.tensor(7.0), lambda rows: True)
    assert state == {"subset": 3}

    def size_of(derivatives: int) -> int:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
        x = torch.rand(4000, 2, dtype=F64)

        def closure(rows: Tensor) -> LeastSquares:
            points = x[rows].requires_grad_()
            value = net(points)[:, 0]
            for _ in range(derivatives):
                (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
                value = slope.sum(1)
            return LeastSquares(value / 4000**0.5)

        optimizer = BandedNewton(net, rows=4000)
        optimizer.step(closure)
        size: int = optimizer.state[net[0].weight]["subset"]
        return size

    sizes = [size_of(derivatives) for derivatives in (0, 2, 3)]
    assert sizes[0] == FEWEST < sizes[1] < sizes[2] < 4000  # the dearer the gradient, the more rows


@pytest.mark.parametrize(("first", "search"), [(16, LineSearch()), (17, Damped())])
def test_the_search_is_that_of_the_rows(first: int, search: Any) -> None:
    """33 parameters: a line search while twice the rows are at most as many. Bit for bit."""
    (net, closure), (twin, again) = problem(), problem()
    options = Rows(64, first=first, growth=1)
    optimizer, told = BandedNewton(net, rows=options), BandedNewton(twin, rows=options, search=search)
    assert len(vector(net)) == 33
    for _ in range(6):
        optimizer.step(closure)
        told.step(again)
    assert torch.equal(vector(net), vector(twin))
    assert optimizer.last_step == told.last_step


@pytest.mark.parametrize("rows", [64, list(STRATA)])
def test_training_on_rows(rows: Any) -> None:
    net, closure = problem()
    optimizer = BandedNewton(net, rows=Rows(rows, first=24))
    first = closure(torch.arange(64)).item()
    for _ in range(60):
        optimizer.step(closure)
    assert closure(torch.arange(64)).item() < 0.05 * first


def test_the_global_generator_is_not_used() -> None:
    net, closure = problem()
    state = torch.get_rng_state()
    optimizer = BandedNewton(net, rows=Rows(64, first=8, every=1))
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("through_file", [False, True])
def test_resumes_bit_for_bit_while_the_subset_grows(through_file: bool) -> None:
    (net, closure), (other, again) = problem(), problem(seed=9)
    settings: dict[str, Any] = {"rows": Rows(STRATA, first=6, every=2, residuals=True), "momentum": 0.5, "lr": 1e-3}
    optimizer, resumed = (BandedNewton(m, **settings) for m in (net, other))
    resumes((net, optimizer, closure), (other, resumed, again), through_file)
    assert resumed.state[other[0].weight]["subset"] > 6
    assert torch.equal(resumed.state[other[0].weight]["squares"], optimizer.state[net[0].weight]["squares"])
    assert resumed.state[other[0].weight]["whole"] == optimizer.state[net[0].weight]["whole"]


def test_states_with_and_without_rows_are_not_mixed_up() -> None:
    (net, closure), (other, _) = problem(), problem()
    optimizer = BandedNewton(net, rows=Rows(64, first=8))
    optimizer.step(closure)
    with pytest.raises(ValueError, match=r"'subset', which BandedNewton does not keep.*Nothing was loaded"):
        BandedNewton(other).load_state_dict(optimizer.state_dict())


def test_copies_go_on_alike() -> None:
    net, closure = problem()
    optimizer = BandedNewton(net, rows=Rows(64, first=8, every=1))
    for _ in range(3):
        optimizer.step(closure)
    twin, copied = copy.deepcopy((net, optimizer))
    assert copied.rows == optimizer.rows
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    y = (x[:, :1] * x[:, 1:]).sin()
    for _ in range(3):
        optimizer.step(closure)
        copied.step(lambda rows: LeastSquares((twin(x[rows]) - y[rows]) * (2 / 64) ** 0.5))
    assert torch.equal(vector(net), vector(twin))


def test_device(device: torch.device) -> None:
    net, closure = problem(device=device)
    optimizer = BandedNewton(net, rows=Rows(64, first=16))

    def checked(rows: Tensor) -> LeastSquares:
        assert rows.device.type == device.type
        assert rows.dtype == torch.int64
        return closure(rows)

    for _ in range(3):
        optimizer.step(checked)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda c: lambda rows: c(torch.arange(64)),
            "asked for 8 rows and returned the residuals of all 64",
        ),
        (lambda c: lambda rows: c(rows[1:]), r"asked for 8 rows and returned residuals of shape \(7, 1\)"),
        (lambda c: lambda rows: LeastSquares(c(rows).residuals.repeat(2, 1)), r"shape \(16, 1\).*in shape \(8,\)"),
        (lambda c: lambda rows: LeastSquares(c(rows).residuals.sum()), r"returned residuals of shape \(\)"),
        (lambda c: lambda rows: c(rows).loss, "must return hessopt.LeastSquares.*returned a tensor of shape"),
        (lambda c: lambda rows: None, "must return hessopt.LeastSquares.*returned None"),
        (lambda c: lambda: c(torch.arange(64)), r"with rows= the closure takes one argument.*leave rows= out"),
        (lambda c: lambda rows, more: c(rows), "with rows= the closure takes one argument"),
    ],
)
def test_closures_that_do_not_fit(make: Callable[[Any], Any], message: str) -> None:
    net, closure = problem()
    optimizer = BandedNewton(net, rows=Rows(64, first=8))
    before = vector(net)
    with pytest.raises(ClosureError, match=message):
        optimizer.step(make(closure))
    assert torch.equal(vector(net), before)
    assert not optimizer.state


@pytest.mark.parametrize("first", [8, 64])
def test_backward_is_left_to_the_optimizer(first: int) -> None:
    net, closure = problem()

    def backward(rows: Tensor) -> LeastSquares:
        result = closure(rows)
        result.backward()
        return result

    with pytest.raises(ClosureError, match=r"called backward\(\), and with rows= .*Leave zero_grad\(\) and backward"):
        BandedNewton(net, rows=Rows(64, first=first)).step(backward)


def test_a_closure_of_rows_where_there_are_none() -> None:
    net, closure = problem()
    before = vector(net)
    with pytest.raises(ClosureError, match=r"takes an argument, and none is given.*BandedNewton\(model, rows=N\)"):
        BandedNewton(net).step(closure)
    assert torch.equal(vector(net), before)


def test_arguments_with_defaults_may_stay_out() -> None:
    net, closure = regression()
    before = vector(net)
    BandedNewton(net).step(lambda scale=1.0: closure() * scale)
    assert not torch.equal(vector(net), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": 0}, "a count of rows must be an integer of at least 1, got 0"),
        ({"counts": 2.5}, "a count of rows must be an integer of at least 1, got 2.5"),
        ({"counts": []}, "a list of at least one"),
        ({"counts": [3, 2.5]}, "a count of rows must be an integer of at least 1, got 2.5"),
        ({"counts": 9, "first": 0}, "first must be an integer of at least 1"),
        ({"counts": 9, "growth": 0.5}, "growth must be a finite number of at least 1, got 0.5"),
        ({"counts": 9, "growth": math.inf}, "growth must be a finite number"),
        ({"counts": 9, "every": 0}, "every must be an integer of at least 1"),
        ({"counts": 9, "seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows(**options)
    if set(options) == {"counts"}:
        with pytest.raises(ValueError, match=message):
            BandedNewton(nn.Linear(2, 1), rows=options["counts"])
