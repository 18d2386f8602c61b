"""Metrics against their definitions, in NumPy, and the conventions of the tables."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diagnostics
from tests.helpers.networks import DeadEnd, Diamond, ResidualCat


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


@pytest.fixture
def blocks(device: torch.device) -> diagnostics.HessianBlocks:
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    return diagnostics.hessian_blocks(diagnostics.capture(ResidualCat().double().to(device), x, _wavy))


def _numpy(block: Tensor) -> np.ndarray:
    return block.cpu().numpy()


def test_metrics_equal_their_definitions_on_batch_means(blocks: diagnostics.HessianBlocks) -> None:
    table = diagnostics.metrics(blocks, include_output=True)
    names = ["stem", "block1", "block2", "merge", "head"]
    assert table.nodes == tuple(names)
    total = {pair: _numpy(block.sum(0)) for pair, block in blocks.total.items()}
    gn = {pair: _numpy(block.sum(0)) for pair, block in blocks.gn.items()}
    for i, v in enumerate(names):
        for j, w in enumerate(names):
            r = np.sqrt((total[v, w] ** 2).sum())
            c = r / math.sqrt(np.linalg.norm(total[v, v]) * np.linalg.norm(total[w, w]))
            d = r**2 / np.linalg.svd(total[v, w], compute_uv=False)[0] ** 2
            gap = np.linalg.norm(total[v, w] - gn[v, w]) / (np.linalg.norm(gn[v, w]) + 1e-12)
            assert table.resonance[i, j].item() == pytest.approx(r, rel=1e-12)
            assert table.coupling[i, j].item() == pytest.approx(c, rel=1e-12)
            assert table.stable_rank[i, j].item() == pytest.approx(d, rel=1e-10)
            assert table.gn_gap[i, j].item() == pytest.approx(gap, rel=1e-9, abs=1e-9)


def test_per_sample_metrics_are_means_of_each_samples_metric(blocks: diagnostics.HessianBlocks) -> None:
    table = diagnostics.metrics(blocks, per_sample=True)
    own = _numpy(blocks.total["stem", "merge"]) * 6  # ∂²ℓ_b: the blocks of a mean loss carry 1/B
    at = [np.linalg.norm(_numpy(blocks.total[v, v]) * 6, axis=(1, 2)) for v in ("stem", "merge")]
    norms = np.linalg.norm(own, axis=(1, 2))
    top = np.linalg.svd(own, compute_uv=False)[:, 0]
    assert table.resonance[0, 3].item() == pytest.approx(norms.mean(), rel=1e-12)
    assert table.coupling[0, 3].item() == pytest.approx((norms / np.sqrt(at[0] * at[1])).mean(), rel=1e-12)
    assert table.stable_rank[0, 3].item() == pytest.approx((norms**2 / top**2).mean(), rel=1e-10)
    batch_mean = diagnostics.metrics(blocks).resonance[0, 3].item()
    assert table.resonance[0, 3].item() > batch_mean  # triangle inequality: samples cancel in the mean


def test_per_sample_metrics_are_refused_where_samples_are_gone(blocks: diagnostics.HessianBlocks) -> None:
    with pytest.raises(diagnostics.DiagnosticsError, match="batch means already"):
        diagnostics.metrics(blocks.mean(), per_sample=True)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    coupled = diagnostics.hessian_blocks(diagnostics.capture(model, torch.randn(6, 5), _wavy, ["0"]))
    with pytest.raises(diagnostics.DiagnosticsError, match="samples of this batch are coupled"):
        diagnostics.metrics(coupled, per_sample=True)


def test_tables_range_over_the_chosen_nodes() -> None:
    x = torch.randn(6, 5)
    automatic = diagnostics.hessian_blocks(diagnostics.capture(ResidualCat(), x, _wavy))
    assert diagnostics.metrics(automatic).nodes == ("stem", "block1", "block2", "merge")
    assert diagnostics.metrics(automatic, include_output=True).nodes[-1] == "head"
    chosen = diagnostics.hessian_blocks(diagnostics.capture(ResidualCat(), x, _wavy, ["stem", "head"]))
    assert diagnostics.metrics(chosen).nodes == ("stem", "head")


def test_batch_means_give_the_same_table(blocks: diagnostics.HessianBlocks) -> None:
    assert torch.equal(diagnostics.metrics(blocks).resonance, diagnostics.metrics(blocks.mean()).resonance)


def test_by_distance_averages_pairs_and_reports_the_ratio_of_sums() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(Diamond().double(), torch.randn(6, 5, dtype=torch.float64), _wavy)
    blocks = diagnostics.hessian_blocks(graph)
    table = diagnostics.metrics(blocks)
    rows = {row.distance: row for row in table.by_distance().rows}
    # stem 0, left 1, right 2, merge 3: a square, so the opposite corners are at distance 2
    assert {d: row.pairs for d, row in rows.items()} == {0.0: 4, 1.0: 4, 2.0: 2}
    corners = [(0, 3), (1, 2)]
    assert rows[2.0].resonance == pytest.approx(np.mean([table.resonance[p].item() for p in corners]))
    tensor, gn = (sum(part.mean()[v, w].norm().item() for v, w in [("stem", "merge"), ("left", "right")])
                  for part in (blocks.tensor, blocks.gn))  # fmt: skip
    assert rows[2.0].gap_ratio == pytest.approx(tensor / gn, rel=1e-10)
    assert rows[2.0].gn_gap == pytest.approx(np.mean([table.gn_gap[p].item() for p in corners]))
    pairs = [(v, w) for i, v in enumerate(table.nodes) for w in table.nodes[i:]]
    norms = [sum(part.mean()[pair].norm().item() for pair in pairs) for part in (blocks.tensor, blocks.gn)]
    assert table.gap_ratio == pytest.approx(norms[0] / norms[1], rel=1e-10)


def test_nodes_without_curvature_have_nan_coupling_and_rank_and_zero_gap() -> None:
    torch.manual_seed(0)
    table = diagnostics.metrics(diagnostics.hessian_blocks(diagnostics.capture(DeadEnd(), torch.randn(6, 5), _wavy)))
    i = table.nodes.index("unused")
    j = table.nodes.index("used")
    for other in (i, j):
        assert table.resonance[i, other] == 0
        assert table.coupling[i, other].isnan()
        assert table.stable_rank[i, other].isnan()
        assert table.gn_gap[i, other] == 0
    assert table.by_distance().rows[0].coupling == pytest.approx(1)  # NaN is left out of the mean


def test_coupling_is_invariant_under_rescaling_of_nodes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    before = diagnostics.metrics(diagnostics.hessian_blocks(diagnostics.capture(model, x, _wavy)))
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[0].bias.mul_(3)
        model[2].weight.div_(3)
    after = diagnostics.metrics(diagnostics.hessian_blocks(diagnostics.capture(model, x, _wavy)))
    assert torch.allclose(after.coupling, before.coupling, rtol=1e-10)
    assert after.resonance[0, 0].item() == pytest.approx(before.resonance[0, 0].item() / 9, rel=1e-10)


def test_the_table_prints_and_converts(blocks: diagnostics.HessianBlocks) -> None:
    table = diagnostics.metrics(blocks)
    text = str(table)
    assert text.splitlines()[0].startswith("4 nodes, 10 pairs; sum of |H^T| / sum of |H^GN| = ")
    assert text.splitlines()[1].split() == ["v", "w", "distance", "R", "C", "D", "Gap"]
    assert len(text.splitlines()) == 3 + 10
    assert len({len(line) for line in text.splitlines()[1:]}) == 1  # columns are aligned
    assert "Gap (ratio of sums)" in str(table.by_distance())
    values = json.loads(json.dumps(table.to_dict()))
    assert values["nodes"] == ["stem", "block1", "block2", "merge"]
    assert values["resonance"] == table.resonance.tolist()
    frame = table.to_pandas()
    assert list(frame.columns[:3]) == ["v", "w", "resonance"]
    assert len(frame) == 10
    row = frame[(frame.v == "stem") & (frame.w == "merge")].iloc[0]
    assert row.coupling == table.coupling[0, 3].item()
    assert list(table.by_distance().to_pandas().distance) == [0.0, 1.0]


def test_a_long_table_prints_by_distance() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(12)], nn.Linear(3, 2))
    table = diagnostics.metrics(diagnostics.hessian_blocks(diagnostics.capture(deep, torch.randn(4, 3), _wavy)))
    lines = str(table).splitlines()
    assert "78 pairs" in lines[0]
    assert "by distance" in lines[1]
    assert len(lines) == 2 + 2 + 12
