"""The layers of a network, how a run of the closure connects them, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hessopt.errors import ModelError
from hessopt.network.layers import layers_of
from tests.helpers.kronecker_reference import Dag, batch, branches, chain, record, skip


def mse(z: Tensor) -> Tensor:
    return z.square().mean()


@pytest.mark.parametrize("merge", ["cat", "add"])
@pytest.mark.parametrize("make", [chain, skip, branches])
def test_layers_and_distances(make: Callable[..., Dag], merge: str) -> None:
    net = make(merge=merge)
    tape, _, _ = record(net, batch()[0], mse)
    assert [layer.name for layer in tape.layers] == [f"layers.{v}" for v in range(len(net.layers))]
    for layer, linear in zip(tape.layers, net.layers, strict=True):
        assert all(p is q for p, q in zip(layer.parameters, linear.parameters(), strict=True))
    edges = {(u, v) for v, above in enumerate(net.parents) for u in above} | {(v, len(net.layers)) for v in net.outputs}
    assert set(tape.structure.edges) == edges
    assert torch.equal(torch.from_numpy(tape.distances()), net.distances().double())


@st.composite
def dags(draw: st.DrawFn) -> Dag:
    count = draw(st.integers(1, 6))
    parents = [sorted(draw(st.sets(st.integers(0, v - 1)))) if v else [] for v in range(count)]
    outputs = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))
    return Dag(parents, [2] * count, outputs, merge=draw(st.sampled_from(["cat", "add"])))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(dags())
def test_distances_of_random_networks(net: Dag) -> None:
    tape, _, _ = record(net, batch(3)[0], mse)
    assert torch.equal(torch.from_numpy(tape.distances()), net.distances().double())


def test_frozen_parts() -> None:
    net, x = chain(), batch()[0]
    net.layers[0].weight.requires_grad_(False)
    net.layers[1].bias.requires_grad_(False)
    net.layers[2].requires_grad_(False)
    tape, _, _ = record(net, x, mse)
    assert [layer.name for layer in tape.layers] == ["layers.0", "layers.1", "layers.3"]
    assert tape.layers[0].parameters == (net.layers[0].bias,)
    assert tape.layers[1].parameters == (net.layers[1].weight,)
    assert tape.structure.edges == ((0, 1), (1, 2), (2, 3))  # through the frozen layer


class Bad(nn.Module):
    """Layers that are used in unusual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        if how == "tied":
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "unused":
            self.second(x)
            return h
        if self.how == "twice":
            h = self.first(torch.tanh(h))
        if self.how == "hidden":
            h = torch.func.vmap(lambda row: self.second(row))(h)
            return h
        if self.how == "detached":
            return self.second(h).detach()
        return self.second(h)


def test_layers_that_reach_nothing_come_unconnected() -> None:
    tape, _, _ = record(Bad("unused"), batch()[0], mse)
    assert tape.distances().tolist() == [[0, float("inf")], [float("inf"), 0]]


def test_layers_called_twice_and_tied_ones() -> None:
    tape, _, _ = record(Bad("twice"), batch()[0], mse)
    assert tape.structure.edges == ((0, 1), (1, 2))
    tape, _, _ = record(Bad("tied"), batch()[0], mse)
    assert [(layer.name, len(layer.parameters)) for layer in tape.layers] == [("first", 2), ("second", 1)]
    assert tape.distances()[0, 1] == 1


def test_layers_that_are_not_seen_are_next_to_the_output() -> None:
    tape, _, _ = record(Bad("hidden"), batch()[0], mse)
    assert tape.distances()[0, 1] == 2
    assert tape.structure.edges == ((0, 2), (1, 2))


def test_replaced_layer() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    parameters = list(net.parameters())
    net[0] = nn.Linear(2, 3)
    with pytest.raises(ModelError, match="no longer, a parameter of the network"):
        layers_of("BandedNewton", net, parameters)


def test_nothing_to_train() -> None:
    net = chain().requires_grad_(False)
    with pytest.raises(ModelError, match="none of the optimizer's parameters requires grad"):
        layers_of("BandedNewton", net, net.parameters())


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_compiled_scripted_and_wrapped_networks() -> None:
    net = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ModelError, match="the network is compiled"):
        layers_of("BandedNewton", torch.compile(net), net.parameters())
    compiled = nn.Sequential(nn.Linear(2, 1))
    compiled[0].compile()
    with pytest.raises(ModelError, match="module '0' is compiled"):
        layers_of("BandedNewton", compiled, compiled.parameters())
    with pytest.raises(ModelError, match="the network is scripted"):
        layers_of("BandedNewton", torch.jit.script(net), net.parameters())
    with pytest.raises(ModelError, match="spread by DataParallel"):
        layers_of("BandedNewton", nn.DataParallel(net), net.parameters())
