"""Micro-batches whose gradients are accumulated are one large batch: of steps, factors, and of what is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hessopt import KroneckerAveraging, KroneckerCoordinates, NamedLoss, SpectralNewton
from hessopt.averages.gathering import Gathering
from hessopt.averages.running import Pending, RunningAverages
from hessopt.errors import ClosureError, ModelError, NotConvexError
from hessopt.kronecker.taper import BandTaper
from tests.conformity.checks import same_state

F64 = torch.float64
EXACT = KroneckerCoordinates(averages=KroneckerAveraging(0.95, factor_every=2, inverse_every=3, columns="exact"))


class Network(nn.Module):
    """A convolution, a layer that is called twice, a normalisation, and layers of unlike shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.LayerNorm(3)
        self.again = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4)
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).tanh().mean((2, 3)))
        z: Tensor = self.head(self.again(self.again(h).tanh()).tanh())
        return z


def pair(loss: Any) -> tuple[nn.Module, nn.Module, SpectralNewton, SpectralNewton]:
    """Two networks that are equal, and the optimizers of the one that sees large batches and of the other."""
    nets = Network(), Network()
    optimizers = [
        SpectralNewton(net, loss, coordinates=EXACT, accumulate=n) for net, n in zip(nets, (1, 3), strict=True)
    ]
    return *nets, *optimizers  # type: ignore[return-value]


