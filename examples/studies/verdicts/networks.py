"""Small networks of many kinds, healthy and faulty, on which the rules of verdicts are calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
Data: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A network with what it is for.

    Attributes:
        name: What it is.
        group: Kind of networks.
        model: In the mode in which it is diagnosed.
        data: Inputs and targets of all samples.
        loss: Of an output and targets.
        batch: Samples in a diagnosis; few where they are coupled and so one joint sample.
    """

    name: str
    group: str
    model: nn.Module
    data: Data
    loss: Loss
    batch: int = 32


def digits(flat: bool = True) -> Data:
    """Handwritten digits of 4 × 4 pixels."""
    found = load_digits()
    images = F.avg_pool2d(torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, 2)[:512]
    return images.flatten(1) if flat else images, torch.tensor(found.target)[:512]


def images() -> Data:
    """The same as images."""
    return digits(flat=False)


def diabetes() -> Data:
    """Ten features and one number, standardised."""
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    return (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)


def waves(length: int = 8) -> Data:
    """Sampled sine waves and their next value."""
    phase, speed = 6.3 * torch.rand(256, 1), 0.3 + torch.rand(256, 1)
    values = torch.sin(phase + speed * torch.arange(length + 1.0))
    return values[:, :-1].unsqueeze(2), values[:, -1:]


def text(vocab: int = 8, length: int = 8) -> Data:
    """A Markov chain: tokens, and the next token at each place."""
    table = torch.softmax(2 * torch.randn(vocab, vocab), 1)
    tokens = [torch.randint(vocab, (256,))]
    for _ in range(length):
        tokens.append(torch.multinomial(table[tokens[-1]], 1).squeeze(1))
    rows = torch.stack(tokens, 1)
    return rows[:, :-1], rows[:, 1:]


def points() -> Data:
    """Points of the unit interval; targets of a wave."""
    x = torch.rand(256, 1)
    return x, torch.sin(6 * x)


def own(inputs: Tensor) -> Data:
    """Inputs that are their own targets."""
    return inputs, inputs


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def mlp(widths: tuple[int, ...], activation: Callable[[], nn.Module] = nn.Tanh, gain: float = 1.0) -> nn.Sequential:
    """Layers of a linear map and an activation each, and a linear one; weights times ``gain``."""
    layers: list[nn.Module] = [nn.Sequential(nn.Linear(a, b), activation()) for a, b in pairwise(widths[:-1])]
    model = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def cnn(activation: Callable[[], nn.Module], norm: Callable[[int], nn.Module], pool: nn.Module) -> nn.Sequential:
    """Two convolutions, pooling, a linear layer."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm(4), activation()),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4), activation()),
        pool,
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class Residual(nn.Module):
    """x + f(x), or what is put in place of the sum."""

    def __init__(self, branch: nn.Module, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.branch, self.join = branch, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.branch(x))


def residual_mlp(activation: Callable[[], nn.Module], depth: int = 4, norm: bool = False) -> nn.Sequential:
    """Residual blocks between an embedding and a head."""
    blocks = [
        Residual(nn.Sequential(nn.LayerNorm(8) if norm else nn.Identity(), nn.Linear(8, 8), activation()))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(16, 8), *blocks, nn.Linear(8, 10))


def resnet(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Residual convolutions with batch-norm, averaged over the image."""
    blocks = [
        nn.Sequential(
            Residual(
                nn.Sequential(
                    nn.Conv2d(4, 4, 3, padding=1),
                    nn.BatchNorm2d(4),
                    activation(),
                    nn.Conv2d(4, 4, 1),
                    nn.BatchNorm2d(4),
                )
            ),
            activation(),
        )
        for _ in range(2)
    ]
    stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), activation())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


