"""Factors of every kind of layer against dense Jacobians, unfolding, and the definitions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hessopt import KroneckerNewton
from hessopt.averages.blocks import plan_blocks
from hessopt.kronecker.band import KroneckerBand
from tests.helpers.kronecker_reference import gather, kronecker_band

RTOL = 1e-10


def gathered(net: nn.Module, x: Tensor, **options: object) -> tuple[KroneckerBand, Tensor]:
    """An engine that has seen one batch, with exact Gauss-Newton columns of ``½ Σ z²``, and the output."""
    settings = {"curvature": "ggn", "columns": "exact", "loss": "mse", "reduction": "sum", **options}
    band = kronecker_band(net, **settings)  # type: ignore[arg-type]
    z = net(x)
    gather(band, z)
    return band, z


def factors(band: KroneckerBand, block: int = 0) -> tuple[Tensor, Tensor]:
    assert band.averages.factors is not None
    number, start = band.averages.factors.place[block]
    stack, count = band.averages.factors.stacks[number], band.averages.factors.blocks[block].shape[0]
    return stack.inputs[start : start + count], stack.outputs[start : start + count]


def jacobians(net: nn.Module, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """``∂z_b/∂θ`` of every sample, (B, K, P), one entry of the output after the other."""
    z = net(x)
    rows = []
    for entry in z.flatten():
        slopes = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if s is None else s.flatten()
                    for p, s in zip(parameters, slopes, strict=True)
                ]
            )
        )
    return torch.stack(rows).view(len(x), -1, len(rows[0]))


def matrix(a: Tensor, g: Tensor) -> Tensor:
    """``A ⊗ G`` for a step ``(o, a)`` in row-major order."""
    return torch.kron(g, a)


def in_blocks_order(band: KroneckerBand, curvature: Tensor, block: int = 0) -> Tensor:
    """A matrix over the block's own parameters, flattened one after the other, in the order of ``(o, a)``."""
    own = band.gathering.blocks[block]
    count = math.prod(own.shape)
    order = torch.empty(own.shape, dtype=torch.long)
    start = 0
    for view, p in zip(own.views(order), own.parameters, strict=True):
        view.copy_(torch.arange(start, start + p.numel()).view(p.shape))
        start += p.numel()
    assert start == count
    index = order.flatten()
    return curvature[index][:, index]


# For one sample with one position, A ⊗ G is the block itself.
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_linear_block_of_one_sample_is_exact(frozen: str | None, device: torch.device) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().to(device)
    if frozen:
        getattr(net[0], frozen).requires_grad_(False)
    x = torch.randn(1, 3, dtype=torch.float64, device=device)
    band, _ = gathered(net, x)
    own = list(band.gathering.blocks[0].parameters)
    (j,) = jacobians(net, x, own)
    a, g = factors(band)
    expected = in_blocks_order(band, 2 * j.mT @ j)
    assert torch.allclose(matrix(a[0], g[0]), expected, rtol=RTOL, atol=1e-14)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
def test_exact_columns_of_the_loss(loss: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    y = torch.tensor([1]) if loss == "cross_entropy" else torch.tensor([[0.0, 1.0, 1.0]]).double()
    band, z = gathered(net, x, loss=loss, reduction="mean")
    name = {"bce_with_logits": "binary_cross_entropy_with_logits"}.get(loss, loss)
    hessian = torch.autograd.functional.hessian(lambda t: getattr(functional, name)(t, y), z.detach())
    (j,) = jacobians(net, x, list(band.gathering.blocks[0].parameters))
    a, g = factors(band)
    expected = in_blocks_order(band, j.mT @ hessian.view(3, 3) @ j)
    assert torch.allclose(matrix(a[0], g[0]), expected, rtol=RTOL, atol=1e-14)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(4),
    "layer 2d": lambda: nn.LayerNorm((3, 4)),
    "no bias": lambda: nn.LayerNorm(4, bias=False),
    "rms": lambda: nn.RMSNorm(4, eps=1e-3),
    "group": lambda: nn.GroupNorm(3, 3),
    "instance": lambda: nn.InstanceNorm1d(3, affine=True),
    "batch, eval": lambda: nn.BatchNorm1d(3).eval(),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("max_size", [100, 1])
def test_normalisation_is_exact(name: str, max_size: int) -> None:
    """Blocks of per-sample gradients: exact for any batch, positions included."""
    torch.manual_seed(0)
    norm = NORMS[name]().double()
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(p.shape))
        for b in norm.buffers():
            if b.is_floating_point():
                b.add_(torch.rand(b.shape))
    net = nn.Sequential(norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2).double().requires_grad_(False))
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    band, _ = gathered(net, x, max_size=max_size)
    a, g = factors(band)
    j = jacobians(net, x, list(band.gathering.blocks[0].parameters)).flatten(0, 1)
    expected = in_blocks_order(band, 2 * j.mT @ j)
    assert torch.equal(a.flatten(), torch.ones(1, dtype=torch.float64))
    if max_size == 1:
        assert torch.allclose(g[0], expected.diagonal(), rtol=RTOL, atol=1e-13)
    else:
        assert torch.allclose(g[0], expected, rtol=RTOL, atol=1e-13)


