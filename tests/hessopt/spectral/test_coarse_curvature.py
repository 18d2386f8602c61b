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
from hessopt.spectral.coarse_curvature import ALIKE, FLAT, CoarseCurvature, changes_along

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
    coarse = CoarseCurvature(chain(len(slopes)), "full", 0.9, F64)
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
        coarse = CoarseCurvature(chain(3), bandwidth, 0.9, F64)
        coarse.update(z, torch.ones(3, dtype=F64), torch.tensor(True))
        kept = (z.T @ z) * (chain(3) <= bandwidth)
        torch.testing.assert_close(coarse.lengths, torch.ones(3, dtype=F64) * 3 / kept.sum(), rtol=1e-12, atol=0)
        assert float(coarse.radius) == bandwidth


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_an_automatic_band_ends_where_a_twentieth_of_the_curvature_is_left(radius: int) -> None:
    """Not connected is furthest of all, and a coupling that is noise does not count."""
    distances = chain(5)
    distances[4, :4] = distances[:4, 4] = torch.inf
    curvature = torch.where(distances <= radius, 1.0, 1e-3).to(F64)
    coarse, fixed = (CoarseCurvature(distances, bandwidth, 0.9, F64) for bandwidth in ("auto", radius))
    for c in (coarse, fixed):
        c.curvature.copy_(curvature)
        c.slopes.fill_(1.0)
    assert torch.equal(coarse.minimised(10**12), fixed.minimised(10**12))
    assert float(coarse.radius) == radius
    coarse.curvature.copy_(torch.where(distances == 0, 1.0, 0.1).to(F64))
    coarse.minimised(10)
    assert float(coarse.radius) == 0


def test_unsound_batches_change_nothing() -> None:
    coarse = CoarseCurvature(chain(2), "auto", 0.9, F64)
    coarse.update(torch.ones(3, 2, dtype=F64), torch.ones(2, dtype=F64), torch.tensor(True))
    before = [t.clone() for t in coarse.tensors]
    coarse.update(torch.full((3, 2), torch.nan, dtype=F64), torch.ones(2, dtype=F64), torch.tensor(True))
    coarse.update(torch.ones(3, 2, dtype=F64), torch.ones(2, dtype=F64), torch.tensor(False))
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
        assert lengths.tolist() == pytest.approx([FLAT] * 3)
    assert not of(torch.zeros(3, 3, dtype=F64), -torch.ones(3, dtype=F64)).lengths.any()
