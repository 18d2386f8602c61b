"""λ_max against the dense Hessian, thresholds against the linear dynamics, and the labels by their rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.errors import DiagnosticsError
from diagnostics.training.sharpness import SharpnessTracker, softmax_curvature_bound, stability_threshold
from tests.helpers.networks import Chain


def _data(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.to(device), torch.arange(12, device=device) % 3


def _dense(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    graph = diagnostics.capture(model, batch[0], lambda z: F.cross_entropy(z, batch[1]))
    return torch.linalg.eigvalsh(diagnostics.parameter_hessian(graph))[-1].item()


def test_follows_the_dense_hessian_and_starts_warm(device: torch.device) -> None:
    torch.manual_seed(0)
    model, batch = Chain(4, 6, 3).double().to(device), _data(device)
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    tracker = SharpnessTracker(model, F.cross_entropy, opt, rtol=1e-6)
    for _ in range(6):
        opt.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        measured = tracker.step(batch)
        assert measured is not None
        assert measured.value == pytest.approx(_dense(model, batch), rel=1e-8)
        assert measured.ratio == pytest.approx(0.3 * measured.value / 2)
        assert measured.loss == pytest.approx(loss.item())
        opt.step()
    assert [m.step for m in tracker.history] == list(range(6))
    cold = SharpnessTracker(model, F.cross_entropy, opt, rtol=1e-6).measure(batch)
    assert tracker.measure(batch).products < cold.products


def test_measures_every_so_many_steps_and_leaves_training_alone(device: torch.device) -> None:
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).to(device)
    watched = copy.deepcopy(alone)
    x, y = _data(device)
    ends: list[Any] = []
    for model in (alone, watched):
        torch.manual_seed(1)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        tracker = SharpnessTracker(model, F.cross_entropy, opt, every=2)
        for _ in range(5):
            opt.zero_grad()
            F.cross_entropy(model(x.float()), y).backward()
            if model is watched:
                tracker.step((x.float(), y))
            opt.step()
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        ends.append([model.state_dict(), grads, torch.get_rng_state(), opt.state_dict()])
    assert [m.step for m in tracker.history] == [0, 2, 4]
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.6, "dampening": 0.5},
        {"momentum": 0.8, "nesterov": True},
        {"weight_decay": 0.7},
        {"momentum": 0.9, "weight_decay": 0.7},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.7},
    ],
)
def test_threshold_is_where_a_quadratic_diverges(settings: dict[str, Any]) -> None:
    """½λx² under torch.optim.SGD: bounded a little below the threshold, growing a little above."""
    for factor, grows in ((0.99, False), (1.01, True)):
        x = nn.Parameter(torch.ones((), dtype=torch.float64))
        opt = torch.optim.SGD([x], lr=0.1, **settings)
        curvature = stability_threshold(opt.param_groups[0]) * factor
        for _ in range(1000):
            opt.zero_grad()
            (curvature * x.square() / 2).backward()
            opt.step()
        assert (x.abs().item() > 1) == grows
    assert stability_threshold({**opt.param_groups[0], "lr": 0.0}) == float("inf")


def test_labels_follow_the_rule() -> None:
    tracker = SharpnessTracker(Chain(4, 3), F.cross_entropy, 10.0)
    tracker.measure((_data()[0].float(), _data()[1]))
    first = tracker.history[0]

    def label(*values: float) -> str:
        tracker.history[:] = [type(first)(**{**vars(first), "value": v, "ratio": v / 10}) for v in values[:-1]]
        return tracker._phase(values[-1], values[-1] / 10)

    assert label(1.0) == "stable"
    assert label(1.0, 1.04) == "stable"
    assert label(1.0, 1.5) == "progressive sharpening"
    assert label(1.5, 1.0) == "flattening"
    assert label(0.1, 1.0, 1.0, 1.0, 1.0, 1.0) == "stable"  # the rise is before the window
    assert label(5.0, 8.1) == "edge of stability"
    assert label(11.0, 11.9) == "edge of stability"
    assert label(11.0, 12.1) == "catapult"
    assert label(5.0, 7.9) == "progressive sharpening"


def test_a_run_that_crosses_the_edge() -> None:
    """Full-batch descent sharpens progressively, passes 2/η, and settles at it."""
    torch.manual_seed(0)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.sin(3 * x[:, :1])
    model = Chain(4, 24, 24, 1).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = SharpnessTracker(model, F.mse_loss, opt, every=100)
    for _ in range(1600):
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        tracker.step((x, y))
        opt.step()
    phases = [m.phase for m in tracker.history]
    assert phases[:3] == ["stable", "progressive sharpening", "progressive sharpening"]
    assert phases[-5:] == ["edge of stability"] * 5
    assert all(abs(m.ratio - 1) < 0.1 for m in tracker.history[-5:])


def test_softmax_bound_and_the_counterexample_to_the_published_one() -> None:
    p = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).softmax(-1)
    top = torch.linalg.eigvalsh(torch.diag_embed(p) - p[:, :, None] * p[:, None])[:, -1]
    bound = softmax_curvature_bound(p)
    assert (top <= bound * (1 + 1e-12)).all()
    published = (p * (1 - p)).amax(-1)
    assert (top > published).any()
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert torch.linalg.eigvalsh(torch.diag(half) - torch.outer(half, half))[-1].item() == pytest.approx(0.5)
    assert softmax_curvature_bound(half).item() == pytest.approx(0.5)  # attained; p(1 − p) is ¼
    with pytest.raises(DiagnosticsError, match="sum to 1"):
        softmax_curvature_bound(torch.tensor([0.5, 0.6]))


def test_bad_arguments_are_refused() -> None:
    model = Chain(4, 3)
    with pytest.raises(DiagnosticsError, match="Adam scales every entry"):
        SharpnessTracker(model, F.cross_entropy, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="threshold must be positive"):
        SharpnessTracker(model, F.cross_entropy, -1.0)
    with pytest.raises(ValueError, match="every must be"):
        SharpnessTracker(model, F.cross_entropy, 1.0, every=0)
    with pytest.raises(ValueError, match="band must be"):
        SharpnessTracker(model, F.cross_entropy, 1.0, band=0)