def test_batch_norm_in_training_uses_the_batch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3)).double()
    x = 2 + 3 * torch.randn(7, 3, dtype=torch.float64)
    band, _ = gathered(net, x)
    normal = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    _, g = factors(band)
    # z = γ x̂ + β, so the gradient of z_i is x̂_i for γ_i and 1 for β_i.
    expected = 2 * torch.cat([normal.square().sum(0), torch.full((3,), 7.0, dtype=torch.float64)])
    assert torch.allclose(g[0].diagonal(), expected, rtol=1e-9)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 5)),
    "stride, padding, dilation": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
        (2, 7, 5),
    ),
    "same": (lambda: nn.Conv2d(2, 3, 4, padding="same", bias=False), (2, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (3, 4, 5)),
    "1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "3d": (lambda: nn.Conv3d(2, 2, 2, padding=1), (2, 3, 2, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_factors_are_those_of_its_patches(name: str) -> None:
    """Gradient of the sum over positions = Σ_t ĵ_t patch_tᵀ, and A, G are the second moments of patches and ĵ."""
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    conv = make().double()
    net = nn.Sequential(conv, nn.Flatten())
    x = torch.randn(2, *shape, dtype=torch.float64)
    band, z = gathered(net, x)
    block = band.gathering.blocks[0]
    rows = block.rows(conv, x, torch.randn(1, *conv(x).shape, dtype=torch.float64), "expand", torch.float64)
    j = rows.cotangents  # (g, 1, n, T, o)
    gradient = torch.einsum("gknto,gnta->goa", j, rows.inputs)
    cotangent = j.permute(1, 2, 0, 4, 3).reshape(conv(x).shape)
    expected = torch.autograd.grad(conv(x), list(block.parameters), cotangent)
    for view, value in zip(block.views(gradient.contiguous()), expected, strict=True):
        assert torch.allclose(view, value, rtol=RTOL, atol=1e-12)
    a, g = factors(band)
    assert torch.allclose(a, torch.einsum("gnta,gntb->gab", rows.inputs, rows.inputs) / rows.inputs[0, ..., 0].numel())
    # Every output is a column of its own: ĵ is a unit vector at each position of each sample, twice for ½ Σ z² · 2.
    count = rows.inputs[0, ..., 0].numel()
    assert torch.allclose(g, 2 * count * torch.eye(block.shape[1], dtype=torch.float64).expand_as(g))
    assert z.numel() == count * len(conv.weight)


def test_convolution_against_unfold() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False).double()
    x = torch.randn(4, 3, 7, 6, dtype=torch.float64)
    band, _ = gathered(nn.Sequential(conv, nn.Flatten()), x)
    patches = functional.unfold(x, 3, stride=2, padding=1).mT.flatten(0, 1)
    assert torch.allclose(factors(band)[0][0], patches.mT @ patches / len(patches), rtol=RTOL)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(x)).mean(-2))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sequences(sharing: str) -> None:
    torch.manual_seed(0)
    net = Sequence().double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    band, _ = gathered(net, x, sharing=sharing)
    a, g = factors(band)
    h = net.enter(x).detach().requires_grad_()
    z = net.leave(torch.tanh(h).mean(-2))
    j = torch.stack([torch.autograd.grad(z[:, k].sum(), h, retain_graph=True)[0] for k in range(2)]) * 2**0.5
    ones = torch.cat([x, torch.ones(4, 5, 1)], -1)
    if sharing == "expand":
        rows, cotangents = ones.flatten(0, 1), j.flatten(0, 2)
    else:
        rows, cotangents = ones.mean(1), j.sum(2).flatten(0, 1)
    assert torch.allclose(a[0], rows.mT @ rows / len(rows), rtol=RTOL)
    assert torch.allclose(g[0], cotangents.mT @ cotangents, rtol=RTOL)


THINNED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (48, 3)),
    "sequence": (lambda: nn.Linear(3, 2), (24, 2, 3)),
    "convolution": (lambda: nn.Conv1d(2, 4, 2, groups=2), (24, 2, 4)),
}


