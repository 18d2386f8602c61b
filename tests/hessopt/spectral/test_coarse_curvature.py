"""The curvature between the steps of layers, against double back-propagation; and the lengths that follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagnostics
from hessopt import KroneckerAveraging, NamedLoss
from hessopt.averages.gathering import Gathering
from hessopt.averages.running import Pending, RunningAverages
from hessopt.spectral.coarse_curvature import ALIKE, PATIENCE, USUAL, CoarseCurvature, changes_along

F64 = torch.float64


class Twice(nn.Module):
    """A layer that is called twice, and a convolution with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.again = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).tanh().mean((2, 3))
        h = self.again(self.again(h).tanh()).tanh()
        return self.head(h)


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {"chain": (chain, (7, 4)), "shared": (Twice, (5, 2, 4, 4))}


@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("case", CASES)
def test_the_curvature_between_steps_is_that_of_the_whole_matrix(case: str, loss: Any, curvature: Any) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make().to(F64)
    x = torch.randn(shape, dtype=F64)
    y = torch.randint(3, (len(x),)) if loss == "cross_entropy" else torch.randn(len(x), 3, dtype=F64)
    loss_fn: Any = {"mse": nn.functional.mse_loss}.get(loss, nn.functional.cross_entropy)
    ggn = curvature == "ggn"
    options = KroneckerAveraging(columns="exact" if ggn else None)
    named = NamedLoss(loss) if ggn else None
    gathering: Gathering[Pending] = Gathering(model, model.parameters(), curvature, named, options)
    averages = RunningAverages(gathering, 0.9, keep=True)
    loss_fn(model(x), y).backward()
    averages.commit([p.grad for p in gathering.parameters])
    ((batch, _),) = averages.last
    steps = [torch.randn(block.shape, dtype=F64) for block in gathering.blocks]
    changes = changes_along(gathering.blocks, range(len(steps)), batch, steps)

    whole: Any = diagnostics.GaussNewtonOperator(model, (x, y), loss_fn)
    if not ggn:
        whole = diagnostics.FisherOperator(model, (x, y), loss_fn, kind="empirical")
    place = {p: i for i, p in enumerate(model.parameters())}
    vectors = torch.zeros(len(steps), whole.shape[1], dtype=F64)
    starts = torch.tensor([0, *(p.numel() for p in model.parameters())]).cumsum(0)
    for row, (block, step) in enumerate(zip(gathering.blocks, steps, strict=True)):
        for p, view in zip(block.parameters, block.views(step), strict=True):
            start = int(starts[place[p]])
            vectors[row, start : start + p.numel()] = view.flatten()
    expected = vectors @ (whole @ vectors.T)
    torch.testing.assert_close(changes.T @ changes, expected, rtol=1e-9, atol=1e-12)


def chain(count: int) -> Tensor:
    """Distances of layers in a row."""
    place = torch.arange(count, dtype=F64)
    return (place[:, None] - place).abs()


def of(curvature: Tensor, slopes: Tensor, rows: int = 10**12) -> CoarseCurvature:
    coarse = CoarseCurvature(chain(len(slopes)), "full", 0.9, 1.0, F64)
    coarse.curvature.copy_(curvature)
    coarse.slopes.copy_(slopes)
    coarse.lengths.copy_(coarse.minimised(rows))
    return coarse


def test_alike_layers_share_the_minimiser_along_a_common_length() -> None:
    torch.manual_seed(0)
    z = torch.randn(40, 4, dtype=F64) + 1
    curvature, slopes = z.T @ z, torch.rand(4, dtype=F64) + 1.5
    lengths = of(curvature, slopes).lengths
    assert float(lengths.max() - lengths.min()) < 1e-12
    torch.testing.assert_close(lengths[0], slopes.sum() / curvature.sum(), rtol=1e-12, atol=0)


def test_unlike_layers_have_lengths_of_their_own() -> None:
    """Uncoupled layers: r = g/C, and what is beyond three times the median is kept."""
    curvature = torch.diag(torch.tensor([1.0, 1.0, 1.0, 100.0], dtype=F64))
    slopes = torch.ones(4, dtype=F64)
    lengths = of(curvature, slopes).lengths
    assert float(lengths[0] / lengths[3]) == pytest.approx(100 / ALIKE)


def test_lengths_minimise_the_model_along_their_direction() -> None:
    torch.manual_seed(0)
    z = torch.randn(9, 5, dtype=F64) * torch.tensor([1, 1, 9, 0.1, 1], dtype=F64)
    curvature, slopes = z.T @ z, torch.rand(5, dtype=F64)
    s = of(curvature, slopes).lengths

    def model(t: float) -> float:
        return float(t * t * (s @ curvature @ s) / 2 - t * (slopes @ s))

    assert model(1.0) < min(model(0.99), model(1.01), 0.0)


