"""The rule that names layers and blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import diagnostics
from diagnostics.graph.layer_rule import layers
from tests.helpers.networks import Normalised


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class _ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = (
            nn.Conv2d(3, 2, 1),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.layer1 = nn.Sequential(_Block(), _Block())
        self.layer2 = nn.Sequential(_Block())
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class _Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.backbone = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def test_a_layer_of_a_flat_sequential_ends_behind_its_activation() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.PReLU(), nn.Dropout(),
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    assert layers(model) == ["4", "6", "7"]


def test_containers_are_opened_and_a_sequential_with_one_layer_is_that_layer() -> None:
    model = nn.Sequential()
    model.features = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
    model.flatten = nn.Flatten()
    model.classifier = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    assert layers(model) == ["features.1", "flatten", "classifier"]
    assert layers(Normalised()) == ["layers.0", "layers.1", "layers.2", "head"]


def test_blocks_of_a_residual_network() -> None:
    assert layers(_ResNet()) == ["conv1", "layer1.0", "layer1.1", "layer2", "fc"]


def test_a_lone_child_is_a_wrapper() -> None:
    names = ["conv1", "layer1.0", "layer1.1", "layer2", "fc"]
    assert layers(_Wrapper(_ResNet())) == [f"backbone.{name}" for name in names]
    assert layers(_Wrapper(nn.Linear(3, 2))) == ["backbone"]
    assert layers(_Wrapper(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))) == ["backbone"]
    assert layers(nn.Linear(3, 2)) == []


def test_automatic_nodes_leave_out_tensors_without_the_batch_dimension() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position, self.head = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.token(ids) + self.position(torch.arange(ids.shape[1])))

    graph = diagnostics.capture(Positions(), torch.randint(0, 9, (3, 5)), lambda z: z.square().mean())
    assert [node.name for node in graph] == ["token", "head"]
    explicit = diagnostics.capture(
        Positions(), torch.randint(0, 9, (3, 5)), lambda z: z.square().mean(), ["token", "position"]
    )
    assert [node.name for node in explicit] == ["token", "position", "output"]
    assert explicit.coupled  # a node without the batch is shared by all samples


def test_patterns_and_predicates_choose_nodes() -> None:
    x, loss = torch.randn(2, 3, 4, 4), lambda z: z.square().mean()
    by_pattern = diagnostics.capture(_ResNet().eval(), x, loss, ["layer1.?", "fc"])
    assert [node.name for node in by_pattern] == ["layer1.0", "layer1.1", "fc"]
    assert by_pattern.chosen == ("layer1.0", "layer1.1", "fc")
    predicate = diagnostics.capture(_ResNet().eval(), x, loss, lambda name, module: isinstance(module, _Block))
    assert [node.name for node in predicate] == ["layer1.0", "layer1.1", "layer2.0", "output"]
    assert [node.name for node in diagnostics.capture(_ResNet().eval(), x, loss, "fc")] == ["fc"]


class _Attention(nn.Module):
    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class _Layer(nn.Module):
    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(d), _Attention(d)
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class _Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer() for _ in range(layers))
        self.final_norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return self.final_norm(x)


class _Body(nn.Module):
    """A body as transformers have it: an embedding with most of the parameters, a stack two modules down, a pooler."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed, self.encoder, self.pooler = nn.Embedding(500, 4), _Stack(layers), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.pooler(self.encoder(self.embed(ids)).mean(1)))


class _WithHead(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.dropout, self.head = body, nn.Dropout(0.0), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(x)))