def batches(step: int, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    xs = [torch.randn(size, 2, 4, 4, generator=generator, dtype=F64) for size in sizes]
    return [(x, x.flatten(1)[:, :4].argmax(1)) for x in xs]


def whole(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def state(optimizer: SpectralNewton) -> list[Tensor]:
    """Factors, their powers, the curvature between layers, momentum and parameters."""
    engine = optimizer._engine  # type: ignore[attr-defined]
    found = [t for key in ("powers", "coarse") for t in engine.state_dict()[key]]
    factors = engine.averages.factors.tensors[:: 2 if engine.inputs_only else 1]
    return [*found, *factors, engine._layers.momentum, *engine.parameters]


def assert_alike(one: SpectralNewton, other: SpectralNewton) -> None:
    for a, b in zip(state(one), state(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


LOSSES: dict[str, Any] = {
    "name": "cross_entropy",
    "sum": NamedLoss("cross_entropy", "sum"),
    "module": nn.CrossEntropyLoss(),
    "module, sum": nn.CrossEntropyLoss(reduction="sum"),
    "smooth": nn.CrossEntropyLoss(label_smoothing=0.1),
    "none": None,
}


@pytest.mark.parametrize("passes", [3, 2])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_steps_are_those_of_one_large_batch(kind: str, passes: int) -> None:
    """Of fewer passes than were announced, those of one with the factor that their sum has."""
    loss = LOSSES[kind]
    criterion: Any = loss
    if not isinstance(loss, nn.Module):
        criterion = nn.CrossEntropyLoss(reduction=getattr(loss, "reduction", "mean"))
    net, other, large, small = pair(loss)
    for step in range(7):
        parts = batches(step, (5,) * passes)
        x, y = whole(parts)
        large.zero_grad()
        (criterion(net(x), y) * ((1 if "sum" in kind else passes) / 3)).backward()
        large.step()
        small.zero_grad()
        for x, y in parts:
            (criterion(other(x), y) / 3).backward()
        small.step()
        assert_alike(large, small)


@pytest.mark.parametrize("sizes", [(7, 4, 2), (3, 9)])
def test_a_loss_module_is_seen_with_its_factor(sizes: tuple[int, ...]) -> None:
    """So micro-batches may differ in size, and an accumulation may be of fewer; a scaler's factor is no difference."""
    criterion = nn.CrossEntropyLoss()
    net, other, large, small = pair(criterion)
    for step in range(5):
        parts = batches(step, sizes)
        x, y = whole(parts)
        large.zero_grad()
        criterion(net(x), y).backward()
        large.step()
        small.zero_grad()
        for x, y in parts:
            (512 * len(x) / sum(sizes) * criterion(other(x), y)).backward()
        for p in other.parameters():
            assert p.grad is not None
            p.grad /= 512
        small.step()
        assert_alike(large, small)


@pytest.mark.parametrize("kind", ["declared", "three calls of backward", "one call of backward", "none"])
def test_closures_may_accumulate(kind: str) -> None:
    net, other, large, small = pair("cross_entropy" if kind == "declared" else None)
    for step in range(5):
        parts = batches(step, (5, 5, 5))
        x, y = whole(parts)
        large.step(lambda: functional.cross_entropy(net(x), y))  # noqa: B023

        def closure() -> Tensor:
            small.zero_grad()
            losses = [functional.cross_entropy(other(x), y) / 3 for x, y in parts]  # noqa: B023
            if kind in ("declared", "three calls of backward"):
                for part in losses:
                    part.backward()
            total = torch.stack(losses).sum()
            if kind == "one call of backward":
                total.backward()
            return total

        small.step(closure)
        assert_alike(large, small)


def test_a_closure_with_more_calls_than_accumulate_is_refused() -> None:
    net = Network()
    optimizer = SpectralNewton(net, accumulate=2)
    before = copy.deepcopy(net.state_dict())
    parts = batches(0, (2, 2, 2))
    with pytest.raises(ClosureError, match=r"called the module 3 times, with accumulate=2"):
        optimizer.step(lambda: torch.stack([functional.cross_entropy(net(x), y) for x, y in parts]).sum())
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_an_error_in_the_second_micro_batch_of_a_closure_leaves_everything() -> None:
    """Draws for the first one included."""
    net = Network()
    coordinates = KroneckerCoordinates(averages=KroneckerAveraging(0.95, factor_every=1))
    optimizer = SpectralNewton(net, coordinates=coordinates, accumulate=2)

    def closure(sign: int) -> Tensor:
        (x, y), (u, v) = batches(0, (5, 5))
        return functional.cross_entropy(net(x), y) + sign * functional.cross_entropy(net(u), v)

    for _ in range(2):
        optimizer.step(lambda: closure(1))
    before, parameters = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(list(net.parameters()))
    with pytest.raises(NotConvexError):
        optimizer.step(lambda: closure(-1))
    assert same_state(before, optimizer.state_dict())
    assert all(map(torch.equal, parameters, net.parameters()))


def test_of_more_passes_the_first_ones_count() -> None:
    """As far as curvature is concerned; the gradient is that of all."""
    nets = [Network(), Network()]
    one, other = (SpectralNewton(net, "cross_entropy", coordinates=EXACT, accumulate=2) for net in nets)
    for net, optimizer, wanted in zip(nets, (one, other), (2, 3), strict=True):
        for number, (x, y) in enumerate(batches(0, (5, 5, 5))):
            part = functional.cross_entropy(net(x), y) / 3
            if number < wanted:
                part.backward()
            else:  # where nothing is seen of it
                slopes = torch.autograd.grad(part, list(net.parameters()))
                for p, slope in zip(net.parameters(), slopes, strict=True):
                    p.grad += slope
        optimizer.step()
    assert_alike(one, other)


def test_passes_that_were_dropped_leave_no_trace() -> None:
    nets = [Network(), Network()]
    plain, disturbed = (SpectralNewton(net, "cross_entropy", accumulate=2) for net in nets)
    for step in range(6):
        parts = batches(step, (5, 5))
        for x, y in batches(100 + step, (4,) * (1 + step % 3)):
            functional.cross_entropy(nets[1](x), y).backward()
        for net, optimizer in zip(nets, (plain, disturbed), strict=True):
            optimizer.zero_grad()
            for x, y in parts:
                (functional.cross_entropy(net(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, state(plain), state(disturbed)))


def test_an_error_in_any_pass_is_that_of_the_step() -> None:
    net = Network()
    optimizer = SpectralNewton(net, "cross_entropy", accumulate=3)
    before = copy.deepcopy(net.state_dict())
    for number, (x, y) in enumerate(batches(0, (5, 5, 5))):
        z = net(x)
        loss = functional.cross_entropy(z.sub_(1) if number == 1 else z, y) / 3
        loss.backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    with pytest.raises(ModelError, match="changed in place"):
        optimizer.step()
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, net.parameters(), strict=True) if p.grad is not None)


def test_clipping_acts_on_the_gradient_and_on_nothing_else() -> None:
    """The clipped step is that with the gradient that much smaller; the averages are the same."""
    nets = [Network(), Network(), Network()]
    clipped, scaled, plain = (SpectralNewton(net, "cross_entropy", coordinates=EXACT, accumulate=2) for net in nets)
    for step in range(4):
        for net, optimizer in zip(nets, (clipped, scaled, plain), strict=True):
            optimizer.zero_grad()
            for x, y in batches(step, (5, 5)):
                (functional.cross_entropy(net(x), y) / 2).backward()
        norm = nn.utils.clip_grad_norm_(nets[0].parameters(), 1e-2)
        assert norm > 1e-2
        for p in nets[1].parameters():
            assert p.grad is not None
            p.grad *= 1e-2 / (norm + 1e-6)
        for optimizer in (clipped, scaled, plain):
            optimizer.step()
        assert_alike(clipped, scaled)
        if step == 0:
            factors = [o._engine.averages.factors.tensors for o in (clipped, plain)]  # type: ignore[attr-defined]
            assert all(map(torch.equal, *factors))
            assert not any(map(torch.equal, nets[0].parameters(), nets[2].parameters()))


class Words(nn.Module):
    """Every kind of block: an embedding, a normalisation, linear layers on positions and on samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 3, padding_idx=0)
        self.mix = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.optional = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.to(F64)

    def forward(self, x: Tensor, optional: bool = True) -> Tensor:
        h = self.norm(self.mix(self.embedding(x)).tanh()).mean(1)
        z: Tensor = self.head(self.optional(h).tanh() if optional else h)
        return z


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bandwidth", [0, 1, "full"])
def test_averages_of_every_kind_of_block_and_of_pairs_are_those_of_one_batch(reduction: Any, bandwidth: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 5, (12, 3), generator=generator), torch.randn(12, 2, generator=generator, dtype=F64)
    found = []
    for sizes in ((12,), (4, 4, 4)):
        net = Words()
        options = KroneckerAveraging(columns="exact", accumulate=len(sizes))
        loss = NamedLoss("mse", reduction)
        gathering: Gathering[Pending] = Gathering(net, net.parameters(), "ggn", loss, options)
        averages = RunningAverages(gathering, 0.9, BandTaper(bandwidth))
        for _ in range(2):
            net.zero_grad()
            for u, v in zip(x.split(sizes), y.split(sizes), strict=True):
                (functional.mse_loss(net(u), v, reduction=reduction) / len(sizes)).backward()
            averages.commit([p.grad for p in gathering.parameters])
            gathering.start()
        assert averages.factors is not None
        found.append([*averages.factors.tensors, *averages.diagonals.values(), torch.tensor(averages.scale)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_some_micro_batches_leave_out_has_the_factors_of_the_others(first: bool) -> None:
    net = Words()
    options = KroneckerAveraging(columns="exact", accumulate=2)
    gathering: Gathering[Pending] = Gathering(net, net.parameters(), "ggn", NamedLoss("mse"), options)
    averages = RunningAverages(gathering, 0.9, BandTaper(1))
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 5, (8, 3), generator=generator)
    seen: list[Tensor] = []
    net.optional.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    for u, optional in zip(x.split((3, 5)), (not first, first), strict=True):
        (net(u, optional).square().mean() / 2).backward()
    averages.commit([p.grad for p in gathering.parameters])
    assert averages.factors is not None
    number = [block.name for block in averages.factors.blocks].index("optional")
    stack, start = averages.factors.place[number]
    rows = torch.cat([seen[0], seen[0].new_ones(len(seen[0]), 1)], 1)
    assert len(seen) == 1
    torch.testing.assert_close(
        averages.factors.stacks[stack].inputs[start], rows.mT @ rows / len(rows), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("accumulate", [0, 2.0, True])
def test_accumulate_must_be_a_count(accumulate: Any) -> None:
    with pytest.raises(ValueError, match="accumulate must be an integer of at least 1"):
        SpectralNewton(Network(), "cross_entropy", accumulate=accumulate)


def test_accumulate_has_one_place() -> None:
    with pytest.raises(ValueError, match=r"SpectralNewton\(…, accumulate=n\)"):
        KroneckerCoordinates(averages=KroneckerAveraging(accumulate=2))