def test_steps_against_the_slope_are_not_taken() -> None:
    s = of(torch.eye(3, dtype=F64), -torch.ones(3, dtype=F64)).lengths
    assert torch.equal(s, torch.zeros(3, dtype=F64))


def test_coupling_below_the_noise_of_sampling_does_not_count() -> None:
    """It changes the direction, in which it is compared, only where it is beyond that."""
    curvature = torch.tensor([[1.0, 0.05, 0.0], [0.05, 1.0, 0.0], [0.0, 0.0, 100.0]], dtype=F64)
    slopes = torch.ones(3, dtype=F64)
    few, many = of(curvature, slopes, rows=20).lengths, of(curvature, slopes).lengths
    assert float(few[0] / few[2]) == pytest.approx(100 / ALIKE)
    assert float(many[0] / many[2]) == pytest.approx(100 / 1.05 / ALIKE)


def test_a_band_leaves_out_what_is_beyond_it() -> None:
    torch.manual_seed(0)
    z = torch.randn(30, 3, dtype=F64) + 2
    for bandwidth in (0, 1):
        coarse = CoarseCurvature(chain(3), bandwidth, 0.9, 1.0, F64)
        coarse.update(z, torch.ones(3, dtype=F64), 1, torch.tensor(True))
        kept = (z.T @ z) * (chain(3) <= bandwidth)
        torch.testing.assert_close(coarse.lengths, torch.ones(3, dtype=F64) * 3 / kept.sum(), rtol=1e-12, atol=0)
        assert float(coarse.radius) == bandwidth


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_an_automatic_band_ends_where_a_twentieth_of_the_curvature_is_left(radius: int) -> None:
    """Not connected is furthest of all, and a coupling that is noise does not count."""
    distances = chain(5)
    distances[4, :4] = distances[:4, 4] = torch.inf
    curvature = torch.where(distances <= radius, 1.0, 1e-3).to(F64)
    coarse, fixed = (CoarseCurvature(distances, bandwidth, 0.9, 1.0, F64) for bandwidth in ("auto", radius))
    for c in (coarse, fixed):
        c.curvature.copy_(curvature)
        c.slopes.fill_(1.0)
    assert torch.equal(coarse.minimised(10**12), fixed.minimised(10**12))
    assert float(coarse.radius) == radius
    coarse.curvature.copy_(torch.where(distances == 0, 1.0, 0.1).to(F64))
    coarse.minimised(10)
    assert float(coarse.radius) == 0


def test_unsound_batches_change_nothing() -> None:
    coarse = CoarseCurvature(chain(2), "auto", 0.9, 0.5, F64)
    coarse.update(torch.ones(3, 2, dtype=F64), torch.ones(2, dtype=F64), 1, torch.tensor(True))
    before = [t.clone() for t in coarse.tensors]
    coarse.update(torch.full((3, 2), torch.nan, dtype=F64), torch.ones(2, dtype=F64), 2, torch.tensor(True))
    coarse.update(torch.ones(3, 2, dtype=F64), torch.ones(2, dtype=F64), 3, torch.tensor(False))
    assert all(map(torch.equal, before, coarse.tensors))


def test_layers_without_curvature_have_the_common_length_of_the_others() -> None:
    """Whatever their slope is."""
    curvature = torch.diag(torch.tensor([1.0, 1.0, 100.0, 0.0, 1.0], dtype=F64))
    slopes = torch.tensor([1.0, 1.0, 1.0, 1e9, 1.0], dtype=F64)
    lengths, others = of(curvature, slopes).lengths, [0, 1, 2, 4]
    alone = of(curvature[others][:, others], slopes[others]).lengths
    torch.testing.assert_close(lengths[others], alone, rtol=1e-12, atol=0)
    assert float(lengths[3]) == pytest.approx(float(lengths[0]))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_without_any_curvature_lengths_are_fixed(dtype: torch.dtype) -> None:
    for slope in (1e-20, 1.0, 1e20):
        lengths = of(torch.zeros(3, 3, dtype=dtype), torch.full((3,), slope, dtype=dtype)).lengths
        assert lengths.tolist() == pytest.approx([USUAL] * 3)
    assert not of(torch.zeros(3, 3, dtype=F64), -torch.ones(3, dtype=F64)).lengths.any()


