"""The attribution of curvature to nodes: it adds up, and is what direct linear algebra says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

import diagnostics
from diagnostics.blocks.sources import curvature_sources
from tests.helpers.networks import Diamond, ResidualCat
from tests.helpers.random_dags import Plan, build, plans


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


def _convex(z: Tensor) -> Tensor:
    return (z - 1).square().sum() / len(z)


def _blocks(model: nn.Module, loss=_wavy, device: torch.device | str = "cpu") -> diagnostics.HessianBlocks:
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    return diagnostics.hessian_blocks(diagnostics.capture(model.double().to(device), x, loss), by_source=True)


@pytest.fixture
def blocks(device: torch.device) -> diagnostics.HessianBlocks:
    torch.manual_seed(1)
    return _blocks(ResidualCat(), device=device)


def _numpy(blocks: diagnostics.BlockMatrix, names: tuple[str, ...]) -> np.ndarray:
    mean = blocks.mean()
    return np.block([[mean[v, w].cpu().numpy() for w in names] for v in names])


def test_shares_are_those_of_dense_linear_algebra(blocks: diagnostics.HessianBlocks) -> None:
    table = curvature_sources(blocks)
    names = ("stem", "block1", "block2", "merge")
    assert table.nodes == names
    assert table.sources == tuple(blocks.tensor_by_source)
    whole, tensor, gn = (_numpy(part, names) for part in (blocks.total, blocks.tensor, blocks.gn))
    values, vectors = np.linalg.eigh((whole + whole.T) / 2)
    down = vectors[:, values < -1e-12]
    assert 0 < down.shape[1] < len(values)
    for i, source in enumerate(table.sources):
        own = _numpy(blocks.tensor_by_source[source], names)
        assert table.share[i].item() == pytest.approx((own * tensor).sum() / (tensor**2).sum(), rel=1e-10, abs=1e-15)
        ratio = np.linalg.norm(own) / np.linalg.norm(tensor)
        assert table.norm_ratio[i].item() == pytest.approx(ratio, rel=1e-10)
        mass = -np.trace(down.T @ own @ down)
        assert table.negative[i].sum().item() == pytest.approx(mass, rel=1e-9, abs=1e-15)
        a, b = slice(0, 4), slice(8, 12)
        assert table.norms[i, 0, 2].item() == pytest.approx(np.linalg.norm(own[a, b]), rel=1e-10)
        assert table.products[i, 2, 0].item() == pytest.approx((own[a, b] * tensor[a, b]).sum(), rel=1e-9, abs=1e-16)
    assert table.negative_mass == pytest.approx(-values[values < 0].sum(), rel=1e-12)
    assert table.gn_negative.sum().item() == pytest.approx(-np.trace(down.T @ gn @ down), rel=1e-9)
    assert torch.equal(curvature_sources(blocks.mean()).share, table.share)


def _assert_adds_up(table: diagnostics.blocks.sources.SourceTable, convex: bool) -> None:
    scale = table.norms.square().sum().item()
    square = table.tensor_norm.square()
    assert (table.products.sum(0) - square).abs().max() <= 1e-12 * scale
    attributed = (table.negative.sum() + table.gn_negative.sum()).item()
    magnitude = table.negative.abs().sum().item() + table.gn_negative.abs().sum().item()
    assert abs(attributed - table.negative_mass) <= 1e-12 * magnitude
    if convex:
        assert table.gn_negative.sum() <= 1e-12 * magnitude


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_shares_add_up_on_random_dags(plan: Plan) -> None:
    model, x, names = build(plan)
    for loss, convex in ((_wavy, False), (_convex, True)):
        try:
            graph = diagnostics.capture(model, x, loss, names)
        except diagnostics.CaptureError:
            assume(False)  # the chosen nodes miss the output
        for include_output in (False, True):
            blocks = diagnostics.hessian_blocks(graph, by_source=True)
            _assert_adds_up(curvature_sources(blocks, include_output=include_output), convex)


def test_shares_of_a_table_add_up_to_one(blocks: diagnostics.HessianBlocks) -> None:
    table = curvature_sources(blocks)
    assert table.share.sum().item() == pytest.approx(1, rel=1e-12)
    assert table.negative_share.sum().item() + table.gn_negative_share == pytest.approx(1, rel=1e-12)
    assert table.norm_ratio.sum().item() > 1.01  # norms do not add up
    by_distance = table.by_distance().to_dict()
    for distance in set(by_distance["distance"]):
        here = [s for s, d in zip(by_distance["share"], by_distance["distance"], strict=True) if d == distance]
        assert np.nansum(here) == pytest.approx(1, rel=1e-12)
    assert sum(by_distance["negative_share"]) == pytest.approx(1, rel=1e-12)


def test_negative_curvature_changes_at_the_rate_of_the_share() -> None:
    torch.manual_seed(1)
    blocks = _blocks(ResidualCat())
    table = curvature_sources(blocks)
    names = table.nodes
    whole = _numpy(blocks.total, names)
    for i, source in enumerate(table.sources):
        own = _numpy(blocks.tensor_by_source[source], names)

        def mass(t: float, own: np.ndarray = own) -> float:
            return -np.linalg.eigvalsh(whole + t * own).clip(max=0).sum()

        rate = (mass(1e-6) - mass(-1e-6)) / 2e-6
        assert rate == pytest.approx(table.negative[i].sum().item(), rel=1e-5, abs=1e-9)


def test_one_bent_layer_makes_everything_and_linear_ones_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(self.b(self.a(x))))

    torch.manual_seed(1)
    table = curvature_sources(_blocks(Net()))
    shares = dict(zip(table.sources, table.share.tolist(), strict=True))
    assert shares["b"] == pytest.approx(1, rel=1e-12)
    assert sum(abs(share) for name, share in shares.items() if name != "b") < 1e-12


def test_without_a_tensor_part_shares_are_nan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    table = curvature_sources(_blocks(model, _convex))
    assert table.negative_mass == 0
    assert table.share.isnan().all()
    assert table.negative_share.isnan().all()
    assert math.isnan(table.gn_negative_share)
    assert "m- = 0" in str(table)


def test_blocks_must_be_split_by_source() -> None:
    graph = diagnostics.capture(Diamond(), torch.randn(3, 5), _wavy)
    with pytest.raises(AttributeError, match="by_source=True"):
        curvature_sources(diagnostics.hessian_blocks(graph))


def test_the_table_prints_and_converts(blocks: diagnostics.HessianBlocks) -> None:
    table = curvature_sources(blocks)
    lines = str(table).splitlines()
    assert lines[0].startswith("4 sources, curvature between 4 nodes; |H^T| = ")
    assert lines[-1].split()[:2] == ["(Gauss-Newton", "part)"]
    assert len(lines) == 3 + 4 + 1
    assert len({len(line) for line in lines[1:]}) == 1
    values = json.loads(json.dumps(table.to_dict()))
    assert values["sources"] == list(table.sources)
    assert values["share"] == table.share.tolist()
    frame = table.to_pandas()
    assert frame.set_index("source").negative_share["merge"] == table.negative_share[table.sources.index("merge")]
    assert len(frame) == 5
    assert "merge" in str(table.by_distance())
    assert len(table.by_distance().to_pandas()) == 2 * 5
