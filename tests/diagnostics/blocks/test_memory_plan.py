"""The plan against what is then held."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.memory_plan import planned_bytes
from tests.helpers.networks import Chain, Diamond


def _loss(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % 3)


def _held() -> dict[int, int]:
    """Bytes of all storages that tensors are alive on, by address."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.layout == torch.strided]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


class _Residual(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
        self.blocks = nn.ModuleList(nn.ModuleDict({"f": b, "out": nn.Identity()}) for b in blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block["out"](x + block["f"](x))
        return self.head(x)


CASES = {
    "chain": (lambda: Chain(5, *[40] * 6, 3), None),
    "wide": (lambda: Chain(5, *[90] * 4, 3), None),
    "relu": (lambda: Chain(5, *[40] * 14, 3, activation=nn.ReLU), None),
    "residual": (lambda: _Residual(40, 5), ["stem", "blocks.*.f", "blocks.*.out"]),
}


@pytest.mark.parametrize("by_source", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_samples_take_what_was_planned(case: str, by_source: bool) -> None:
    build, nodes = CASES[case]
    torch.manual_seed(0)
    graph = diagnostics.capture(build(), torch.randn(32, 5), _loss, nodes)
    planned = planned_bytes(graph, Layout.of(graph), by_source=by_source)
    before = _held()
    blocks = diagnostics.hessian_blocks(graph, by_source=by_source, memory_limit=planned)
    block = blocks.total[blocks.nodes[len(blocks.nodes) // 2], blocks.nodes[0]]  # now the total Jacobians are there
    held = sum(size for address, size in _held().items() if address not in before) - block.untyped_storage().nbytes()
    assert held <= planned < 1.5 * held


def test_the_plan_is_the_limit() -> None:
    graph = diagnostics.capture(Chain(5, 40, 40, 3), torch.randn(16, 5), _loss)
    planned = planned_bytes(graph, Layout.of(graph))
    diagnostics.hessian_blocks(graph, memory_limit=planned)
    with pytest.raises(diagnostics.MemoryBudgetError, match=r"mean_blocks goes through the batch in parts"):
        diagnostics.hessian_blocks(graph, memory_limit=planned - 1)


def test_plans_grow_with_samples_sources_and_nodes() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(Diamond(), torch.randn(16, 5), _loss)
    layout = Layout.of(graph)
    plans = [planned_bytes(graph, layout, averaged=True, samples=s) for s in (1, 2, 4, 16)]
    assert plans == sorted(plans)
    assert plans[-1] == planned_bytes(graph, layout, averaged=True)
    assert planned_bytes(graph, layout, by_source=True) > planned_bytes(graph, layout)
    assert planned_bytes(graph, layout) > planned_bytes(graph, Layout.of(graph, [("stem", "left")]))


def test_batch_means_of_a_deep_network_take_less_than_its_samples() -> None:
    graph = diagnostics.capture(Chain(5, *[40] * 12, 3), torch.randn(64, 5), _loss)
    layout = Layout.of(graph)
    assert 1.5 * planned_bytes(graph, layout, averaged=True) < planned_bytes(graph, layout)