class _EncoderDecoder(nn.Module):
    """Two stacks of one class, as in T5, and tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.encoder, self.decoder = nn.Embedding(9, 4), _Stack(2), _Stack(2)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.encoder(self.shared(ids))
        return self.head(self.decoder(self.shared(ids) + h))


@pytest.mark.parametrize("layers_", [2, 5])
def test_bodies_are_opened_down_to_their_repeated_layers(layers_: int) -> None:
    stack = [f"body.encoder.layer.{i}" for i in range(layers_)]
    model = _WithHead(_Body(layers_))
    assert layers(model) == ["body.embed", *stack, "body.pooler", "head"]
    assert layers(_Wrapper(model)) == [f"backbone.{name}" for name in ["body.embed", *stack, "body.pooler", "head"]]
    graph = diagnostics.capture(model, torch.randint(0, 9, (3, 5)), lambda z: z.square().mean())
    assert [node.name for node in graph] == ["body.embed", *stack, "body.pooler", "head"]
    assert graph.note is None


def test_two_stacks_of_one_class_are_opened_both() -> None:
    assert layers(_EncoderDecoder()) == [
        "shared", "encoder.layer.0", "encoder.layer.1", "decoder.layer.0", "decoder.layer.1", "head",
    ]  # fmt: skip


def test_torchs_own_transformer_gives_its_layers() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
    model = nn.Sequential(nn.Linear(3, 4), encoder, nn.Linear(4, 2))
    assert layers(model) == ["0", "1.layers.0", "1.layers.1", "2"]


def test_stages_and_blocks_that_repeat_are_not_opened() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two, self.three = nn.Linear(3, 4), _Stack(2), _Stack(2), _Stack(2)
            self.head = nn.Linear(4, 2)

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stages, self.head = nn.Linear(3, 4), nn.Sequential(_Stack(2), _Stack(2)), nn.Linear(4, 2)

    assert layers(Stages()) == ["stem", "one", "two", "three", "head"]
    assert layers(Listed()) == ["stem", "stages.0", "stages.1", "head"]
    one_block = nn.Sequential(nn.Linear(3, 4), _Layer(), nn.Linear(4, 2))
    assert layers(one_block) == ["0", "1", "2"]  # three already: a block is one node


def test_what_hides_fewer_than_three_layers_is_opened_level_by_level() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 4)

    assert layers(_WithHead(Mlp())) == ["body.enter", "body.leave", "head"]
    assert layers(_WithHead(_Layer())) == ["body.attention", "body.mlp.1", "body.mlp.2", "head"]
    assert layers(_WithHead(nn.MultiheadAttention(4, 2))) == ["body", "head"]  # its projection is never called
    assert layers(_Wrapper(_Stack(2))) == ["backbone.layer.0", "backbone.layer.1"]  # repeated: what there is


def test_parametrizations_are_no_layers() -> None:
    model = _Wrapper(parametrizations.weight_norm(nn.Linear(3, 2)))
    assert layers(model) == ["backbone"]


def test_a_module_named_after_a_norm_that_holds_layers_is_one() -> None:
    class PreNorm(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(4), inner

    class BatchNormAct2d(nn.BatchNorm2d):
        pass

    model = nn.Sequential(
        nn.Linear(3, 4), PreNorm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4), BatchNormAct2d(4), nn.Linear(4, 4)
    )
    assert layers(model) == ["0", "2", "4", "5"]


class _Flow(nn.Module):
    """Layers that return no tensors, as a normalising flow's transforms: their networks run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(_Transform() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform()(x)
        return x.square().sum(-1)


class _Transform(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self) -> object:
        return lambda x: x * torch.exp(self.hyper(x))


def test_layers_that_return_nothing_to_cut_are_opened() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(_Flow(), torch.randn(4, 3), lambda z: z.mean())
    inside = [f"transforms.{i}.hyper.{j}" for i in range(2) for j in (1, 2)]
    assert [node.name for node in graph] == [*inside, "output"]


def test_layers_inside_an_encoder_that_is_not_called_itself_are_found() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 4)

        def features(self, x: Tensor) -> Tensor:
            return torch.tanh(self.two(torch.tanh(self.one(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.project, self.head = Encoder(), nn.Linear(4, 4), nn.Linear(4, 2)
            self.unused = Encoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder.features(x) if self.training else self.project(self.encoder.features(x)))

    graph = diagnostics.capture(Net(), torch.randn(4, 3), lambda z: z.square().mean())
    assert [node.name for node in graph] == ["encoder.one", "encoder.two", "head"]


def test_few_nodes_are_said_with_the_way_to_choose() -> None:
    x, loss = torch.randn(4, 3), lambda z: z.square().mean()
    graph = diagnostics.capture(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), x, loss)
    assert "found only 2 nodes" in repr(graph)
    assert "nodes=[" in repr(graph)
    assert diagnostics.capture(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), x, loss, ["0"]).note is None
    deep = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    assert "Note" not in repr(diagnostics.capture(deep, x, loss))
