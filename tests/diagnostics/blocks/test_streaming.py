"""Batch means by parts of the batch equal those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.blocks import streaming
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.memory_plan import planned_bytes
from diagnostics.blocks.streaming import mean_blocks
from tests.helpers.networks import Chain, Normalised, ResidualCat
from tests.helpers.oracle import relative_error


def _labels(batch: int) -> Tensor:
    return torch.arange(batch) % 3


def _limit(
    model: nn.Module, inputs: Any, loss: Callable[..., Tensor], samples: int, nodes: Any = None, **options: Any
) -> int:
    """What ``samples`` samples at a time take."""
    graph = diagnostics.capture(model, inputs, loss, nodes)
    return planned_bytes(graph, Layout.of(graph), averaged=True, samples=samples, **options)


@pytest.mark.parametrize("samples", [1, 3, 7, 10])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", [ResidualCat, Normalised, lambda: Chain(5, 4, 3)])
def test_parts_add_up_to_the_whole(model, reduction: str, samples: int, device, monkeypatch) -> None:
    torch.manual_seed(0)
    net = model().double().to(device)
    x = torch.randn(10, 5, dtype=torch.float64, device=device)
    labels = _labels(10).to(device)  # the loss needs the outputs of all samples, in their order

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, labels, reduction=reduction)

    whole = diagnostics.hessian_blocks(diagnostics.capture(net, x, loss, reduction=reduction), by_source=True).mean()
    sizes = []
    real = streaming.hessian_blocks

    def counted(graph, *args, **kwargs):
        sizes.append(graph.batch_size)
        return real(graph, *args, **kwargs)

    monkeypatch.setattr(streaming, "hessian_blocks", counted)
    limit = _limit(net, x, loss, samples, by_source=True)
    means = mean_blocks(net, x, loss, reduction=reduction, by_source=True, memory_limit=limit)
    assert max(sizes) <= samples
    assert sum(sizes) == 10
    for part in ("total", "gn", "tensor"):
        assert relative_error(getattr(means, part).assemble(), getattr(whole, part).assemble()) < 1e-12
    assert set(means.tensor_by_source) == set(whole.tensor_by_source)
    for name, share in means.tensor_by_source.items():
        difference = share.assemble() - whole.tensor_by_source[name].assemble()
        assert difference.norm() <= 1e-12 * whole.tensor.assemble().norm()
    table, expected = diagnostics.metrics(means), diagnostics.metrics(whole)
    assert table.nodes == expected.nodes
    assert torch.allclose(table.resonance, expected.resonance, rtol=1e-10)
    assert torch.equal(table.distance, expected.distance)


def test_tuples_and_pairs_are_parted_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 4), nn.Linear(2, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.a(x)) * torch.tanh(self.b(y)) * scale
            return self.head(h), h.sum(-1)

    def loss(z: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(z[0], _labels(8)) + (z[1].sin() * torch.arange(8.0)).mean()

    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    inputs = (x, torch.tensor(1.5, dtype=torch.float64), y)
    graph = diagnostics.capture(model, inputs, loss)
    whole = diagnostics.hessian_blocks(graph, pairs=[("a", "b")]).mean()
    pairs = (pair for pair in [("a", "b")])
    means = mean_blocks(model, inputs, loss, pairs=pairs, memory_limit=_limit(model, inputs, loss, 1))
    assert means.nodes == whole.nodes == ("a", "b")
    assert relative_error(means.total.assemble(), whole.total.assemble()) < 1e-12
    with pytest.raises(AttributeError, match="by_source=True"):
        means.tensor_by_source["a"]


def test_what_does_not_fit_sample_by_sample_is_refused_with_the_figure() -> None:
    model, x = Chain(5, 64, 64, 3), torch.randn(16, 5)
    with pytest.raises(diagnostics.MemoryBudgetError, match=r"take \d+\.\d GiB.*One sample at a time"):
        mean_blocks(model, x, lambda z: F.cross_entropy(z, _labels(16)), memory_limit=1000)


def test_coupled_samples_are_not_parted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, _labels(6))

    whole = diagnostics.hessian_blocks(diagnostics.capture(model, x, loss, ["0"])).mean()
    needed = _limit(model, x, loss, 1, ["0"])  # one joint sample
    means = mean_blocks(model, x, loss, ["0"], memory_limit=needed)
    assert torch.equal(means.total.assemble(), whole.total.assemble())
    with pytest.raises(diagnostics.MemoryBudgetError, match=r"The samples are coupled, so the batch is one joint"):
        mean_blocks(model, x, loss, ["0"], memory_limit=needed - 1)
    # before the first node batch-norm couples no blocks, but the parts would have other statistics
    assert not diagnostics.capture(model, x, loss, ["2"]).coupled
    with pytest.raises(diagnostics.DiagnosticsError, match="another output for samples 0 to 1 alone"):
        mean_blocks(model, x, loss, ["2"], memory_limit=_limit(model, x, loss, 2, ["2"]))


def test_a_loss_over_pairs_of_samples_is_not_parted() -> None:
    torch.manual_seed(0)
    model, x = Chain(5, 4, 3).double(), torch.randn(6, 5, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return torch.logsumexp(z @ z.mT, dim=(0, 1))

    whole = diagnostics.hessian_blocks(diagnostics.capture(model, x, loss)).mean()
    needed = _limit(model, x, loss, 1)
    assert torch.equal(mean_blocks(model, x, loss, memory_limit=needed).gn.assemble(), whole.gn.assemble())
    with pytest.raises(diagnostics.MemoryBudgetError, match="coupled"):
        mean_blocks(model, x, loss, memory_limit=needed - 1)


def test_dropout_is_refused_where_the_batch_must_be_parted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, _labels(6))

    limit = _limit(model, x, loss, 2)
    with pytest.raises(diagnostics.DiagnosticsError, match=r"another output for samples 2 to 3 alone.*model.eval\(\)"):
        mean_blocks(model, x, loss, memory_limit=limit)
    model.eval()
    whole = diagnostics.hessian_blocks(diagnostics.capture(model, x, loss)).mean()
    assert (
        relative_error(mean_blocks(model, x, loss, memory_limit=limit).total.assemble(), whole.total.assemble()) < 1e-12
    )


def test_a_network_that_depends_on_the_batch_size_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.head(h + 0 * self.b(h) if len(x) < 6 else h)

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(6, 5, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, _labels(6))

    with pytest.raises(diagnostics.DiagnosticsError, match="other nodes for samples 0 to 2"):
        mean_blocks(model, x, loss, memory_limit=_limit(model, x, loss, 3))


def test_the_model_and_the_random_state_are_left_as_found() -> None:
    torch.manual_seed(0)
    model, x = Chain(5, 4, 3), torch.randn(6, 5)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, _labels(6))

    state = torch.get_rng_state()
    means = mean_blocks(model, x, loss, memory_limit=_limit(model, x, loss, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert means.total["0", "1"].dtype == torch.float32


@dataclass
class _Result:
    logits: Tensor


class _ReturnsDataclass(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> _Result:
        return _Result(self.model(x))


def test_outputs_in_a_dataclass_are_parted_too() -> None:
    torch.manual_seed(0)
    model, x = _ReturnsDataclass(Chain(5, 4, 4, 3)).double(), torch.randn(10, 5, dtype=torch.float64)

    def loss(z: _Result) -> Tensor:
        return (torch.sin(z.logits) * z.logits).sum() / len(z.logits)

    graph = diagnostics.capture(model, x, loss)
    whole = diagnostics.hessian_blocks(graph).mean().total
    limit = planned_bytes(graph, Layout.of(graph), averaged=True, samples=3)
    parted = diagnostics.mean_blocks(model, x, loss, memory_limit=limit).total
    for pair, block in whole.items():
        assert (parted[pair] - block).norm() <= 1e-12 * block.norm()
