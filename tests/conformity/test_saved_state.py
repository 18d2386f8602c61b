"""A state is taken up bit for bit or refused, and a refusal changes nothing: of every optimizer of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from hessopt import (
    BandedNewton,
    KroneckerAveraging,
    KroneckerBandwidth,
    KroneckerNewton,
    LeastSquares,
    NewtonCG,
    NullBoost,
    NullProject,
    OnlineExponent,
    PowerLaw,
    Rows,
    SaddleEscape,
    SpectralNewton,
)
from tests.conformity.checks import same_state

AVERAGES = KroneckerAveraging(factor_every=2, inverse_every=3)


def _kronecker(net: nn.Module, bandwidth: Any, **kwargs: Any) -> Optimizer:
    return KroneckerNewton(net, bandwidth=bandwidth, loss="cross_entropy", averages=AVERAGES, **kwargs)


def _projected(net: nn.Module) -> Optimizer:
    size = sum(p.numel() for p in net.parameters())
    basis = torch.randn(size, 2, generator=torch.Generator().manual_seed(0))
    return NullProject(AdamW(net.parameters(), lr=0.1), basis, model=net)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "NewtonCG": NewtonCG,
    "NewtonCG(all that is kept)": lambda net: NewtonCG(net, warm_start=True, preconditioner="diagonal"),
    "BandedNewton": BandedNewton,
    "BandedNewton(momentum)": lambda net: BandedNewton(net, momentum=0.5, bandwidth=1),
    "BandedNewton(rows)": lambda net: BandedNewton(net, rows=Rows([20, 12], first=6, every=2)),
    "KroneckerNewton(0)": lambda net: _kronecker(net, 0),
    "KroneckerNewton(1)": lambda net: _kronecker(net, 1),
    "KroneckerNewton(auto)": lambda net: _kronecker(net, KroneckerBandwidth(6)),
    "SpectralNewton": lambda net: SpectralNewton(net, "cross_entropy"),
    "SpectralNewton(closure)": SpectralNewton,
    "SpectralNewton(accumulate)": lambda net: SpectralNewton(net, "cross_entropy", accumulate=2),
    "SpectralNewton(power law)": lambda net: SpectralNewton(net, coordinates=PowerLaw()),
    "SpectralNewton(online)": lambda net: SpectralNewton(
        net, coordinates=PowerLaw("online", online=OnlineExponent(every=2))
    ),
    "SaddleEscape(SGD)": lambda net: SaddleEscape(SGD(net.parameters(), lr=0.1), model=net),
    "SaddleEscape(NewtonCG)": lambda net: SaddleEscape(NewtonCG(net), model=net, directions=2),
    "NullBoost(AdamW)": lambda net: NullBoost(AdamW(net.parameters()), every=3, model=net),
    "NullProject(AdamW)": _projected,
    "NullProject(kronecker)": lambda net: NullProject(_kronecker(net, 1), model=net),
    "NullProject(SaddleEscape(SGD))": lambda net: NullProject(SaddleEscape(SGD(net.parameters(), lr=0.1))),
}

GROWS = ("KroneckerNewton(1)", "KroneckerNewton(auto)", "NullProject(kronecker)", "NullBoost(AdamW)")
"""What they keep has a shape that only a step tells."""


PLAIN: dict[str, Callable[..., Optimizer]] = {"AdamW": AdamW, "SGD": SGD}


def network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3), nn.LayerNorm(3))


def steps(net: nn.Module, optimizer: Optimizer, count: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    def on_rows(rows: Tensor) -> LeastSquares:
        return LeastSquares((net(x[rows]) - y[rows, None]) / 32**0.5)

    drawn = isinstance(optimizer, BandedNewton) and optimizer.rows is not None
    for _ in range(count):
        optimizer.step(on_rows if drawn else closure)


def stepped(name: str, width: int = 8, count: int = 4) -> tuple[nn.Module, Optimizer]:
    net = network(width)
    optimizer = OPTIMIZERS[name](net)
    steps(net, optimizer, count)
    return net, optimizer


@cache
def saved(name: str, count: int) -> dict[str, Any]:
    if name not in PLAIN:
        return stepped(name, count=count)[1].state_dict()
    net = network()
    optimizer = PLAIN[name](net.parameters(), lr=0.1)
    steps(net, optimizer, count)
    return optimizer.state_dict()


def go_on_alike(first: tuple[nn.Module, Optimizer], second: tuple[nn.Module, Optimizer]) -> None:
    for pair in (first, second):
        steps(*pair)
    assert all(map(torch.equal, first[0].parameters(), second[0].parameters()))
    assert same_state(first[1].state_dict(), second[1].state_dict())


def entries(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all that a step's state has by name."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield (*path, key)
            yield from entries(value, (*path, key))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_good_state_is_taken_up_bit_for_bit(name: str) -> None:
    first = stepped(name)
    net = copy.deepcopy(first[0])
    resumed = OPTIMIZERS[name](net)
    resumed.load_state_dict(copy.deepcopy(first[1].state_dict()))
    assert same_state(first[1].state_dict(), resumed.state_dict())
    go_on_alike(first, (net, resumed))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_before_the_first_step_is_that_of_a_new_optimizer(name: str) -> None:
    net, other = network(), network()
    fresh, resumed = OPTIMIZERS[name](net), OPTIMIZERS[name](other)
    resumed.load_state_dict(copy.deepcopy(fresh.state_dict()))
    go_on_alike((net, OPTIMIZERS[name](net)), (other, resumed))


def _refused(name: str, state: dict[str, Any], *words: str) -> None:
    """The state; and the only difference from a run without it is the error."""
    net, optimizer = stepped(name)
    copied, undisturbed = copy.deepcopy((net, optimizer))
    with pytest.raises(ValueError, match=r"Nothing (was|is) loaded") as error:
        optimizer.load_state_dict(state)
    for word in words:
        assert word in str(error.value)
    assert same_state(optimizer.state_dict(), undisturbed.state_dict())
    go_on_alike((net, optimizer), (copied, undisturbed))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_another_network_is_refused(name: str) -> None:
    _refused(name, stepped(name, width=9)[1].state_dict(), "(9, 6)", "(8, 6)")


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("other", [*PLAIN, *OPTIMIZERS])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused(name: str, other: str, count: int) -> None:
    if name.partition("(")[0] == other.partition("(")[0]:
        pytest.skip("the same optimizer")
    own = OPTIMIZERS[name](network())
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match=r"Nothing (was|is) loaded"):
        own.load_state_dict(saved(other, count))
    assert same_state(own.state_dict(), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_is_missing_is_named(name: str) -> None:
    _, optimizer = stepped(name)
    whole = optimizer.state_dict()
    for number, own in whole["state"].items():
        incomplete = copy.deepcopy(whole)
        del incomplete["state"][number]
        with pytest.raises(ValueError, match=f"parameter (')?({list(network().state_dict())[number]}|{number} of)"):
            optimizer.load_state_dict(incomplete)
        for key in own:
            if key not in own.get("kept", own):  # blank, or says what is not
                continue
            incomplete = copy.deepcopy(whole)
            del incomplete["state"][number][key]
            with pytest.raises(ValueError, match=f"lacks '{key}'"):
                optimizer.load_state_dict(incomplete)
    assert same_state(optimizer.state_dict(), whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_post_hooks_see_the_whole_state(name: str) -> None:
    _, optimizer = stepped(name)
    whole, seen = optimizer.state_dict(), []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(set(entries(state))))
    optimizer.state_dict()
    assert seen == [set(entries(whole))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pre_hooks_may_mend_a_state(name: str) -> None:
    first = stepped(name)
    net = copy.deepcopy(first[0])
    resumed = OPTIMIZERS[name](net)
    good = copy.deepcopy(first[1].state_dict())
    resumed.register_load_state_dict_pre_hook(lambda *_: good)
    resumed.load_state_dict({"state": {}, "param_groups": []})
    go_on_alike(first, (net, resumed))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_distributed_state_dicts_are_taken_up_bit_for_bit(name: str, full: bool) -> None:
    if full and name not in ("SpectralNewton(power law)", "SpectralNewton(online)"):
        pytest.skip("full state dicts are of sharded parameters, which the others refuse")
    first = stepped(name)
    options = StateDictOptions(full_state_dict=full)
    state = copy.deepcopy(get_optimizer_state_dict(first[0], first[1], options=options))
    net = copy.deepcopy(first[0])
    resumed = OPTIMIZERS[name](net)
    set_optimizer_state_dict(net, resumed, state, options=options)
    go_on_alike(first, (net, resumed))


# of the package itself, where no process group is initialised
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_distributed_checkpoints_are_taken_up_bit_for_bit(name: str, tmp_path: Path) -> None:
    first = stepped(name)
    dcp.save({"optimizer": get_optimizer_state_dict(*first)}, checkpoint_id=tmp_path)
    net = copy.deepcopy(first[0])
    resumed = OPTIMIZERS[name](net)

    def load() -> None:
        state = {"optimizer": get_optimizer_state_dict(net, resumed)}
        dcp.load(state, checkpoint_id=tmp_path)
        set_optimizer_state_dict(net, resumed, state["optimizer"])

    if name in GROWS:
        with pytest.raises(ValueError, match="lacks"):  # not dropped in silence
            load()
        steps(net, resumed, 4)
        net.load_state_dict(first[0].state_dict())
    load()
    go_on_alike(first, (net, resumed))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_state_dicts_lose_nothing_in_silence(name: str) -> None:
    first = stepped(name)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    net = copy.deepcopy(first[0])
    resumed = OPTIMIZERS[name](net)
    if name in ("SpectralNewton(power law)", "SpectralNewton(online)"):
        state = copy.deepcopy(get_optimizer_state_dict(*first, options=options))
        set_optimizer_state_dict(net, resumed, state, options=options)
        go_on_alike(first, (net, resumed))
    else:
        with pytest.raises(NotImplementedError, match="only supports"):
            get_optimizer_state_dict(*first, options=options)
