"""Sums, means and copies over processes are those of the whole, and the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hessopt
from diagnostics.ranks.collectives import Ranks, ranks_of
from tests.distributed.worker import outcomes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

SIZES = (1, 3)
"""Numbers of processes."""


def pieces(rank: int) -> list[Tensor]:
    """Of two dtypes, one of them empty, one a view that is not contiguous."""
    g = torch.Generator().manual_seed(rank)
    own = [torch.randn(3, 2, generator=g), torch.randn(4, generator=g, dtype=torch.float32), torch.zeros(0)]
    return [*own, torch.randn(2, 5, generator=g).mT]


def _exchanged(call: str, *arguments: Any) -> Any:
    def scenario(rank: int, processes: int) -> Any:
        own = pieces(rank)
        rest = [a[rank] if isinstance(a, list) and call == "mean_" else a for a in arguments]
        getattr(ranks_of(), call)(own, *rest)
        return own

    return scenario


def scenarios() -> dict[str, Any]:
    def separate(rank: int, processes: int) -> Any:
        with hessopt.separate_networks():
            return ranks_of().size

    def groups(rank: int, processes: int) -> Any:
        half = dist.new_group(sorted({0, processes - 1}))
        if rank not in (0, processes - 1):
            return None
        net = nn.Linear(2, 2)
        found = [ranks_of(DistributedDataParallel(net, process_group=half)), ranks_of(net, half), ranks_of(net)]
        return [(r.size, r.rank) for r in found]

    return {
        "sum_": _exchanged("sum_"),
        "mean_": _exchanged("mean_"),
        "mean_ weighted": _exchanged("mean_", [5.0, 0.0, 2.0]),
        "copy_": lambda rank, processes: _exchanged("copy_", [processes - 1, 0, 0, processes // 2])(rank, processes),
        "rows": lambda rank, processes: ranks_of().rows(torch.full((2 * rank, 3), rank)),
        "all": lambda rank, processes: [ranks_of().all(torch.tensor(flag)) for flag in (True, rank > 0)],
        "separate": separate,
        "groups": groups,
    }


@pytest.fixture(scope="module", params=SIZES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("collectives")
    return outcomes(__name__, request.param, folder)


def _expected(weights: list[float]) -> list[Tensor]:
    own = [[w * t for t in pieces(rank)] for rank, w in enumerate(weights)]
    return [sum(parts) for parts in zip(*own, strict=True)]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["sum_", "mean_", "mean_ weighted"])
def test_sums_and_means_are_those_of_all(found: list[dict[str, Any]], name: str) -> None:
    n = len(found)
    weights = {"sum_": [1.0] * n, "mean_": [1 / n] * n, "mean_ weighted": [w / [5, 5, 7][n - 1] for w in [5, 0, 2][:n]]}
    for own in found:
        for mine, expected in zip(own[name], _expected(weights[name]), strict=True):
            tolerance = 1e-12 if mine.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(mine, expected.to(mine.dtype), rtol=0, atol=tolerance)
        assert all(map(torch.equal, own[name], found[0][name]))


def test_copies_are_the_owners(found: list[dict[str, Any]]) -> None:
    n = len(found)
    for own in found:
        for i, owner in enumerate([n - 1, 0, 0, n // 2]):
            assert torch.equal(own["copy_"][i], pieces(owner)[i])


def test_rows_of_all_come_in_order(found: list[dict[str, Any]]) -> None:
    expected = torch.cat([torch.full((2 * rank, 3), rank) for rank in range(len(found))])
    assert all(torch.equal(own["rows"], expected) for own in found)


def test_a_flag_is_true_if_it_is_everywhere(found: list[dict[str, Any]]) -> None:
    assert all([bool(flag) for flag in own["all"]] == [True, False] for own in found)


def test_who_trains_together_is_known(found: list[dict[str, Any]]) -> None:
    n = len(found)
    assert [own["separate"] for own in found] == [1] * n
    pair = (2, 3) if n > 1 else (1, 1)
    for rank, own in enumerate(found):
        if rank in (0, n - 1):
            half = (pair[0], int(rank > 0))
            assert own["groups"] == [half, half, (pair[1], rank)]


def test_owners_share_the_work() -> None:
    assert Ranks(size=2).owners([1, 5, 4, 2]) == [0, 0, 1, 1]
    costs = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()
    found = Ranks(size=3).owners(costs)
    loads = [sum(c for c, owner in zip(costs, found, strict=True) if owner == rank) for rank in range(3)]
    best = max(sum(costs) / 3, max(costs))  # at least
    assert max(loads) <= 4 / 3 * best


def test_one_process_exchanges_nothing() -> None:
    one, t = Ranks(), torch.tensor([1.0, 2.0])
    one.sum_([t])
    one.mean_([t], 0.0)
    one.copy_([t], [0])
    assert torch.equal(one.rows(t), torch.tensor([1.0, 2.0]))
    assert one.owners([3, 1]) == [0, 0]