@pytest.mark.parametrize("name", THINNED)
def test_factors_of_part_of_the_samples_are_those_of_all_in_the_mean(name: str) -> None:
    """Over which sample comes first, to rounding; the number that is left is what was asked for."""
    torch.manual_seed(0)
    make, shape = THINNED[name]
    layer = make().double()
    x, j = torch.randn(shape, dtype=torch.float64), torch.randn(2, *layer(torch.zeros(shape).double()).shape).double()
    block = plan_blocks(nn.Sequential(layer), layer.parameters(), 100)[0][0]

    def moments(x: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        rows = block.rows(layer, x, j, "expand", torch.float64)
        count = rows.inputs[0, ..., 0].numel()
        a = torch.einsum("gnta,gntb->gab", rows.inputs, rows.inputs) / count
        return a, torch.einsum("gknto,gkntp->gop", rows.cotangents, rows.cotangents)

    dimensions = max(block.shape[1:])
    rows = len(x) * (x[0].numel() // 3 if name != "convolution" else 3)
    stride = min(rows // (2 * dimensions), len(x) // 8)
    assert stride > 1
    parts = [block.thinned(layer, x, j, 2, first) for first in range(stride)]
    assert all(len(part) == len(x) // stride for part, _ in parts)
    found = [moments(*part) for part in parts]
    for i, whole in enumerate(moments(x, j)):
        mean = torch.stack([pair[i] for pair in found]).mean(0)
        assert torch.allclose(mean, whole, rtol=RTOL, atol=1e-14)
    assert block.thinned(layer, x, j, rows / dimensions, 1)[0] is x  # none to spare
    assert block.thinned(layer, x[:8], j[:, :8], 0.1, 1)[0].shape == x[:8].shape  # at least eight samples


def test_thinning_is_for_factors_without_pairs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x = torch.randn(32, 3, dtype=torch.float64)
    whole, thinned = gathered(net, x)[0], gathered(net, x, rows=2)[0]
    assert torch.allclose(factors(gathered(net, x[::4])[0])[0], factors(thinned)[0], rtol=RTOL)
    assert not torch.allclose(factors(whole)[0], factors(thinned)[0], rtol=1e-3)
    paired = gathered(net, x, rows=2, bandwidth="full")[0]
    assert torch.allclose(factors(whole)[0], factors(paired)[0], rtol=RTOL)


def test_embedding_is_exact_up_to_the_product() -> None:
    """With one token a sample, diag(frequency) ⊗ features; tokens at padding_idx have no gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(3, 2)).double()
    x = torch.tensor([[1], [1], [4], [0]])
    band, _ = gathered(net, x)
    a, g = factors(band)
    assert torch.allclose(g[0], torch.tensor([0, 0.5, 0, 0, 0.25]).double())
    weight = net[2].weight.detach()
    assert torch.allclose(a[0], 2 * 4 * weight.mT @ weight, rtol=RTOL)
    # The mean over tokens of the exact blocks: for each of the tokens 1 and 4 its own.
    j = jacobians(net, x, [net[0].weight]).flatten(0, 1)
    exact = 2 * j.mT @ j
    assert torch.allclose(torch.kron(g[0].diag(), a[0]), exact, rtol=RTOL, atol=1e-14)


class Twice(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        if shared:
            self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.called_twice = not shared

    def forward(self, x: Tensor) -> Tensor:
        if self.called_twice:
            return self.first(torch.tanh(self.first(x)))
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("shared", [False, True])
def test_calls_of_shared_parameters_count_as_positions(shared: bool) -> None:
    torch.manual_seed(0)
    net = Twice(shared).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    band, _ = gathered(net, x)
    a, g = factors(band)
    h = net.first(x).detach().requires_grad_()
    z = net.first(torch.tanh(h))
    j = torch.stack([torch.autograd.grad(z[:, k].sum(), h, retain_graph=True)[0] for k in range(3)])
    rows = torch.cat([torch.cat([t, torch.ones(4, 1)], 1) for t in (x, torch.tanh(h).detach())])
    assert torch.allclose(a[0], rows.mT @ rows / 8, rtol=RTOL)
    # Columns of the second call are unit vectors for each of the four samples.
    second = 4 * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(g[0], 2 * (torch.einsum("kbi,kbj->ij", j, j) + second), rtol=RTOL)


def test_what_has_no_rule_is_diagonal_and_reported() -> None:
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(3))
            self.up = nn.ConvTranspose1d(1, 1, 2)
            self.enter = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
            self.leave, self.unused = nn.Linear(4, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.up((self.scale * self.enter(x)).unsqueeze(1)).squeeze(1))

    net = Odd().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    band, z = gathered(net, x)
    report = band.report()
    assert set(report) == {name for name, _ in net.named_parameters()}
    assert report["scale"] == "diagonal: no rule for this parameter of Odd" or "no rule" in report["scale"]
    assert "no rule" in report["up.weight"]
    assert "no rule" in report["enter.parametrizations.weight.original0"]
    assert "not called" in report["unused.weight"]
    assert report["leave.weight"] == "linear: 5×5 ⊗ 2×2"
    z.sum().backward()
    gradients = [p.grad for p in band.parameters]
    direction = band.direction(gradients)
    assert direction.decrement > 0
    for p, g, d in zip(band.parameters, gradients, direction.steps, strict=True):
        if p in band.averages.diagonals and g is not None:
            assert torch.allclose(d, g / (band.averages.diagonals[p] + band.inverse.absolute_damping.value), rtol=RTOL)
    assert band.averages.diagonals[net.scale].min() > 0


def test_diagonal_of_the_rest_is_unbiased() -> None:
    """``E (Σ_b ĵ_b)²`` over random columns is the diagonal of the Gauss-Newton matrix."""
    torch.manual_seed(0)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.scale * x)

    net = Scale().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    j = jacobians(net, x, [net.scale]).flatten(0, 1)
    expected = 2 * j.square().sum(0)
    total = torch.zeros(3, dtype=torch.float64)
    for seed in range(400):
        band, _ = gathered(net, x, seed=seed)
        total += band.averages.diagonals[net.scale] / 400
    assert torch.allclose(total, expected, rtol=0.25)  # standard error about 5 %


class Conv1D(nn.Module):
    """As in Hugging Face's transformers: a linear layer whose weight is (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf, dtype=torch.float64) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def transposed_pair(frozen: str | None) -> tuple[nn.Module, nn.Module]:
    """Two networks that compute the same, of Conv1D and of nn.Linear."""
    torch.manual_seed(0)
    one = nn.Sequential(Conv1D(4, 3), nn.Tanh(), Conv1D(4, 4), nn.Tanh(), nn.Linear(4, 2).double())
    two = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for i in (0, 2, 4):
            two[i].weight.copy_(one[i].weight if i == 4 else one[i].weight.T)
            two[i].bias.copy_(one[i].bias)
    if frozen:
        for net in (one, two):
            getattr(net[2], frozen).requires_grad_(False)
    return one, two


@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize("bandwidth", [0, 1])
@pytest.mark.parametrize("max_size", [100, 4])
def test_transposed_linear_layer_takes_the_step_of_a_linear_one(
    frozen: str | None, bandwidth: int, max_size: int
) -> None:
    one, two = transposed_pair(frozen)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    steps = []
    for net in (one, two):
        band, z = gathered(net, x, bandwidth=bandwidth, max_size=max_size)
        assert not band.gathering.others
        z.square().sum().backward()
        direction = band.direction([p.grad for p in band.parameters])
        steps.append([step.clone() for step in direction.steps])
    names = [n for n, p in one.named_parameters() if p.requires_grad]
    for name, a, b in zip(names, *steps, strict=True):
        same = b.T if name in ("0.weight", "2.weight") else b
        assert torch.allclose(a, same, rtol=1e-12, atol=1e-15), name


def test_classes_that_are_only_called_like_that_are_left_diagonal() -> None:
    class Other(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    named = type("Conv1D", (nn.Conv1d,), {"forward": lambda self, x: x})(2, 3, 1)
    for module in (Other(4, 3), named):
        blocks, rest = plan_blocks(module, module.parameters(), 100)
        assert not blocks
        assert all("no rule for" in reason for reason in rest.values())


def test_many_parameters_without_factors_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """By class and share; a tenth is silent."""

    class Scale(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(size))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor.sum() / len(self.factor)

    def trained(size: int) -> list[str]:
        caplog.clear()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 10), Scale(size))  # 90 parameters and size
        optimizer = KroneckerNewton(net, bandwidth="auto", loss="mse")
        for _ in range(3):
            optimizer.zero_grad()
            functional.mse_loss(net(torch.randn(5, 8)), torch.zeros(5, 10)).backward()
            optimizer.step()
        return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]

    assert trained(10) == []
    (message,) = trained(60)
    assert "40 % of the parameters" in message
    assert "Scale (40 %)" in message
    assert "report()" in message


def test_plan_names_reasons() -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    blocks, rest = plan_blocks(nn.Sequential(embedding, head), [head.weight], 100)
    assert not blocks
    assert rest == {head.weight: "shared by modules of different kinds"}
    sparse = nn.Embedding(5, 3, max_norm=1.0)
    assert "no rule" in plan_blocks(sparse, sparse.parameters(), 100)[1][sparse.weight]
