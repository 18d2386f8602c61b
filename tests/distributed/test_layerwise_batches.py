"""Batches of several processes that are uneven, empty or not finite, and processes that do not train together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import hessopt
from tests.distributed.test_layerwise import OPTIMIZERS, batch, network, plain, whole
from tests.distributed.worker import Scenario, outcomes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

KINDS = ("spectral", "kronecker")
STEPS = 8


def _weighted(kind: str, sizes: list[int] | None, total: int = 12) -> Scenario:
    """The loss of each process counts with its number of samples, so that all count the same."""

    def scenario(rank: int, processes: int) -> Any:
        criterion = nn.CrossEntropyLoss()
        net = DistributedDataParallel(network("linear")) if sizes else network("linear")
        optimizer = OPTIMIZERS[kind](net, criterion)
        for number in range(STEPS):
            x, y = batch(number, rank, processes, sizes)
            optimizer.zero_grad()
            loss = criterion(net(x), y) * (len(x) * processes / total) if len(x) else net(x).sum() * 0.0
            loss.backward()
            optimizer.step()
        return whole(net)

    return scenario


def _first_empty(kind: str) -> Scenario:
    """Also with closures, and where the layers are not known yet."""

    def scenario(rank: int, processes: int) -> Any:
        net = DistributedDataParallel(network("linear"))
        optimizer = OPTIMIZERS[kind](net, None)
        for number in range(STEPS):
            x, y = batch(number, rank, processes, [0, 12] if number < 2 else [5, 7])

            def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
                optimizer.zero_grad()
                output = net(x)
                return (cross_entropy(output, y) if len(x) else output.sum() * 0.0), output

            optimizer.step(closure)  # type: ignore[arg-type]
        return whole(net)

    return scenario


def _not_finite(kind: str, at: int, *, closure: bool = False) -> Scenario:
    """A batch of process 1 is not finite."""

    def scenario(rank: int, processes: int) -> Any:
        net = DistributedDataParallel(network("linear"))
        optimizer = OPTIMIZERS[kind](net, "cross_entropy")
        errors = []
        for number in range(STEPS):
            before = whole(net)
            x, y = batch(number, rank, processes)
            if number == at and rank == 1:
                x = x * torch.nan

            def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(net(x), y)
                loss.backward()
                return loss

            try:
                optimizer.step(evaluate) if closure else (evaluate(), optimizer.step())
            except RuntimeError as error:
                errors.append(f"{type(error).__name__}: {error}")
            if number == at:
                assert torch.equal(before, whole(net))
        return whole(net), errors

    return scenario


def _error_of_one(kind: str) -> Scenario:
    """Process 1 meets an error of its own in the closure, and the next step is taken by both."""

    def scenario(rank: int, processes: int) -> Any:
        net = DistributedDataParallel(network("linear"))
        optimizer = OPTIMIZERS[kind](net, None)
        x, y = batch(0, rank, processes)
        errors = []
        for number in range(2):

            def closure(number: int = number) -> Any:
                optimizer.zero_grad()
                loss = cross_entropy(net(x), y)
                return None if rank == 1 and number == 0 else loss

            try:
                optimizer.step(closure)  # type: ignore[arg-type]
            except RuntimeError as error:
                errors.append(f"{type(error).__name__}: {error}")
        return errors, whole(net)

    return scenario


def _drifting(kind: str, wrap: str) -> Scenario:
    """What is not the same everywhere."""

    def scenario(rank: int, processes: int) -> Any:
        net = network("linear")
        called = DistributedDataParallel(net) if wrap != "not wrapped" else net
        optimizer = OPTIMIZERS[kind](called, "cross_entropy")
        if wrap == "parameters":
            with torch.no_grad():
                next(net.parameters()).add_(rank)
        for number in range(12):
            x, y = batch(number, rank, processes)
            optimizer.zero_grad()
            cross_entropy(called(x), y).backward()
            if wrap == "gradients" and number > 2:
                for p in net.parameters():
                    assert p.grad is not None
                    p.grad *= 1 + rank
            optimizer.step()

    return scenario


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.one, self.two, self.end = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)
        self.way = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.start(x))
        return self.end(self.one(x) if self.way == 0 else self.two(x) if self.way == 1 else self.one(x) + self.two(x))


def _branches(kind: str, at: int) -> Scenario:
    """Each process calls other layers at a step."""

    def scenario(rank: int, processes: int) -> Any:
        torch.manual_seed(0)
        net = _Branches()
        called = DistributedDataParallel(net, find_unused_parameters=True)
        optimizer = OPTIMIZERS[kind](called, "cross_entropy")
        for number in range(6):
            net.way = rank if number == at else 2
            plain(called, optimizer, cross_entropy, *batch(number, rank, processes))
        return whole(net)

    return scenario


def _drawn(kind: str) -> Scenario:
    """Random columns, and the present batch normalisation of each process."""

    def scenario(rank: int, processes: int) -> Any:
        net = DistributedDataParallel(network("normalised").train())
        if kind == "spectral":
            optimizer: Optimizer = hessopt.SpectralNewton(net, "cross_entropy")
        else:
            optimizer = hessopt.KroneckerNewton(
                net,
                loss="cross_entropy",
                bandwidth=hessopt.KroneckerBandwidth(10, window=2),
                averages=hessopt.KroneckerAveraging(factor_every=2),
            )
        seen = []
        for number in range(24):
            plain(net, optimizer, cross_entropy, *batch(number, rank, processes))
        engine = optimizer._engine if kind == "spectral" else optimizer.band  # type: ignore[attr-defined]
        seen.append(engine.gathering.seeds.generator.get_state())
        return whole(net.module), seen

    return scenario


class _Scaled(nn.Module):
    """A parameter without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.first, self.last = nn.Parameter(torch.ones(6)), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x * self.scale)))


