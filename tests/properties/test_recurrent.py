"""Recurrent networks unrolled in time: T calls of a cell are T nodes that share its parameters (Thm 87)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import diagnostics
from tests.helpers.oracle import check_against_double_backprop

STEPS = 4


class Unrolled(nn.Module):
    """A cell called once a step on ``(B, T, d)``; the head reads its last state."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = cell(3, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def _loss(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, STEPS, 3, dtype=torch.float64)


def _names(tensor: str = "") -> list[str]:
    return [f"cell{f'@{t}' if t else ''}{tensor}" for t in range(STEPS)]


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell])
def test_a_cell_called_t_times_is_a_chain_of_t_nodes(cell: type[nn.RNNCellBase], x: Tensor) -> None:
    graph = check_against_double_backprop(Unrolled(cell).double(), x, _loss)
    names = _names()
    assert [node.name for node in graph.nodes] == [*names, "head"]
    assert [graph[name].parents for name in names] == [(), *((name,) for name in names[:-1])]
    assert {graph[name].parameters for name in names} == {graph["cell"].parameters}
    assert graph["cell"].parameters == tuple(f"cell.{p}" for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    assert [graph.distance("cell", name) for name in names] == list(range(STEPS))  # distance is time
    assert not graph.coupled


def test_an_lstm_cell_called_t_times_is_t_pairs_of_nodes(x: Tensor) -> None:
    graph = check_against_double_backprop(Unrolled(nn.LSTMCell).double(), x, _loss)
    hidden, memory = _names("[0]"), _names("[1]")
    assert [n.name for n in graph.nodes] == [*(n for pair in zip(hidden, memory, strict=True) for n in pair), "head"]
    for t in range(1, STEPS):
        assert graph[hidden[t]].parents == graph[memory[t]].parents == (hidden[t - 1], memory[t - 1])
    assert graph["head"].parents == (hidden[-1],)
    assert graph.distance(hidden[0], hidden[-1]) == STEPS - 1
    assert graph.distance(hidden[0], memory[0]) == 2  # siblings: both are read by the next step
    assert not diagnostics.hessian_blocks(graph).total[memory[-1], "head"].any()  # the last memory is not read


def test_blocks_of_an_unrolled_cell_equal_those_of_the_fused_layer(x: Tensor) -> None:
    class Fused(nn.Module):
        def __init__(self, unrolled: Unrolled) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(3, 2, batch_first=True), unrolled.head
            for name, parameter in unrolled.cell.named_parameters():
                setattr(self.rnn, f"{name}_l0", parameter)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    unrolled = Unrolled(nn.RNNCell).double()
    fused = Fused(unrolled)
    last = diagnostics.hessian_blocks(diagnostics.capture(unrolled, x, _loss)).total[_names()[-1], _names()[-1]]
    whole = diagnostics.hessian_blocks(diagnostics.capture(fused, x, _loss)).total["rnn[0]", "rnn[0]"]
    assert torch.allclose(whole.unflatten(1, (STEPS, 2)).unflatten(3, (STEPS, 2))[:, -1, :, -1], last, atol=1e-15)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_layers_with_time_first_are_exact_in_the_joint_form(layer: type[nn.RNNBase], batch_first: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.rnn, self.head = nn.Linear(3, 2), layer(2, 2, batch_first=batch_first), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(torch.tanh(self.enter(x)))[0])

    torch.manual_seed(0)
    graph = check_against_double_backprop(
        Net().double(), torch.randn(3, 2, 3, dtype=torch.float64), _loss, ["enter", "head"]
    )
    assert graph.coupled is not batch_first


def test_packed_sequences_keep_their_type_and_are_exact() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.rnn, self.head = nn.Linear(3, 2), nn.GRU(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(torch.tanh(self.enter(x)), [3, 1], batch_first=True)
            return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])

    torch.manual_seed(0)
    graph = check_against_double_backprop(
        Net().double(), torch.randn(2, 3, 3, dtype=torch.float64), _loss, ["enter", "rnn", "head"]
    )
    assert graph["head"].parents == ("rnn[0]",)
