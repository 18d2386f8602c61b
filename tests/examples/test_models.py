"""The networks of the examples have the published layouts, and can be captured."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import diagnostics
from examples.shared import models


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("classes", "count"), [(1000, 11_689_512), (10, 11_181_642)])
def test_resnet18_has_torchvisions_number_of_parameters(classes: int, count: int) -> None:
    with torch.device("meta"):
        assert _count(models.resnet18(classes=classes)) == count


def _torchvision_names() -> list[str]:
    """Written down from the published layout, independently of the module."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{n}" for n in norm)]
    for layer in range(1, 5):
        for block in range(2):
            head = f"layer{layer}.{block}"
            for i in (1, 2):
                names += [f"{head}.conv{i}.weight", *(f"{head}.bn{i}.{n}" for n in norm)]
            if layer > 1 and block == 0:
                names += [f"{head}.downsample.0.weight", *(f"{head}.downsample.1.{n}" for n in norm)]
    return [*names, "fc.weight", "fc.bias"]


def test_resnet18_has_torchvisions_names_in_their_order() -> None:
    model = models.resnet18(width=4)
    assert list(model.state_dict()) == _torchvision_names()
    children = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    assert [name for name, _ in model.named_children()] == children


@pytest.mark.parametrize(("stem", "before_pooling"), [("imagenet", 2), ("cifar", 4)])
def test_resnet18_shapes(stem: str, before_pooling: int) -> None:
    model = models.resnet18(nn.SiLU, classes=7, stem=stem, width=8).eval()
    side = {"imagenet": 64, "cifar": 32}[stem]
    seen: list[Tensor] = []
    model.layer4.register_forward_hook(lambda module, args, output: seen.append(output))
    assert model(torch.randn(2, 3, side, side)).shape == (2, 7)
    assert seen[0].shape == (2, 64, before_pooling, before_pooling)


def test_resnet18_initialisation_is_torchvisions() -> None:
    model = models.resnet18()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            deviation = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5  # fan_out
            # std of n normal numbers is off by 1/√(2n); five of them
            slack = 5 / (2 * module.weight.numel()) ** 0.5
            assert module.weight.std().item() == pytest.approx(deviation, rel=slack), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_resnet18_against_a_functional_forward_pass() -> None:
    model = models.resnet18(nn.SiLU, classes=3, norm=lambda c: nn.GroupNorm(2, c), stem="cifar", width=4).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    weights = model.state_dict()

    def conv(y: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        return nn.functional.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(y: Tensor) -> Tensor:
        return nn.functional.group_norm(y, 2)

    y = nn.functional.silu(norm(conv(x, "conv1")))
    for layer in range(1, 5):
        for block in range(2):
            head = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            skip = norm(conv(y, f"{head}.downsample.0", 2)) if stride == 2 else y
            inner = nn.functional.silu(norm(conv(y, f"{head}.conv1", stride)))
            y = nn.functional.silu(norm(conv(inner, f"{head}.conv2")) + skip)
    expected = y.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_published_transformer_sizes() -> None:
    with torch.device("meta"):
        assert _count(models.gpt(50257, 1024, 12, 768, 12)) == 124_439_808  # GPT-2
        assert _count(models.gpt(50257, 1024, 12, 768, 12, tied=False)) == 124_439_808 + 50257 * 768
        assert _count(models.vit(224, 16, 12, 768, 12, 1000)) == 86_567_656  # ViT-B/16


def test_gpt_is_causal() -> None:
    model = models.gpt(vocab=11, context=8, depth=2, width=16, heads=2).double()
    tokens = torch.randint(0, 11, (3, 8))
    logits = model(tokens)
    for position in range(8):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        difference = (model(changed) - logits).abs().amax((0, 2))
        assert (difference[:position] == 0).all()
        assert (difference[position:] > 1e-8).all()  # and every later one sees it


def test_vit_sees_every_patch() -> None:
    model = models.vit(image=8, patch=4, depth=1, width=16, heads=2, classes=5).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    logits = model(x)
    assert logits.shape == (2, 5)
    for corner in range(4):
        changed = x.clone()
        changed[:, :, 4 * (corner // 2) :, 4 * (corner % 2) :][:, :, :4, :4] += 1
        assert (model(changed) - logits).abs().min() > 1e-10


def test_vit_knows_patches_by_their_positions_only() -> None:
    model = models.vit(image=8, patch=4, depth=2, width=16, heads=2, classes=5).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    swapped = x.roll(4, dims=3)
    assert (model(x) - model(swapped)).abs().min() > 1e-10
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(x), model(swapped), rtol=1e-12, atol=1e-12)


def test_gpt2_initialisation() -> None:
    model = models.gpt(vocab=500, context=64, depth=3, width=64, heads=4)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if "ln" in name and name.endswith("weight") else 0)).all(), name
        else:
            deviation = 0.02 / 6**0.5 if re.search(r"c_proj\.weight", name) else 0.02
            slack = 5 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(deviation, rel=slack), name
    assert model.lm_head.weight is model.wte.weight
    untied = models.gpt(vocab=500, tied=False)
    assert untied.lm_head.weight is not untied.wte.weight


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="stem is"):
        models.resnet18(stem="mnist")
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        models.gpt(width=10, heads=4)
    with pytest.raises(ValueError, match="multiple of the patch size"):
        models.vit(image=10, patch=4)
    with pytest.raises(ValueError, match="more than the context"):
        models.gpt(vocab=5, context=4, width=8, heads=2)(torch.zeros(1, 5, dtype=torch.long))


