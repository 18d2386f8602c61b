"""Patches of convolutions against PyTorch's unfolding, and their Gram matrices against the patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.autograd.patches import patch_gram, patches_of
from tests.helpers.kronecker_reference import gather, kronecker_band

SHAPES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "same": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 5)),
    "valid": (nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    "one": (nn.Conv2d(3, 4, 1), (2, 3, 4, 5)),
    "even kernel": (nn.Conv2d(2, 4, (2, 4), padding=(1, 2)), (2, 2, 6, 5)),
    "even and same": (nn.Conv2d(2, 4, (4, 2), padding="same"), (2, 2, 6, 5)),
    "more padding than the kernel": (nn.Conv2d(2, 4, 2, padding=3), (2, 2, 3, 4)),
    "kernel as large as the image": (nn.Conv2d(2, 4, (3, 4)), (3, 2, 3, 4)),
    "groups": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=2, groups=4), (2, 4, 5, 4)),
    "1-D": (nn.Conv1d(3, 2, 5, padding=1), (3, 3, 9)),
    "3-D": (nn.Conv3d(2, 2, (2, 3, 2), padding=(0, 1, 1)), (2, 2, 3, 4, 3)),
}
OTHERS: dict[str, nn.Module] = {
    "stride": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "dilation": nn.Conv2d(3, 4, 3, dilation=(1, 2)),
    "reflecting": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
}


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_gram_matrix_without_unfolding(name: str, one: bool) -> None:
    module, shape = SHAPES[name]
    x = image(*shape)
    patches = patches_of(module, x, one).flatten(1, 2)  # type: ignore[arg-type]
    found = patch_gram(module, x, one, worth=float("inf"))  # type: ignore[arg-type]
    assert found is not None
    assert torch.allclose(found, patches.mT @ patches, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_unfolded(name: str) -> None:
    assert patch_gram(OTHERS[name], image(2, 3, 9, 8), True, worth=float("inf")) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "worth_it"), [(32, True), (4, False)])
def test_small_images_are_unfolded(size: int, worth_it: bool) -> None:
    """Where the margin is most of the image, there is nothing to save."""
    assert (patch_gram(nn.Conv2d(3, 4, 3, padding=1), image(1, 3, size, size), True) is not None) == worth_it


@pytest.mark.parametrize(
    "name", [*(name for name, (module, _) in SHAPES.items() if isinstance(module, nn.Conv2d)), *OTHERS]
)
def test_patches_are_those_of_unfold(name: str) -> None:
    module, shape = SHAPES[name] if name in SHAPES else (OTHERS[name], (2, 3, 9, 8))
    assert isinstance(module, nn.Conv2d)
    x = image(*shape)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    expected = functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)  # (n, g·c·k, T)
    found = patches_of(module, x, True)
    assert torch.equal(found[..., :-1].permute(1, 0, 3, 2).flatten(1, 2), expected)
    assert (found[..., -1] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factors_with_and_without_unfolding(dtype: torch.dtype) -> None:
    """A band needs the patches themselves, block-diagonal curvature does not; a second call needs them too."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.two(self.one(x).tanh()).tanh()).mean((2, 3))

    torch.manual_seed(0)
    net = Twice().to(dtype)
    x = image(3, 3, 16, 16).to(dtype)
    options: dict[str, Any] = {"curvature": "ggn", "columns": "exact", "loss": "mse"}
    found = []
    for bandwidth in (0, 1):
        band = kronecker_band(net, bandwidth, **options)
        gather(band, net(x))
        assert band.averages.factors is not None
        found.append([stack.inputs.clone() for stack in band.averages.factors.stacks])
        band.detach()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12 if dtype == torch.float64 else 1e-4, atol=1e-6)
