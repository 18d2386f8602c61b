"""Detection of samples that influence each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import diagnostics


class _Mixes(nn.Module):
    """Lets one sample read another: ``reader`` reads ``source``, all others only themselves."""

    def __init__(self, reader: int, source: int) -> None:
        super().__init__()
        self.reader, self.source = reader, source
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        moved = torch.zeros_like(h)
        moved[self.reader] = h[self.source]
        return self.b(h + 1e-3 * moved)


@pytest.mark.parametrize("batch", [2, 3, 5, 8])
def test_every_single_coupled_pair_is_found(batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 3)
    for reader in range(batch):
        for source in range(batch):
            graph = diagnostics.capture(_Mixes(reader, source), x, lambda z: z.square().mean())
            assert graph.coupled == (reader != source)


@pytest.mark.parametrize(
    ("layer", "coupled"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.BatchNorm1d(4).eval(), False),
        (nn.LayerNorm(4), False),
        (nn.Softmax(dim=0), True),
        (nn.Softmax(dim=1), False),
        (nn.GELU(), False),
    ],
)
def test_layers_that_mix_samples_are_told_from_those_that_do_not(layer: nn.Module, coupled: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(layer, nn.Linear(4, 2)))
    graph = diagnostics.capture(model, torch.randn(6, 3), lambda z: z.square().mean(), ["0"])
    assert graph.coupled is coupled


def test_a_loss_linear_in_a_batch_statistic_is_not_coupled() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    assert not diagnostics.capture(model, x, lambda z: z.mean()).coupled
    assert diagnostics.capture(model, x, lambda z: z.mean().square()).coupled
    assert not diagnostics.capture(model, x[:1], lambda z: z.mean().square()).coupled


def test_nodes_without_features_are_tested_too() -> None:
    x = torch.randn(6, 3)
    for mix, coupled in ((nn.Identity(), False), (nn.Softmax(dim=0), True)):
        model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0), mix, nn.Tanh())
        graph = diagnostics.capture(model, x, lambda z: z.square().mean(), ["1", "2"])
        assert graph["1"].shape == (6,)
        assert graph.coupled is coupled
        assert diagnostics.hessian_blocks(graph).total["1", "1"].shape == ((1, 6, 6) if coupled else (6, 1, 1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_states_of_recurrent_layers_are_not_taken_for_samples(kind: type[nn.RNNBase], batch_first: bool) -> None:
    """As many samples as layers times directions, and as many as time steps."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(2, 3), nn.Linear(4, 2)
            self.rnn = kind(3, 2, num_layers=2, bidirectional=True, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.enter(x))
            h = self.rnn(h)[0] if batch_first else self.rnn(h.transpose(0, 1))[0].transpose(0, 1)
            return self.head(h)

    torch.manual_seed(0)
    graph = diagnostics.capture(Tagger(), torch.randn(4, 4, 2), lambda z: z.square().mean())
    assert [node.name for node in graph] == ["enter", *(["rnn[0]"] if batch_first else []), "head"]
    assert not graph.coupled