def _inputs(name: str, device: torch.device) -> tuple[nn.Module, Tensor, Tensor, list[str]]:
    """A tiny model of each kind: model, inputs, targets, two nodes."""
    if name == "resnet18":
        model = models.resnet18(nn.SiLU, classes=3, stem="cifar", width=2)
        return (
            model.to(device).eval(),
            torch.randn(2, 3, 8, 8, device=device),
            torch.tensor([0, 2]),
            ["layer3", "layer4"],
        )
    if name == "vit":
        model = models.vit(image=8, patch=4, depth=2, width=8, heads=2, classes=3)
        return model.to(device), torch.randn(2, 3, 8, 8, device=device), torch.tensor([0, 2]), ["h.0", "h.1"]
    model = models.gpt(vocab=7, context=4, depth=2, width=8, heads=2)
    return model.to(device), torch.randint(0, 7, (2, 4), device=device), torch.randint(0, 7, (2, 4)), ["h.0", "h.1"]


@pytest.mark.parametrize("name", ["resnet18", "vit", "gpt"])
def test_blocks_against_double_backpropagation(device: torch.device, name: str) -> None:
    model, x, targets, nodes = _inputs(name, device)
    model, targets = model.double(), targets.to(device)
    x = x.double() if x.is_floating_point() else x

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(z.flatten(0, -2), targets.flatten())

    total = diagnostics.hessian_blocks(diagnostics.capture(model, x, loss, nodes)).mean().total
    v, w = (model.get_submodule(node) for node in nodes)
    shapes: dict[nn.Module, torch.Size] = {}
    hooks = [m.register_forward_hook(lambda m, args, out: shapes.__setitem__(m, out.shape)) for m in (v, w)]
    model(x)
    for hook in hooks:
        hook.remove()
    # one injection shared by both samples, zero
    injections = {m: torch.zeros(shapes[m][1:], dtype=torch.float64, device=device).requires_grad_() for m in (v, w)}
    for m in (v, w):
        m.register_forward_hook(lambda m, args, out: out + injections[m])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (slope,) = torch.autograd.grad(loss(model(x)), [injections[v]], create_graph=True)
        rows = [
            torch.autograd.grad(slope.flatten()[i], [injections[w]], retain_graph=True)[0].flatten()
            for i in range(slope.numel())
        ]
    expected = torch.stack(rows)
    assert expected.norm() > 0
    assert (total[nodes[0], nodes[1]] - expected).norm() <= 1e-10 * expected.norm()