class Attention(nn.Module):
    """One head over the sequence, written out."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.causal:
            later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        z: Tensor = self.out(scores.softmax(-1) @ v)
        return z


def block(width: int, causal: bool, after: bool = False) -> nn.Sequential:
    """A transformer block, the norms before the branches or after the sums."""
    hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    if after:
        return nn.Sequential(
            Residual(Attention(width, causal)), nn.LayerNorm(width), Residual(hidden), nn.LayerNorm(width)
        )
    return nn.Sequential(
        Residual(nn.Sequential(nn.LayerNorm(width), Attention(width, causal))),
        Residual(nn.Sequential(nn.LayerNorm(width), hidden)),
    )


class Language(nn.Module):
    """A causal transformer on tokens."""

    def __init__(self, width: int = 6, depth: int = 2, after: bool = False, vocab: int = 8, length: int = 8) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(block(width, True, after) for _ in range(depth)))
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = self.head(self.blocks(self.tokens(tokens) + self.places))
        return z


class Vision(nn.Module):
    """A transformer on the rows of an image, read off at a class token or by the mean."""

    def __init__(self, width: int = 6, token: bool = True) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(4, width), nn.Parameter(torch.zeros(1, 1, width)) if token else None
        self.blocks = nn.Sequential(*(block(width, False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.embed(images.squeeze(1))
        if self.token is not None:
            rows = torch.cat([self.token.expand(len(rows), -1, -1), rows], 1)
        rows = self.norm(self.blocks(rows))
        z: Tensor = self.head(rows.mean(1) if self.token is None else rows[:, 0])
        return z


class Mixing(nn.Module):
    """A linear map over places with GELU, instead of attention."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Linear(places, 2 * places), nn.GELU(), nn.Linear(2 * places, places))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.map(x.mT).mT
        return z


class Recurrent(nn.Module):
    """The last state of a recurrent layer, or of two, mapped to one number."""

    def __init__(self, kind: Callable[..., nn.Module], layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind(1 if i == 0 else 6, 6, batch_first=True) for i in range(layers)])
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        z: Tensor = self.head(x[:, -1])
        return z


class Unrolled(nn.Module):
    """A recurrent cell called step by step."""

    def __init__(self, steps: int = 6) -> None:
        super().__init__()
        self.steps, self.cell, self.head = steps, nn.RNNCell(1, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 6)
        for i in range(self.steps):
            h = self.cell(x[:, i], h)
        z: Tensor = self.head(h)
        return z


class Residuals(nn.Module):
    """u''/36 + u at points by differences, and u: what a physics-informed network's loss is made of."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        step = 0.1
        left, u, right = self.net(x - step), self.net(x), self.net(x + step)
        return torch.cat([(left - 2 * u + right) / (6 * step) ** 2 + u, u], 1)


class Sine(nn.Module):
    """sin(ωx)."""

    def __init__(self, frequency: float = 10.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x)


class Spare(nn.Module):
    """A body and two heads; the loss takes the first output, and ``unused`` is never called."""

    def __init__(self, second: bool, unused: bool) -> None:
        super().__init__()
        self.body, self.head = mlp((16, 8, 8)), nn.Linear(8, 10)
        self.second = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)) if second else None
        self.unused = nn.Linear(8, 10) if unused else None

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return self.head(h) if self.second is None else (self.head(h), self.second(h))


def dying(model: nn.Sequential, layer: int, bias: float) -> nn.Sequential:
    """The model with a large negative bias in one layer."""
    with torch.no_grad():
        model.get_parameter(f"{layer}.0.bias").sub_(bias)
    return model


def scaled(model: nn.Module, layer: nn.Module, factor: float) -> nn.Module:
    """The model with one layer's parameters times a factor."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(factor)
    return model


def unbiased(model: nn.Module) -> nn.Module:
    """The model without biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", None)
    return model


def equal(model: nn.Module) -> nn.Module:
    """The model with the same value in all weights: units of a layer stay equal in training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    return model


def frozen(model: nn.Sequential, layers: int) -> nn.Sequential:
    """The model with its first layers frozen."""
    model[:layers].requires_grad_(False)
    return model


