"""Gathering and running averages by themselves: against dense second moments, and their states."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from hessopt import KroneckerAveraging, KroneckerDamping, NamedLoss
from hessopt.averages.gathering import Batch, Gathering
from hessopt.averages.running import Pending, RunningAverages, Taper, no_pairs
from hessopt.kronecker.damped_inverse import DampedInverse
from hessopt.kronecker.taper import BandTaper
from tests.conformity.checks import same_state
from tests.helpers.kronecker_reference import kronecker_band

EXACT = KroneckerAveraging(columns="exact", decay=0.7)


class Scaled(nn.Sequential):
    """Layers, and a parameter that has no rule."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)  # type: ignore[no-any-return]


def network(width: int = 5) -> Scaled:
    torch.manual_seed(0)
    return Scaled(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (7,), generator=generator)


def build(net: nn.Module, taper: Taper = no_pairs, curvature: Any = "ggn", loss: Any = "cross_entropy") -> Any:
    options = EXACT if curvature == "ggn" else KroneckerAveraging(decay=0.7)
    gathering: Gathering[Pending] = Gathering(net, net.parameters(), curvature, NamedLoss(loss), options)
    return RunningAverages(gathering, options.decay, taper)


def update(averages: RunningAverages, seed: int) -> None:
    """As a step does, and with the next batch due."""
    (x, y), gathering = data(seed), averages.gathering
    gathering.model.zero_grad()
    functional.cross_entropy(gathering.model(x), y).backward()
    averages.commit([p.grad for p in gathering.parameters])
    gathering.start()


