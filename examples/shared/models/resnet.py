"""ResNet-18 in torchvision's layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn


def resnet18(
    activation: Callable[[], nn.Module] = nn.ReLU,
    classes: int = 10,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    width: int = 64,
) -> ResNet18:
    """ResNet-18 (He et al. 2016) with torchvision's layout, names, order of parameters and initialisation.

    Args:
        activation: Makes one activation a block; it must not work in place (``nn.ReLU(inplace=True)``).
        classes: Number of outputs.
        norm: Makes a normalisation of as many channels.
        stem: ``"imagenet"``: convolution 7×7 of stride 2 and max-pooling. ``"cifar"``: 3×3 of stride 1 and none.
        width: Channels of the first stage; the next three have two, four and eight times as many.
    """
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem is 'imagenet' or 'cifar', got {stem!r}.")
    return ResNet18(activation, classes, norm, stem, width)


class ResNet18(nn.Module):
    """Made by :func:`resnet18`."""

    def __init__(
        self,
        activation: Callable[[], nn.Module],
        classes: int,
        norm: Callable[[int], nn.Module],
        stem: Literal["imagenet", "cifar"],
        width: int,
    ) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                BasicBlock(inputs, outputs, stride, activation, norm),
                BasicBlock(outputs, outputs, 1, activation, norm),
            )

        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False) if large else nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = norm(width)
        self.relu = activation()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.layer4 = stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two convolutions 3×3 and a skip connection, which is a convolution 1×1 where shapes differ."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        activation: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.relu = activation()  # torchvision's name, whatever the activation is
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + skip)
        return y
