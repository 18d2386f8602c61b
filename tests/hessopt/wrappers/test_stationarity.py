"""When a curvature check is due."""

from __future__ import annotations

import pytest

from hessopt.wrappers.stationarity import Stationarity


def _run(rule: Stationarity, losses: list[float], norms: list[float] | None = None) -> list[int]:
    """Steps at which a check is due; none of them leads to an escape."""
    due = []
    for i, loss in enumerate(losses):
        if rule.due:
            due.append(i)
            rule.checked(escaped=False)
        rule.observe(loss, 1.0 if norms is None else norms[i])
    return due


def test_a_steady_descent_is_checked_at_the_start_only() -> None:
    assert _run(Stationarity(), [0.9**i for i in range(300)]) == [0]


def test_a_plateau_is_checked_ever_more_rarely() -> None:
    assert _run(Stationarity(patience=10, max_wait=80), [1.0] * 400) == [0, 20, 40, 80, 160, 240, 320]


def test_a_small_gradient_is_checked() -> None:
    losses = [0.9**i for i in range(100)]
    norms = [1.0] * 50 + [0.009] * 50
    assert _run(Stationarity(gradient_ratio=1e-2), losses, norms)[:2] == [0, 51]
    assert _run(Stationarity(gradient_ratio=1e-3), losses, norms) == [0]


def test_an_escape_forgets_the_saddle() -> None:
    rule = Stationarity(patience=5)
    for _ in range(40):
        if rule.due:
            rule.checked(escaped=False)
        rule.observe(1.0, 1e-9)
    assert rule.wait == 20
    rule.checked(escaped=True)
    assert rule.wait == 5
    for i in range(30):  # the gradient is large now, and the loss goes down
        assert not rule.due
        rule.observe(0.8**i, 1.0)


def test_noise_is_averaged() -> None:
    noise = [0.3 * (-1) ** i for i in range(200)]
    assert _run(Stationarity(), [3 * 0.99**i + n * 0.99**i for i, n in enumerate(noise)]) == [0]


def test_state_is_taken_up() -> None:
    one, other = Stationarity(), Stationarity()
    _run(one, [1.0] * 33)
    other.load_state_dict(one.state_dict())
    assert _run(one, [1.0] * 100) == _run(other, [1.0] * 100)
    assert one == other


def _costly(rule: Stationarity, steps: int, cost: int) -> list[int]:
    """Steps with a check, all of which lead to an escape, so that nothing but their cost keeps them apart."""
    checked = []
    for i in range(steps):
        if rule.due:
            checked.append(i)
            rule.checked(escaped=True, cost=cost)
        rule.observe(1.0, 1.0)
    return checked


def test_checks_are_put_off_until_they_are_a_share_of_the_steps() -> None:
    free = _costly(Stationarity(patience=1, overhead=None), 3000, 100)
    assert len(free) > 800
    rule = Stationarity(patience=1, overhead=0.5, free=1000)
    limited = _costly(rule, 3000, 100)
    assert limited[:10] == free[:10]  # 1000 gradients
    for number, step in enumerate(limited, 1):
        assert 100 * number <= max(1000, 0.5 * step)
    assert 1500 - 100 <= rule.spent == 100 * len(limited) <= 1500  # a half of 3000 steps
    assert rule.put_off > 2900 - 30
    assert rule.put_off + len(limited) <= 3000


@pytest.mark.parametrize("bad", [{"overhead": 0.0}, {"free": -1}])
def test_limits_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="overhead must be more than 0"):
        Stationarity(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"patience": 0}, {"max_wait": 5}, {"plateau": -1}, {"gradient_ratio": 2}])
def test_arguments_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"need 1 <= patience|shares in \[0, 1\]"):
        Stationarity(**bad)  # type: ignore[arg-type]