def orthogonal(model: nn.Module, gain: float) -> nn.Module:
    """The model with orthogonal weights and no biases."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.orthogonal_(parameter, gain)
        else:
            nn.init.zeros_(parameter)
    return model


def cases() -> Iterator[Case]:
    """The networks, one after another, each with its own seed."""
    entropy, squares = F.cross_entropy, F.mse_loss
    deep, image = (16, *[8] * 10, 10), (16, 10, 10, 10)
    makers: list[tuple[str, str, Callable[[], nn.Module], Callable[[], Data], Loss]] = [
        ("perceptron", "tanh", lambda: mlp(image), digits, entropy),
        ("perceptron", "relu", lambda: mlp(image, nn.ReLU), digits, entropy),
        ("perceptron", "gelu", lambda: mlp(image, nn.GELU), digits, entropy),
        ("perceptron", "sigmoid", lambda: mlp(image, nn.Sigmoid), digits, entropy),
        ("perceptron", "relu, regression", lambda: mlp((10, 12, 12, 1), nn.ReLU), diabetes, squares),
        ("perceptron", "silu, regression", lambda: mlp((10, 12, 12, 1), nn.SiLU), diabetes, squares),
        ("perceptron", "tanh, huber", lambda: mlp((10, 12, 12, 1)), diabetes, F.smooth_l1_loss),
        ("perceptron", "one wide layer", lambda: mlp((10, 32, 1)), diabetes, squares),
        ("perceptron", "logistic regression", lambda: nn.Linear(16, 10), digits, entropy),
        ("perceptron", "linear layers", lambda: mlp(image, nn.Identity), digits, entropy),
        ("perceptron", "dropout, training", lambda: mlp(image, lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.2))),
         digits, entropy),
        ("convolutions", "relu", lambda: cnn(nn.ReLU, nn.Identity, nn.MaxPool2d(2)).eval(), images, entropy),
        ("convolutions", "relu, batch-norm", lambda: cnn(nn.ReLU, nn.BatchNorm2d, nn.MaxPool2d(2)).eval(), images,
         entropy),
        ("convolutions", "relu, batch-norm in training", lambda: cnn(nn.ReLU, nn.BatchNorm2d, nn.MaxPool2d(2)), images,
         entropy),
        ("convolutions", "gelu", lambda: cnn(nn.GELU, nn.Identity, nn.AvgPool2d(2)).eval(), images, entropy),
        ("convolutions", "silu, group norm", lambda: cnn(nn.SiLU, lambda c: nn.GroupNorm(2, c), nn.AvgPool2d(2)).eval(),
         images, entropy),
        ("residual", "tanh", lambda: residual_mlp(nn.Tanh), digits, entropy),
        ("residual", "relu", lambda: residual_mlp(nn.ReLU), digits, entropy),
        ("residual", "gelu, layer norm", lambda: residual_mlp(nn.GELU, norm=True), digits, entropy),
        ("residual", "resnet, relu", lambda: resnet(nn.ReLU).eval(), images, entropy),
        ("residual", "resnet, silu", lambda: resnet(nn.SiLU).eval(), images, entropy),
        ("residual", "resnet in training", lambda: resnet(nn.ReLU), images, entropy),
        ("residual", "dense connections", lambda: nn.Sequential(
            *(Residual(nn.Sequential(nn.Linear(16 + 4 * i, 4), nn.ReLU()), lambda a, b: torch.cat([a, b], 1))
              for i in range(3)), nn.Linear(28, 10)), digits, entropy),
        ("transformer", "language", Language, text, next_token),
        ("transformer", "language, norms after", lambda: Language(after=True), text, next_token),
        ("transformer", "vision, class token", Vision, images, entropy),
        ("transformer", "vision, mean", lambda: Vision(token=False), images, entropy),
        ("transformer", "mixer", lambda: nn.Sequential(nn.Flatten(1, 2), nn.Linear(4, 6), Residual(Mixing(4)),
         Residual(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))), nn.Flatten(), nn.Linear(24, 10)),
         images, entropy),
        ("recurrent", "lstm", lambda: Recurrent(nn.LSTM), waves, squares),
        ("recurrent", "gru, two layers", lambda: Recurrent(nn.GRU, 2), waves, squares),
        ("recurrent", "cell, unrolled", Unrolled, waves, squares),
        ("autoencoder", "tanh", lambda: mlp((16, 10, 3, 10, 16)), lambda: own(digits()[0]), squares),
        ("autoencoder", "sigmoid", lambda: mlp((16, 10, 3, 10, 16), nn.Sigmoid), lambda: own(digits()[0]), squares),
        ("autoencoder", "relu", lambda: mlp((16, 10, 3, 10, 16), nn.ReLU), lambda: own(digits()[0]), squares),
        ("fields", "physics-informed, tanh", lambda: Residuals(mlp((1, 10, 10, 1))), points, lambda z, t:
         z[:, 0].square().mean() + (z[:, 1:] - t).square().mean()),
        ("fields", "coordinates, sine", lambda: mlp((1, 12, 12, 1), Sine), points, squares),
        ("fields", "coordinates, tanh", lambda: mlp((1, 12, 12, 1)), points, squares),
        ("deep", "tanh", lambda: mlp(deep), digits, entropy),
        ("deep", "relu", lambda: mlp(deep, nn.ReLU), digits, entropy),
        ("deep", "relu, orthogonal", lambda: orthogonal(mlp(deep, nn.ReLU), 2**0.5), digits, entropy),
        ("deep", "tanh, orthogonal", lambda: orthogonal(mlp(deep), 1.0), digits, entropy),
        ("deep", "residual", lambda: residual_mlp(nn.Tanh, 10), digits, entropy),
    ]  # fmt: skip
    faults: list[tuple[str, Callable[[], nn.Module], Callable[[], Data], Loss]] = [
        ("saturated tanh", lambda: mlp(image, gain=20), digits, entropy),
        ("saturated softmax", lambda: scaled(m := mlp(image), m[-1], 300), digits, entropy),
        ("a dead layer", lambda: dying(mlp(image, nn.ReLU), 1, 20), digits, entropy),
        ("a dying layer", lambda: dying(mlp(image, nn.ReLU), 1, 0.7), digits, entropy),
        ("weights × 4", lambda: mlp((16, *[10] * 9, 10), nn.ReLU, 4), digits, entropy),
        ("weights × 0.2", lambda: mlp((16, *[10] * 5, 10), nn.Tanh, 0.2), digits, entropy),
        ("tiny weights, no biases", lambda: unbiased(mlp((10, 12, 12, 1), nn.Tanh, 1e-2)), diabetes, squares),
        ("tiny linear layers, no biases", lambda: unbiased(mlp((10, 12, 1), nn.Identity, 1e-2)), diabetes, squares),
        ("equal weights", lambda: equal(mlp((10, 12, 12, 1))), diabetes, squares),
        ("head at 0", lambda: scaled(m := mlp(image), m[-1], 0), digits, entropy),
        ("an unused head", lambda: Spare(True, False), digits, lambda z, t: entropy(z[0], t)),
        ("an unused layer", lambda: Spare(False, True), digits, entropy),
        ("frozen layers", lambda: frozen(mlp(image), 2), digits, entropy),
        ("linear loss", lambda: mlp(image), digits, lambda z, t: z.gather(1, t[:, None]).mean().neg()),
        ("contrastive loss", lambda: mlp(image), digits, lambda z, t: entropy(z @ z.T, t % len(z))),
        ("narrow in the middle", lambda: mlp((16, 12, 1, 12, 10)), digits, entropy),
        ("saturated tanh, deep", lambda: mlp((16, *[8] * 6, 10), gain=20), digits, entropy),
    ]
    coupled = ("relu, batch-norm in training", "resnet in training", "contrastive loss")
    for seed, (group, name, make, data, loss) in enumerate([*makers, *(("faults", *fault) for fault in faults)]):
        torch.manual_seed(seed)
        yield Case(name, group, make(), data(), loss, 8 if name in coupled else 32)


def train(case: Case, steps: int, rate: float = 1e-2, batch: int = 64) -> None:
    """Adam on mini-batches, in the mode that the model is in but for batch-norm, which is trained in its own."""
    mode = case.model.training
    case.model.train()
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(steps):
        chosen = torch.randint(len(case.data[0]), (batch,))
        optimizer.zero_grad()
        case.loss(case.model(case.data[0][chosen]), case.data[1][chosen]).backward()
        optimizer.step()
    case.model.train(mode)
