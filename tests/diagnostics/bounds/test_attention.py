"""The closed form of attention's second derivatives against double back-propagation and against the recursion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.bounds.attention import PAIRS, attention_curvature
from diagnostics.graph.local import local_derivatives
from tests.helpers.oracle import relative_error


def _expected(inputs: dict[str, Tensor], signal: Tensor, **how: object) -> dict[tuple[str, str], Tensor]:
    """∂²(δ · attention) by reverse over reverse through torch's own attention, sample by sample."""

    def weighted(values: dict[str, Tensor], delta: Tensor, mask: Tensor | None) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                values["query"][None], values["key"][None], values["value"][None], mask, scale=how.get("scale")
            )
        return (delta * out).sum()

    blocks: dict[tuple[str, str], list[Tensor]] = {pair: [] for pair in PAIRS}
    for b in range(len(signal)):
        values = {name: tensor[b] for name, tensor in inputs.items()}
        mask = how.get("mask")
        hessian = torch.func.jacrev(torch.func.grad(weighted))(values, signal[b], mask)
        for v, w in PAIRS:
            blocks[v, w].append(hessian[v][w].reshape(values[v].numel(), values[w].numel()))
    return {pair: torch.stack(block) for pair, block in blocks.items()}


@pytest.mark.parametrize("mask", ["none", "causal", "additive"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_closed_form_equals_double_backpropagation(mask: str, scale: float | None, device: torch.device) -> None:
    torch.manual_seed(0)
    inputs = {name: torch.randn(2, *shape, dtype=torch.float64, device=device)
              for name, shape in (("query", (3, 4)), ("key", (5, 4)), ("value", (5, 2)))}  # fmt: skip
    signal = torch.randn(2, 3, 2, dtype=torch.float64, device=device)
    how = {"scale": scale}
    if mask == "causal":
        how["mask"] = torch.ones(3, 5, dtype=torch.bool, device=device).tril()
    elif mask == "additive":
        how["mask"] = torch.randn(3, 5, dtype=torch.float64, device=device)
    found = attention_curvature(**inputs, signal=signal, **how)
    expected = _expected(inputs, signal, **how)
    assert set(found) == set(expected)
    for pair in PAIRS:
        assert relative_error(found[pair], expected[pair]) < 1e-12
    assert not found["value", "value"].any()
    assert found["query", "key"].norm() > 1e-3


class SingleHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(2, 3)
        self.attend = Attend()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(self.attend(self.q(x), self.k(x), self.v(x)))).mean(1)


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def test_the_recursion_finds_the_closed_form_as_the_share_of_the_attention_node() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    graph = diagnostics.capture(
        SingleHead().double(), x, lambda z: (z.sin() * z).mean(), ["q", "k", "v", "attend", "head"]
    )
    blocks = diagnostics.hessian_blocks(graph, by_source=True)
    q, k, v = (graph[name].value.detach() for name in "qkv")
    signal = local_derivatives(graph).signals["attend"].reshape(2, 4, 2)
    closed = attention_curvature(q, k, v, signal)
    share = blocks.tensor_by_source["attend"]
    for a, b in PAIRS:
        assert (share[a[0], b[0]] - closed[a, b]).norm() <= 1e-12 * closed["query", "key"].norm()
    # what is left of H^T comes from the tanh behind the head alone
    rest = blocks.tensor["q", "k"] - closed["query", "key"]
    assert relative_error(rest, blocks.tensor_by_source["output"]["q", "k"]) < 1e-9
