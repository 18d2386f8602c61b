"""Which layers a closure went through, how they are connected, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hessopt.errors import ModelError
from hessopt.linear_tape import LinearRecorder
from tests.hessopt.reference import Dag, batch, branches, chain, record, skip


def mse(z: Tensor) -> Tensor:
    return z.square().mean()


@pytest.mark.parametrize("merge", ["cat", "add"])
@pytest.mark.parametrize("make", [chain, skip, branches])
def test_layers_and_distances(make: Callable[..., Dag], merge: str) -> None:
    net = make(merge=merge)
    tape, _, _ = record(net, batch()[0], mse)
    assert [layer.name for layer in tape.layers] == [f"layers.{v}" for v in range(len(net.layers))]
    assert all(
        layer.weight is linear.weight and layer.bias is linear.bias
        for layer, linear in zip(tape.layers, net.layers, strict=True)
    )
    edges = {(u, v) for v, above in enumerate(net.parents) for u in above} | {(v, len(net.layers)) for v in net.outputs}
    assert set(tape.edges) == edges
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


def test_recording_changes_nothing() -> None:
    net, x = chain(in_place=True), batch()[0]
    before = net(x)
    recorder = LinearRecorder(net, net.parameters())
    with recorder.recording():
        during = net(x)
    assert torch.equal(before, during)
    assert not any(module._forward_hooks for module in net.modules())


def test_in_place_activation_does_not_move_the_recorded_tensor() -> None:
    net, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 1)).double(), batch()[0]
    tape, _, _ = record(net, x, mse)
    assert torch.equal(tape.layers[0].pre_activation, net[0](x))
    assert torch.equal(tape.layers[1].input, net[0](x).relu())
    assert tape.edges == ((0, 1), (1, 2))


def test_hooks_of_the_user_are_not_taken_for_the_layer() -> None:
    net, x = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double(), batch()[0]
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    tape, _, _ = record(net, x, mse)
    assert torch.equal(tape.layers[0].pre_activation, nn.functional.linear(x, net[0].weight, net[0].bias))
    assert torch.equal(tape.layers[1].input, net[0](x))


def test_frozen_parts() -> None:
    net, x = chain(), batch()[0]
    net.layers[0].weight.requires_grad_(False)
    net.layers[1].bias.requires_grad_(False)
    net.layers[2].requires_grad_(False)
    tape, _, _ = record(net, x, mse)
    assert [layer.name for layer in tape.layers] == ["layers.0", "layers.1", "layers.3"]
    assert tape.layers[0].parameters == (net.layers[0].bias,)
    assert tape.layers[1].parameters == (net.layers[1].weight,)
    assert tape.edges == ((0, 1), (1, 2), (2, 3))  # through the frozen layer


def test_parameters_of_another_optimizer_are_constants() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)).double()
    x = batch()[0]
    recorder = LinearRecorder(net, [*net[0].parameters(), net[2].weight])
    with recorder.recording():
        z = net(x)
    tape = recorder.tape(mse(z), z)
    assert [len(layer.parameters) for layer in tape.layers] == [2, 1]


def test_keyword_input() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    net, x = Keyword(), batch()[0]
    tape, _, _ = record(net, x, mse)
    assert tape.layers[0].input is x


def test_layer_that_reaches_nothing() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            self.head(x)
            return self.fc(x)

    tape, _, _ = record(Unused(), batch()[0], mse)
    assert tape.distances().tolist() == [[0, float("inf")], [float("inf"), 0]]


class Bad(nn.Module):
    """Two layers, used in a way that is refused."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        if how == "norm":
            self.norm = nn.LayerNorm(2).double()
        if how == "shared":
            self.second.weight = self.first.weight
        if how == "own parameter":
            self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
        if how == "parametrized":
            nn.utils.parametrizations.weight_norm(self.first)
        if how == "patched":
            self.first.forward = lambda x: x @ self.first.weight.T * 2 + self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        h = self.first(x)
        if how == "twice":
            h = self.first(h)
        if how == "three dimensions":
            return self.second(h.unsqueeze(1)).squeeze(1)
        if how == "one dimension":
            return torch.stack([self.second(row) for row in h[:1]])
        if how == "not called":
            return h
        if how == "no grad":
            with torch.no_grad():
                return self.second(h) + h
        if how == "functional":
            return self.second(h) + nn.functional.linear(h, self.first.weight)
        if how == "weight as input":
            return self.second(self.first.weight)[:1] + h
        if how == "rows":
            return self.second(torch.cat([h, h]))[: len(h)]
        if how == "detached":
            return self.second(h).detach()
        if how == "no batch":
            return self.second(h).sum(dim=0)
        return self.second(h)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("norm", "parameter 'norm.weight' belongs to a LayerNorm.*requires_grad_.*AdamW"),
        ("own parameter", "parameter 'scale' belongs to a Bad"),
        ("shared", "parameter 'first.weight' is shared by the layers 'first' and 'second'"),
        ("parametrized", "parameter 'first.parametrizations.weight.original0' belongs to a"),
        ("patched", "parameter 'first.weight' belongs to a Linear, not to a plain"),
        ("twice", "layer 'first' was called 2 times"),
        ("not called", "layer 'second' was called 0 times"),
        ("three dimensions", r"layer 'second' was called on a tensor of shape \(6, 1, 2\).*Flatten"),
        ("one dimension", r"layer 'second' was called on a tensor of shape \(2,\)"),
        ("no grad", "layer 'second' ran with gradients disabled"),
        ("functional", "parameter 'first.weight' reaches the loss otherwise than by calling its layer"),
        ("weight as input", "layer 'second' was called on 2 rows and layer 'first' on 6"),
        ("rows", "layer 'second' was called on 12 rows and layer 'first' on 6"),
        ("no batch", r"output .* has shape \(2,\), but the layers were called on 6 samples.*\(loss, output\)"),
    ],
)
def test_refused_networks(how: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        record(Bad(how), batch()[0], mse)


def test_weight_as_input_of_a_layer() -> None:
    with pytest.raises(ModelError, match=r"parameter 'first.weight' reaches the loss otherwise than by calling"):
        record(Bad("weight as input"), batch(2)[0], mse)


def tape_of(loss_fn: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]) -> Any:
    net, x = Bad("nothing"), batch()[0]
    recorder = LinearRecorder(net, net.parameters())
    with recorder.recording():
        loss, z = loss_fn(net, x)
    return recorder.tape(loss, z)


