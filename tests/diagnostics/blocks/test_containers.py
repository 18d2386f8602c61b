"""How blocks are addressed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diagnostics
from tests.helpers.networks import ResidualCat


@pytest.fixture
def blocks() -> diagnostics.HessianBlocks:
    torch.manual_seed(0)
    return diagnostics.hessian_blocks(diagnostics.capture(ResidualCat(), torch.randn(6, 5), _loss))


def _loss(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


def test_every_ordered_pair_has_a_block(blocks: diagnostics.HessianBlocks) -> None:
    assert len(blocks.total) == len(list(blocks.total)) == 25
    sizes = {"stem": 4, "block1": 4, "block2": 4, "merge": 5, "head": 3}
    for (v, w), block in blocks.total.items():
        assert block.shape == (6, sizes[v], sizes[w])
        assert torch.equal(block, blocks.gn[v, w] + blocks.tensor[v, w])
        assert blocks.mean().total[v, w].shape == (sizes[v], sizes[w])


def test_assemble_puts_nodes_in_topological_order(blocks: diagnostics.HessianBlocks) -> None:
    whole = blocks.total.assemble()
    assert whole.shape == (6, 20, 20)
    assert torch.equal(whole[:, 8:12, 12:17], blocks.total["block2", "merge"])
    assert blocks.mean().gn.assemble().shape == (20, 20)


def test_wrong_addresses_say_what_there_is(blocks: diagnostics.HessianBlocks) -> None:
    with pytest.raises(KeyError, match="no blocks for node 'fc'; there are blocks for 'stem', 'block1'"):
        blocks.total["stem", "fc"]
    with pytest.raises(KeyError, match="addressed by two node names"):
        blocks.total["stem"]
    assert ("stem", "fc") not in blocks.total


def test_sources_exist_only_when_asked_for(blocks: diagnostics.HessianBlocks) -> None:
    with pytest.raises(AttributeError, match="by_source=True"):
        blocks.tensor_by_source["stem"]


def test_the_share_of_a_source_lives_on_its_ancestors() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(ResidualCat(), torch.randn(6, 5), _loss)
    sources = diagnostics.hessian_blocks(graph, by_source=True).tensor_by_source
    assert set(sources) == {"block1", "block2", "merge", "head"}
    assert sources["block1"]["stem", "stem"].norm() > 0
    assert sources["block1"]["block1", "block1"].norm() == 0  # its nonlinearity bends its parents, not itself
    assert sources["head"].assemble().norm() == 0  # a linear map has no curvature


def test_repr_tells_nodes_sizes_and_samples(blocks: diagnostics.HessianBlocks) -> None:
    assert "5 nodes (stem: 4, block1: 4, block2: 4, merge: 5, head: 3), 6 samples" in repr(blocks)
