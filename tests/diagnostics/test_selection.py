"""The rule that names layers and blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import diagnostics
from diagnostics.layer_rule import layers
from tests.networks import Normalised


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