def test_penalty_inside_the_loss() -> None:
    def penalized(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        z = net(x)
        return mse(z) + net.first.weight.square().sum(), z

    with pytest.raises(
        ModelError, match=r"'first.weight' reaches the loss otherwise than through the network's output.*weight_decay"
    ):
        tape_of(penalized)


def test_derivative_with_respect_to_the_input() -> None:
    def physics(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        z = net(x)
        (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        return mse(slope), z

    with pytest.raises(ModelError, match=r"otherwise than through the network's output.*LeastSquares"):
        tape_of(physics)


def test_output_that_the_loss_does_not_depend_on() -> None:
    def wrong(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        z = net(x)
        return mse(x.clone().requires_grad_()), z

    with pytest.raises(ModelError, match="does not depend on the output"):
        tape_of(wrong)


def test_detached_output() -> None:
    def detached(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        z = net(x)
        return mse(z), z.detach()

    with pytest.raises(ModelError, match=r"output .* no autograd tape.*without `.detach\(\)`"):
        tape_of(detached)


def test_replaced_layer() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    parameters = list(net.parameters())
    net[0] = nn.Linear(2, 3)
    with pytest.raises(ModelError, match="no longer, a parameter of the network"):
        LinearRecorder(net, parameters)


def test_nothing_to_train() -> None:
    net = chain().requires_grad_(False)
    with pytest.raises(ModelError, match="none of the optimizer's parameters requires grad"):
        LinearRecorder(net, net.parameters())


def test_empty_batch() -> None:
    with pytest.raises(ModelError, match="empty batch"):
        record(chain(), batch(0)[0], lambda z: z.sum())


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_compiled_scripted_and_wrapped_networks() -> None:
    net = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ModelError, match="the network is compiled"):
        LinearRecorder(torch.compile(net), net.parameters())
    compiled = nn.Sequential(nn.Linear(2, 1))
    compiled[0].compile()
    with pytest.raises(ModelError, match="module '0' is compiled"):
        LinearRecorder(compiled, compiled.parameters())
    with pytest.raises(ModelError, match="the network is scripted"):
        LinearRecorder(torch.jit.script(net), net.parameters())
    with pytest.raises(ModelError, match="wrapped in DataParallel"):
        LinearRecorder(nn.DataParallel(net), net.parameters())