def _diagonal(curvature: Any) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        torch.manual_seed(0)
        net: Any = _Scaled()
        if processes > 1:
            net = DistributedDataParallel(net)
        averages = hessopt.KroneckerAveraging(factor_every=2)
        optimizer = hessopt.KroneckerNewton(net, loss="cross_entropy", curvature=curvature, averages=averages)
        for number in range(STEPS):
            plain(net, optimizer, cross_entropy, *batch(number, rank, processes))
        return whole(net)

    return scenario


def _joined(kind: str) -> Scenario:
    def scenario(rank: int, processes: int) -> Any:
        from torch.distributed.algorithms.join import Join

        net = DistributedDataParallel(network("linear"))
        optimizer = OPTIMIZERS[kind](net, "cross_entropy")
        try:
            with Join([net]):
                plain(net, optimizer, cross_entropy, *batch(0, rank, processes))
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"

    return scenario


def _adapted() -> Scenario:
    """A damping that follows further evaluations of the closure."""

    def scenario(rank: int, processes: int) -> Any:
        net: Any = network("linear")
        if processes > 1:
            net = DistributedDataParallel(net)
        optimizer = hessopt.KroneckerNewton(
            net, loss="cross_entropy", curvature="ggn", damping=hessopt.KroneckerDamping(1e-2, adapt_every=2),
            averages=hessopt.KroneckerAveraging(columns="exact", factor_every=2),
        )  # fmt: skip
        for number in range(STEPS):
            x, y = batch(number, rank, processes)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        return torch.cat([whole(net), torch.tensor([optimizer.band.damping])])

    return scenario


def scenarios() -> dict[str, Scenario]:
    found: dict[str, Scenario] = {"adapted": _adapted()}
    for curvature in ("fisher", "empirical"):
        found[f"diagonal {curvature}"] = _diagonal(curvature)
    for kind in KINDS:
        found[f"{kind} joined"] = _joined(kind)
        found[f"{kind} uneven"] = _weighted(kind, [9, 3])
        found[f"{kind} empty"] = _weighted(kind, [12, 0])
        found[f"{kind} first empty"] = _first_empty(kind)
        for at in (0, 4):
            found[f"{kind} not finite {at}"] = _not_finite(kind, at)
        found[f"{kind} not finite, closure"] = _not_finite(kind, 4, closure=True)
        found[f"{kind} error of one"] = _error_of_one(kind)
        for wrap in ("parameters", "gradients", "not wrapped"):
            found[f"{kind} drifting {wrap}"] = _drifting(kind, wrap)
        for at in (0, 3):
            found[f"{kind} branches {at}"] = _branches(kind, at)
        found[f"{kind} drawn"] = _drawn(kind)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return outcomes(__name__, 2, tmp_path_factory.mktemp("batches"))


