"""Networks, batches and dense curvature of their parameters, for tests of operators: nothing here knows operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.networks import Attention, CalledTwice, Chain, Diamond, Normalised, Recurrent, ResidualCat


class TiedLanguageModel(nn.Module):
    """The embedding is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(ids))))


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` between a nonlinear stem and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attend = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        return (h + self.attend(h, h, h, need_weights=False)[0]).mean(1)


class TwoHeads(nn.Module):
    """A dict of two outputs, of which one has no sample dimension in front of others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.stem(x))
        return {"left": self.left(h), "right": self.right(h).sin()}


class Unused(nn.Module):
    """A parameter that the output does not depend on, between two that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(3, 3), nn.Parameter(torch.randn(2)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def wavy(z: Tensor, _targets: Any = None) -> Tensor:
    """A mean over samples that is not convex in z and couples its entries within a sample."""
    flat = z.flatten(1)
    return (flat.sin() * flat + flat.sum(1, keepdim=True).square() * 0.1).sum() / len(z)


def two_heads_loss(z: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Couples both outputs of a sample."""
    return F.cross_entropy(z["left"], targets) + (z["left"].sum(1) * z["right"].square().sum(1)).mean()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A network, one batch and a loss that is a mean over the batch."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    loss: Callable[[Any, Any], Tensor] = wavy
    targets: Callable[[], Tensor | None] = lambda: None
    coupled: bool = False

    def build(self, device: torch.device | str = "cpu") -> tuple[nn.Module, tuple[Tensor, Tensor | None]]:
        torch.manual_seed(0)
        model, x, y = self.make().double(), self.inputs(), self.targets()
        return model.to(device), (x.to(device), None if y is None else y.to(device))


def _norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def _trained_norm() -> nn.Module:
    model = _norm()
    model[1].running_mean.uniform_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def token_cross_entropy(z: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), ids.flatten())


CASES: dict[str, Case] = {
    "chain": Case(lambda: Chain(5, 4, 3, 4, 3), lambda: randn(5, 5)),
    "classifier": Case(
        lambda: Chain(5, 4, 4, 3), lambda: randn(5, 5), F.cross_entropy, lambda: torch.tensor([0, 2, 1, 1, 0])
    ),
    "residual_cat": Case(ResidualCat, lambda: randn(4, 5)),
    "diamond": Case(Diamond, lambda: randn(4, 5)),
    "called_twice": Case(CalledTwice, lambda: randn(4, 5)),
    "attention": Case(lambda: Attention(fused=True), lambda: randn(3, 4, 3)),
    "multihead": Case(SelfAttention, lambda: randn(3, 4, 3)),
    "layer_norm": Case(Normalised, lambda: randn(4, 5)),
    "lstm": Case(Recurrent, lambda: randn(3, 3, 3)),
    "cnn": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.SiLU(), nn.Conv2d(2, 2, 2, stride=2), nn.Flatten(),
            nn.Linear(2, 2),
        ),
        lambda: randn(3, 1, 4, 4),
    ),
    "batch_norm_train": Case(_norm, lambda: randn(6, 3), coupled=True),
    "batch_norm_eval": Case(_trained_norm, lambda: randn(6, 3)),
    "tied": Case(
        TiedLanguageModel, lambda: torch.tensor([[0, 1, 4], [1, 1, 3], [2, 0, 0]]), token_cross_entropy,
        lambda: torch.tensor([[1, 4, 2], [1, 3, 0], [0, 0, 2]]),
    ),
    "two_heads": Case(TwoHeads, lambda: randn(4, 3), two_heads_loss, lambda: torch.tensor([0, 1, 1, 0])),
    "unused": Case(Unused, lambda: randn(4, 3)),
}  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """Matrices ``(P, P)`` by double back-propagation, entry by entry, and what they are made of."""

    loss: Tensor
    gradient: Tensor
    hessian: Tensor
    gn: Tensor
    jacobian: Tensor  # of all outputs, flat one after another, (D, P)
    slope: Tensor  # of the loss by them, (D,)


def dense(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss_fn: Callable[[Any, Any], Tensor],
    parameters: Iterable[nn.Parameter] | None = None,
) -> Dense:
    """By ``torch.autograd.grad`` alone; the loss must not depend on parameters but through the output."""
    chosen = list(model.parameters() if parameters is None else parameters)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    rng = torch.get_rng_state()

    def rows(values: Tensor, inputs: list[Any]) -> Tensor:
        if not values.requires_grad:
            return torch.zeros(len(values), sum(t.numel() for t in inputs), dtype=values.dtype)
        grads = [torch.autograd.grad(v, inputs, retain_graph=True, materialize_grads=True) for v in values]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in grads])

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        z = model(*batch[0]) if isinstance(batch[0], tuple) else model(batch[0])
    torch.backends.mha.set_fastpath_enabled(fast_path)
    outputs = z if isinstance(z, dict) else {"": z}
    loss = loss_fn(z, batch[1])
    gradients = torch.autograd.grad(loss, chosen, create_graph=True, materialize_grads=True)
    flat_gradient = torch.cat([g.reshape(-1) for g in gradients])
    hessian = rows(flat_gradient, chosen)
    free = {name: t.detach().requires_grad_() for name, t in outputs.items()}
    cut_loss = loss_fn(free if isinstance(z, dict) else free[""], batch[1])
    slopes = torch.autograd.grad(cut_loss, list(free.values()), create_graph=True, materialize_grads=True)
    slope = torch.cat([s.reshape(-1) for s in slopes])
    curvature = rows(slope, list(free.values()))
    jacobian = rows(torch.cat([t.reshape(-1) for t in outputs.values()]), chosen)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    torch.set_rng_state(rng)
    gn = jacobian.T @ curvature @ jacobian
    return Dense(loss.detach(), flat_gradient.detach(), hessian, gn, jacobian, slope.detach())