def second_moments(net: Scaled, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """A and G of every linear layer and the diagonal of ``scale``, for the mean cross-entropy, from dense Jacobians."""
    layers = list(net)
    before = nn.Sequential(*layers)(x).detach()
    p = (net.scale * before).detach().softmax(1)
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(x)
    found = []
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            head, tail = nn.Sequential(*layers[:i]), nn.Sequential(*layers[i + 1 :])
            inputs = head(x).detach()

            def rest(outputs: Tensor, tail: nn.Module = tail) -> Tensor:
                found: Tensor = net.scale * tail(outputs)
                return found

            j = torch.func.vmap(torch.func.jacrev(rest))(layer(inputs).detach()).detach()
            rows = torch.cat([inputs, inputs.new_ones(len(x), 1)], 1)
            found.append((rows.mT @ rows / len(x), torch.einsum("bik,bij,bjl->kl", j, hessian, j)))
    return found, (hessian.diagonal(dim1=1, dim2=2) * before.square()).sum(0)


def test_without_a_band_the_averages_are_dense_second_moments() -> None:
    """Two batches of equal weight."""
    net = network()
    averages = build(net)
    for seed in (0, 1):
        update(averages, seed)
    expected = [second_moments(net, data(seed)[0])[0] for seed in (0, 1)]
    assert not averages.factors.pairs
    for place, (first, second) in zip(averages.factors.place, zip(*expected, strict=True), strict=True):
        stack = averages.factors.stacks[place[0]]
        for found, one, other in zip(stack.factors, first, second, strict=True):
            assert torch.allclose(found[place[1]], (one + other) / 2, rtol=1e-10, atol=1e-14)


def test_the_diagonal_of_one_sample_is_that_of_the_curvature() -> None:
    net = network()
    averages, x = build(net), data(0)[0][:1]
    functional.cross_entropy(net(x), torch.tensor([1])).backward()
    averages.commit()
    assert list(averages.diagonals) == [net.scale]
    assert torch.allclose(averages.diagonals[net.scale], second_moments(net, x)[1], rtol=1e-10)


def test_pairs_are_those_of_any_taper() -> None:
    """Cross factors of the first and the last layer alone."""

    def ends(distances: Any) -> Any:
        taper = np.eye(len(distances))
        taper[0, -1] = taper[-1, 0] = 0.5
        return taper

    net = network()
    averages = build(net, ends)
    update(averages, 0)
    (pairs,) = averages.factors.pairs
    x = data(0)[0]
    left, right = x, nn.Sequential(*list(net)[:4])(x).detach()
    ones = x.new_ones(len(x), 1)
    assert pairs.blocks == [(0, 2)]
    expected = torch.cat([left, ones], 1).mT @ torch.cat([right, ones], 1) / len(x)
    assert torch.allclose(pairs.inputs[0], expected, rtol=1e-12)


class Taker:
    """Keeps the rows of the last batch."""

    rows: Any = None

    def take(self, batch: Batch, before: str | None) -> str:
        assert before is None
        self.rows = batch
        return "made"


def test_gathering_hands_its_batches_to_anyone() -> None:
    net, taker = network(), Taker()
    gathering: Gathering[str] = Gathering(net, net.parameters(), "ggn", NamedLoss("cross_entropy"), EXACT)
    gathering.hand_to(taker.take)
    x, y = data(0)
    loss = functional.cross_entropy(net(x), y)
    assert gathering.waits
    loss.backward()
    assert not gathering.waits
    batch = taker.rows
    rows = gathering.rows(batch, gram=False)
    assert [row.inputs.shape for row in rows if row is not None] == [(1, 7, 1, n + 1) for n in (4, 5, 4)]
    assert set(batch.squares) == {net.scale} == set(gathering.others)
    assert batch.samples == 7
    p = net(x).detach().softmax(1)
    assert torch.allclose(batch.scale, (1 - p.square().sum(1)).mean(), rtol=1e-12)
    assert gathering.release() == "made"
    assert gathering.release() is None
    del taker, batch
    net(x).sum().backward()  # whom it was for is gone
    assert gathering.release() is None
    gathering.detach()


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("taper", [no_pairs, BandTaper(1)], ids=["no pairs", "bandwidth 1"])
@pytest.mark.parametrize("updates", [0, 1, 3])
def test_states_of_their_own_are_taken_up_bit_for_bit(taper: Taper, updates: int) -> None:
    net = network()
    averages, probe = build(net, taper, "fisher"), BandTaper(2)
    for seed in range(updates):
        update(averages, seed)
        if averages.probe is None:
            averages.open_probe(probe)
    twin = copy.deepcopy(net)
    other = build(twin, taper, "fisher")
    other.load_state_dict(through_file(averages.state_dict()), probe)
    other.gathering.load_state_dict(through_file(averages.gathering.state_dict()))
    assert same_state(averages.state_dict(), other.state_dict())
    for seed in (5, 6):
        update(averages, seed)
        update(other, seed)
    assert same_state(averages.state_dict(), other.state_dict())
    assert (averages.probe is not None) == (other.probe is not None) == (updates > 0)


def lacking(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)


def change(name: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: value(state[name])})


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        name: (lacking(name), f"lacks '{name}'")
        for name in ("updates", "scale", "called", "distances", "rows", "factors", "diagonals", "probing", "probe")
    },
    "no cross factors": (lacking("cross"), "lacks the factor A between '0' and '2'"),
    "another shape": (change("factors", lambda t: [t[0][..., :-1], *t[1:]]), "the factor A of '0'"),
    "one factor less": (change("factors", lambda t: t[:-1]), "lacks the factor G of '4'"),
    "one factor more": (change("factors", lambda t: [*t, t[0]]), "has averages of more layers"),
    "a layer too many": (change("called", lambda c: [*c, 3]), r"the layers number \[0, 1, 2, 3\]"),
    "another diagonal": (change("diagonals", lambda t: [t[0][:-1]]), "the diagonal of parameter 'scale'"),
    "another number of layers": (change("distances", lambda d: d[:-1]), "the distances of layers"),
    "another probe": (change("probe", lambda p: {**p, "factors": p["factors"][:-1]}), "lacks the probing factor G"),
    "half a probe": (change("probe", lambda p: {"factors": p["factors"]}), "lacks 'last' of its probe"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_refused_state_changes_nothing(case: str) -> None:
    damage, message = DAMAGE[case]
    net = network()
    averages = build(net, BandTaper(1))
    other = build(copy.deepcopy(net), BandTaper(1))
    for one in (averages, other):
        for seed in (0, 1):
            update(one, seed)
            one.open_probe(BandTaper(2))
    update(other, 2)
    state = other.state_dict()
    damage(state)
    before = copy.deepcopy(averages.state_dict())
    kept = [id(t) for t in tree_leaves([averages.factors.tensors, averages.probe.factors.tensors])]
    with pytest.raises(ValueError, match=f"{message}.*Nothing was loaded"):
        averages.load_state_dict(state, BandTaper(2))
    assert same_state(averages.state_dict(), before)
    assert kept == [id(t) for t in tree_leaves([averages.factors.tensors, averages.probe.factors.tensors])]


def test_states_of_other_widths_and_of_a_choice() -> None:
    averages, wider = build(network()), build(network(6))
    for one in (averages, wider):
        update(one, 0)
    with pytest.raises(ValueError, match=r"the factor G of '0' is \(1, 6, 6\) and must be \(1, 5, 5\)"):
        averages.load_state_dict(wider.state_dict())
    other = build(network())
    other.open_probe(no_pairs)
    update(other, 0)
    with pytest.raises(ValueError, match="other pairs of layers, for a choice"):
        averages.load_state_dict(other.state_dict())


@pytest.mark.parametrize("taper", [no_pairs, BandTaper(1)], ids=["no pairs", "bandwidth 1"])
def test_the_state_of_the_inverse(taper: Taper) -> None:
    net = network()
    averages = build(net, taper)
    update(averages, 0)
    gradients = [torch.ones_like(p) for p in averages.gathering.parameters]
    inverse, other = (DampedInverse(averages, KroneckerDamping(damping), 3) for damping in (0.1, 0.3))
    inverse.refresh()
    update(averages, 1)  # the inverse is of the averages as they were
    other.load_state_dict(through_file(inverse.state_dict()))
    assert other.damping == 0.1
    assert other.factored.ready
    for a, b in zip(inverse.solve(gradients).steps, other.solve(gradients).steps, strict=True):
        assert torch.equal(a, b)
    before = copy.deepcopy(other.state_dict())
    state = inverse.state_dict()
    with pytest.raises(ValueError, match="lacks 'ready' of its inverse"):
        other.load_state_dict({name: value for name, value in state.items() if name != "ready"})
    with pytest.raises(ValueError, match="lacks the inverse factor G of '4'"):
        other.load_state_dict({**state, "inverses": state["inverses"][:-1], "damping": 7.0})
    assert same_state(other.state_dict(), before)


def test_the_least_damping_is_in_the_units_of_the_loss() -> None:
    """In units of layers; also of the inverse that the first step makes."""
    averages = build(network(), loss="mse")
    update(averages, 0)
    inverse = DampedInverse(averages, KroneckerDamping(0.1, "layer"), 3)
    assert averages.scale == pytest.approx(2.0)
    assert inverse.absolute_damping.floor == pytest.approx(30 * torch.finfo(torch.float64).eps * 2.0)
    empirical = build(network(), curvature="empirical")
    update(empirical, 0)
    assert DampedInverse(empirical, KroneckerDamping(0.1, "layer"), 3).absolute_damping.floor == 0.0


@pytest.mark.parametrize("part", ["gathering", "averages", "inverse"])
def test_a_band_takes_up_all_three_states_or_none(part: str) -> None:
    x, y = data(0)
    bands = [kronecker_band(network(), 1, loss="cross_entropy") for _ in range(2)]
    for band, count in zip(bands, (1, 3), strict=True):
        for _ in range(count):
            functional.cross_entropy(band.gathering.model(x), y).backward()
            band.direction([p.grad for p in band.parameters])
    state, before = bands[1].state_dict(), copy.deepcopy(bands[0].state_dict())
    name = {"gathering": "generator", "averages": "factors", "inverse": "inverses"}[part]
    del state[part][name]
    with pytest.raises(ValueError, match=f"lacks '{name}' of its {part}.*Nothing was loaded"):
        bands[0].load_state_dict(state)
    assert same_state(bands[0].state_dict(), before)
