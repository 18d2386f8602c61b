"""Networks and closures that return an object with ``loss`` and ``logits``, as those of Hugging Face do."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

from hessopt import (
    BandedNewton,
    KroneckerAveraging,
    KroneckerNewton,
    NamedLoss,
    NewtonCG,
    NullBoost,
    OnlineExponent,
    PowerLaw,
    SaddleEscape,
    SpectralNewton,
)
from hessopt.errors import ClosureError, ModelError

F64 = torch.float64


@dataclass
class Output:
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()


class ModelOutput(OrderedDict[str, Any]):
    """Keys that are attributes, too, and no key for what is None."""

    def __init__(self, **parts: Any) -> None:
        super().__init__((key, value) for key, value in parts.items() if value is not None)
        for key, value in self.items():
            object.__setattr__(self, key, value)


class Whole(NamedTuple):
    loss: Tensor | None
    logits: Tensor
    hidden: tuple[Tensor, ...]


FORMS: dict[str, Callable[..., Any]] = {
    "dataclass": Output,
    "ModelOutput": ModelOutput,
    "dict": dict,
    "named tuple": Whole,
}


class Labelled(nn.Module):
    """A classifier that computes its loss where it is given labels."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        if self.form == "tensor":
            return logits
        return FORMS[self.form](loss=loss, logits=logits, hidden=(x,))


def data(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x, x[:, :3].argmax(1)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "spectral": SpectralNewton,
    "spectral, online": lambda net: SpectralNewton(
        net, coordinates=PowerLaw("online", online=OnlineExponent(every=2, directions=3))
    ),
    "kronecker": KroneckerNewton,
    "banded": BandedNewton,
    "newton-cg": lambda net: NewtonCG(net, curvature="ggn"),
    "escape": lambda net: SaddleEscape(SGD(net.parameters(), lr=0.1), model=net),
    "boost": lambda net: NullBoost(SGD(net.parameters(), lr=0.1), model=net, every=2, krylov=4),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_closure_may_return_the_networks_output(kind: str, form: str, backward: bool) -> None:
    plain, labelled = Labelled("tensor"), Labelled(form)
    optimizers = [OPTIMIZERS[kind](net) for net in (plain, labelled)]
    for seed in range(3):
        x, y = data(seed)

        def pair() -> tuple[Tensor, Tensor]:
            z = plain(x)  # noqa: B023
            loss = functional.cross_entropy(z, y)  # noqa: B023
            if backward:
                optimizers[0].zero_grad()
                loss.backward()
            return loss, z

        def whole() -> Any:
            found = labelled(x, y)  # noqa: B023
            if backward:
                optimizers[1].zero_grad()
                (found["loss"] if isinstance(found, dict) else found.loss).backward()
            return found

        losses = [optimizer.step(closure) for optimizer, closure in zip(optimizers, (pair, whole), strict=True)]  # type: ignore[arg-type]
        assert float(losses[0]) == float(losses[1])  # type: ignore[arg-type]
        assert all(map(torch.equal, plain.parameters(), labelled.parameters()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["spectral", "kronecker"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_loss_by_name_is_that_of_the_logits(kind: str, form: str, inside: bool) -> None:
    """Whether the network computes it, or the loop from ``output.logits``."""
    nets = [Labelled("tensor"), Labelled(form)]
    make: Any = SpectralNewton if kind == "spectral" else KroneckerNewton
    optimizers = [make(net, loss="cross_entropy") for net in nets]
    for seed in range(3):
        x, y = data(seed)
        found = nets[1](x, y if inside else None)
        read = found.__getitem__ if isinstance(found, dict) else lambda name, found=found: getattr(found, name)
        losses = [
            functional.cross_entropy(nets[0](x), y),
            read("loss") if inside else functional.cross_entropy(read("logits"), y),
        ]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize("form", FORMS)
def test_empirical_curvature_sees_the_loss_in_the_output(form: str) -> None:
    nets = [Labelled(form), Labelled(form)]
    optimizers = [
        KroneckerNewton(net, curvature="empirical", averages=KroneckerAveraging(factor_every=1)) for net in nets
    ]
    for seed in range(2):
        for scale, net, optimizer in zip((1.0, 0.25), nets, optimizers, strict=True):
            found = net(*data(seed))
            optimizer.zero_grad()
            (scale * (found["loss"] if isinstance(found, dict) else found.loss)).backward()
            for p in net.parameters():
                assert p.grad is not None
                p.grad /= scale
            optimizer.step()
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


class Spans(nn.Module):
    """Two heads, as of question answering: there is no one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        start, end = self.body(x).split(3, dim=1)
        loss = functional.cross_entropy(start, labels) + functional.cross_entropy(end, labels)
        return ModelOutput(loss=loss, start_logits=start, end_logits=end)


def unlabelled(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    return net(x)


def labelled(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    return net(x, y)


def copied(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    found = net(x, y)
    found.logits = found.logits.clone()
    return found


def detached(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    found = net(x, y)
    found.logits = found.logits.detach()
    return found


@pytest.mark.parametrize("make", [SpectralNewton, KroneckerNewton])
@pytest.mark.parametrize(
    ("net", "result", "says"),
    [
        (Labelled, unlabelled, r"has `logits` and no `loss`: give the network its labels"),
        (Labelled, copied, r"not computed from the output.*copy"),
        (Labelled, detached, r"no autograd tape.*detach"),
        (Spans, labelled, r"neither a tensor nor an object with a tensor `logits`.*`\(loss, output\)`"),
    ],
)
def test_what_closures_return_and_is_not_clear_is_named(make: Any, net: Any, result: Any, says: str) -> None:
    model = net("dataclass") if net is Labelled else net().to(F64)
    optimizer = make(model)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ClosureError, match=says):
        optimizer.step(lambda: result(model, *data(0)))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [SpectralNewton, KroneckerNewton])
def test_a_declared_loss_of_an_unclear_output_is_refused(make: Any) -> None:
    spans, sequences = Spans().to(F64), Labelled("ModelOutput")
    x = torch.randn(2, 5, 4, dtype=F64)
    y = torch.zeros(2, 5, dtype=torch.int64)
    cases: list[tuple[nn.Module, Tensor, Tensor, str]] = [
        (spans, x[:, 0], y[:, 0], "returns ModelOutput, which is neither a tensor nor has a tensor `logits`"),
        (sequences, x, y, r"`logits` are of shape \(2, 5, 3\).*class_dim=-1"),
    ]
    for net, inputs, labels, says in cases:
        optimizer = make(net, loss="cross_entropy")
        before = copy.deepcopy(net.state_dict())
        net(inputs, labels).loss.backward()
        with pytest.raises(ModelError, match=says):
            optimizer.step()
        assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    optimizer = make(sequences, loss=NamedLoss("cross_entropy", class_dim=-1))
    before = copy.deepcopy(sequences.state_dict())
    sequences(x, y).loss.backward()
    optimizer.step()
    assert not any(torch.equal(before[name], t) for name, t in sequences.state_dict().items())


def test_a_closure_that_calls_backward_may_return_a_dict_of_anything() -> None:
    net = Labelled("dict")
    optimizer = SpectralNewton(net)
    for result in ({"loss": 0.5}, {"accuracy": 1}, Output()):

        def closure() -> Any:
            optimizer.zero_grad()
            net(*data(0))["loss"].backward()
            return result  # noqa: B023

        loss = optimizer.step(closure)
        assert loss is not None
        assert loss != 0.5