@pytest.mark.parametrize("response", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("agreement", [-1.0, 0.1, 0.6])
def test_lengths_follow_the_model_by_their_response(response: float, agreement: float) -> None:
    """Powers of what is asked for and of the geometric mean of the past, which starts at the usual length."""
    torch.manual_seed(1)
    coarse = CoarseCurvature(chain(3), "full", 0.0, response, F64)
    coarse.agreement.copy_(torch.tensor([agreement * 7, 7.0], dtype=F64))
    past = torch.full((3,), USUAL, dtype=F64)
    part = response + (1 - response) * {-1.0: 0.0, 0.1: 0.2, 0.6: 1.0}[agreement]
    last, capped = 0, 0
    for step, size in ((1, 1.0), (2, 1.0), (900, 0.1), (9000, 30.0), (90000, 100.0)):
        z = torch.randn(40, 3, dtype=F64) * torch.tensor([size, size, 8 * size], dtype=F64)
        coarse.update(z, torch.ones(3, dtype=F64), step, torch.tensor(True))
        asked = coarse.minimised(40)
        share = (step - last) / (step + PATIENCE)
        past, last = past ** (1 - share) * asked**share, step
        capped += bool((past > USUAL).any())
        expected = asked**part * past.clamp(max=USUAL) ** (1 - part)
        torch.testing.assert_close(coarse.lengths, expected, rtol=1e-10, atol=0)
    assert 0 < capped < 5


def test_agreement_is_that_of_momentum_and_gradients() -> None:
    """It is 1 for gradients that stay, near 0 for independent ones, and nothing that is not sound or is zero counts."""
    torch.manual_seed(0)

    def after(noise: float) -> CoarseCurvature:
        coarse = CoarseCurvature(chain(2), "full", 0.9, 0.5, F64)
        momentum, mean = torch.zeros(5000, dtype=F64), torch.randn(5000, dtype=F64)
        for _ in range(200):
            gradient = mean + noise * torch.randn(5000, dtype=F64)
            coarse.compare(momentum, gradient, torch.tensor(1.0))
            momentum = 0.9 * momentum + 0.1 * gradient
        return coarse

    for noise in (0.0, 2.0, 30.0):
        m2, g2 = 1 + noise**2 * 0.1 / 1.9, 1 + noise**2
        assert after(noise).agreement.tolist() == pytest.approx([1 / g2, m2 / g2], abs=0.03)
    coarse = after(1.0)
    before = coarse.agreement.clone()
    for size, sound in ((1.0, 0.0), (0.0, 1.0), (1e200, 1.0)):
        coarse.compare(torch.ones(3, dtype=F64), torch.full((3,), size, dtype=F64), torch.tensor(sound))
    assert torch.equal(coarse.agreement, before)


def test_the_past_of_a_layer_that_has_no_slope_stays() -> None:
    coarse = CoarseCurvature(chain(2), "full", 0.9, 0.5, F64)
    z = torch.randn(9, 2, dtype=F64)
    coarse.update(z, -torch.ones(2, dtype=F64), 50, torch.tensor(True))
    assert not coarse.lengths.any()
    torch.testing.assert_close(coarse.reference.exp(), torch.full((2,), USUAL, dtype=F64))


def test_one_extreme_batch_does_not_end_training() -> None:
    """A recurrent network's curvature may be a million times the usual for a batch; it counts for ten times that."""
    torch.manual_seed(2)
    z, slopes = torch.randn(30, 2, dtype=F64), torch.ones(2, dtype=F64)
    coarse = CoarseCurvature(chain(2), "full", 0.9, 1.0, F64)
    for step in range(1, 21):
        coarse.update(z, slopes, step, torch.tensor(True))
    before = coarse.lengths.clone()
    coarse.update(1e3 * z, slopes, 21, torch.tensor(True))
    torch.testing.assert_close(coarse.lengths, before / (0.9 + 0.1 * 10), rtol=1e-12, atol=0)
    first = CoarseCurvature(chain(2), "full", 0.9, 1.0, F64)
    for step, size in ((1, 1.0), (2, 1e3)):  # at first it counts in full: how much is usual is not known yet
        first.update(size * z, slopes, step, torch.tensor(True))
    torch.testing.assert_close(first.curvature, z.mT @ z * (1 + 1e6) / 2, rtol=1e-12, atol=0)


def test_curvature_that_was_zero_may_come() -> None:
    z, slopes = torch.randn(30, 2, dtype=F64), torch.ones(2, dtype=F64)
    coarse = CoarseCurvature(chain(2), "full", 0.9, 1.0, F64)
    for step in range(1, 9):
        coarse.update(0 * z, slopes, step, torch.tensor(True))
    coarse.update(z, slopes, 9, torch.tensor(True))
    torch.testing.assert_close(coarse.curvature, z.mT @ z / 9, rtol=1e-12, atol=0)
