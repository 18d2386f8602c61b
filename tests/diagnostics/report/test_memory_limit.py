"""The limit holds in every section of a diagnosis, and in the estimators that take one, by what is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics import DiagnosisSettings
from diagnostics.errors import MemoryBudgetError
from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.matrix_free.node_metrics import estimate_metrics
from diagnostics.matrix_free.pair_estimates import Sampling
from tests.helpers.peak import Peak

VECTORS = 80
"""Of the parameters, that fit into the limit; 10 probes of 30 Lanczos steps would be 300."""
ONE_PRODUCT = 14
"""Such vectors that a product of some columns holds beside what estimators keep."""


def _network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 3))
    return net, (torch.randn(4, 20), torch.arange(4) % 3)


@pytest.mark.parametrize(
    "section", ["metrics", pytest.param("spectrum", marks=pytest.mark.slow), "parameters", "sources"]
)
def test_the_limit_holds_in_every_section(section: Any) -> None:
    net, batch = _network()
    vector = 4 * sum(p.numel() for p in net.parameters())
    limit = VECTORS * vector
    with Peak() as peak:
        report = diagnostics.diagnose(
            net,
            batch,
            F.cross_entropy,
            exact=False,
            settings=DiagnosisSettings(memory_limit=limit),
            sections=[section],
            progress=False,
        )
    assert section in report.sections
    assert peak.bytes <= limit + ONE_PRODUCT * vector


def test_what_was_left_out_to_fit_is_said() -> None:
    net, batch = _network()
    limit = 30 * 4 * sum(p.numel() for p in net.parameters())
    report = diagnostics.diagnose(
        net, batch, F.cross_entropy, exact=False, settings=DiagnosisSettings(memory_limit=limit), progress=False
    )
    assert "probes, to fit into the memory limit" in report.data["shortened"]["parameters"]
    assert "to fit into the memory limit" in report.data["shortened"]["spectrum"]
    assert report.sections["parameters"]["probes"] < 30
    whole = diagnostics.diagnose(net, batch, F.cross_entropy, exact=False, progress=False)
    assert not whole.data["shortened"]
    tiny = diagnostics.diagnose(
        net, batch, F.cross_entropy, exact=False, settings=DiagnosisSettings(memory_limit=1000), progress=False
    )
    for section in ("metrics", "spectrum", "parameters", "sources"):
        assert "more than the limit" in tiny.data["skipped"][section]


def test_responses_of_all_nodes_are_within_their_limit() -> None:
    net, (x, y) = _network()
    graph = diagnostics.capture(net, x, lambda z: F.cross_entropy(z, y))
    sizes = [graph[name].value.shape[1] for name in graph.chosen]
    kept, streamed = (
        Sampling(30, "rademacher", deflate, 1e-2, rounds).planned_bytes(sizes, 4)
        for deflate, rounds in ((10, 20), (0, 0))
    )
    with pytest.raises(MemoryBudgetError, match="Use deflate=0 and spectral_rounds=0"):
        estimate_metrics(graph, responses_limit=kept - 1)
    estimate_metrics(graph, responses_limit=streamed, deflate=0, spectral_rounds=0)
    with pytest.raises(MemoryBudgetError, match="a larger responses_limit"):
        estimate_metrics(graph, responses_limit=streamed - 1, deflate=0, spectral_rounds=0)


def test_a_basis_that_grows_stays_within_the_limit() -> None:
    n = 20_000
    values = torch.linspace(-1, 1, n)

    class Diagonal(LinearOperator):
        def matmat(self, vectors: Tensor) -> Tensor:
            return values[:, None] * vectors

    diagonal = Diagonal((n, n), values.dtype, values.device, symmetric=True)
    for vectors in (20, 40, 70, 100):
        with Peak() as peak:
            diagnostics.extreme_eigenpairs(diagonal, rtol=1e-6, max_products=150, memory_limit=vectors * 4 * n)
        assert peak.bytes <= (vectors + 8) * 4 * n