def _both(found: list[dict[str, Any]], name: str, part: Callable[[Any], Tensor] = lambda value: value) -> Tensor:
    for own in found:
        assert not isinstance(own[name], str), own[name]
    first, second = (part(own[name]) for own in found)
    assert torch.equal(first, second)
    return first


def _refused(found: list[dict[str, Any]], name: str, *words: str) -> None:
    for own in found:
        assert isinstance(own[name], str), own[name]
        for word in words:
            assert word in own[name], own[name]


@pytest.mark.parametrize("name", ["uneven", "empty"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_other_sizes_count_by_their_samples(found: list[dict[str, Any]], kind: str, name: str) -> None:
    expected = _weighted(kind, None)(0, 1)
    torch.testing.assert_close(_both(found, f"{kind} {name}"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_samples_is_not_waited_for(found: list[dict[str, Any]], kind: str) -> None:
    assert _both(found, f"{kind} first empty").isfinite().all()


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_not_finite_is_left_out_everywhere(found: list[dict[str, Any]], kind: str, at: int) -> None:
    assert _both(found, f"{kind} not finite {at}", lambda value: value[0]).isfinite().all()
    assert all(own[f"{kind} not finite {at}"][1] == [] for own in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_that_is_not_finite_is_an_error_everywhere(found: list[dict[str, Any]], kind: str) -> None:
    assert _both(found, f"{kind} not finite, closure", lambda value: value[0]).isfinite().all()
    for own in found:
        (error,) = own[f"{kind} not finite, closure"][1]
        assert "ClosureError" in error


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_one_process_is_one_of_all(found: list[dict[str, Any]], kind: str) -> None:
    _both(found, f"{kind} error of one", lambda value: value[1])
    (first,), (second,) = (own[f"{kind} error of one"][0] for own in found)
    assert "in process 1: the closure returned None" in first
    assert "the closure returned None" in second


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        ("parameters", ("the parameters of processes 1 and 0 differ", "separate_networks")),
        ("gradients", ("gradients are not the same", "separate_networks")),
        ("not wrapped", ("gradients are not the same", "DistributedDataParallel")),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_do_not_drift_apart_in_silence(
    found: list[dict[str, Any]], kind: str, wrap: str, words: tuple[str, ...]
) -> None:
    _refused(found, f"{kind} drifting {wrap}", "ModelError", *words)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_one_process_calls(found: list[dict[str, Any]], kind: str) -> None:
    _refused(found, f"{kind} branches 0", "ModelError", "process 0 alone called ['one']", "['two']")
    assert _both(found, f"{kind} branches 3").isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_random_columns_are_each_process_own_and_the_steps_are_all_ones(found: list[dict[str, Any]], kind: str) -> None:
    assert _both(found, f"{kind} drawn", lambda value: value[0]).isfinite().all()
    first, second = (own[f"{kind} drawn"][1][0] for own in found)
    assert not torch.equal(first, second)


def test_diagonals_are_of_the_samples_of_all(found: list[dict[str, Any]]) -> None:
    assert _both(found, "diagonal fisher").isfinite().all()
    torch.testing.assert_close(_both(found, "diagonal empirical"), _diagonal("empirical")(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_join_is_refused_by_name(found: list[dict[str, Any]], kind: str) -> None:
    _refused(found, f"{kind} joined", "ModelError", "Join")


def test_the_damping_follows_the_loss_of_all(found: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(_both(found, "adapted"), _adapted()(0, 1), rtol=0, atol=1e-12)
