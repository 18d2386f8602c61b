"""The running diagonal beside the diagonal itself."""

from collections.abc import Callable

import pytest
import torch

from hessopt.newton_cg.preconditioners import FIRST_PROBES, RunningDiagonal


def matrix(n: int = 6) -> torch.Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a @ a.mT + torch.diag(10.0 ** torch.arange(n, dtype=torch.float64) / 100)


def test_estimates_the_diagonal() -> None:
    b = matrix()
    like = torch.zeros(6, dtype=torch.float64)
    total, count = torch.zeros_like(like), 2000
    for seed in range(count):
        diagonal = RunningDiagonal()
        diagonal.update(lambda v: b @ v, like, torch.Generator().manual_seed(seed))
        total += diagonal.estimate
    off = (b.square().sum(1) - b.diagonal().square()) / FIRST_PROBES  # variance of Hutchinson's estimator
    assert ((total / count - b.diagonal()).abs() <= 5 * (off / count).sqrt()).all()


def test_exact_for_a_diagonal_matrix_and_a_running_mean() -> None:
    d = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    calls = []

    def product(scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda v: (calls.append(1), scale * d * v)[1]

    diagonal = RunningDiagonal(decay=0.75)
    diagonal.update(product(1.0), d, torch.Generator().manual_seed(0))
    assert torch.equal(diagonal.estimate, d)
    assert len(calls) == FIRST_PROBES
    diagonal.update(product(5.0), d, torch.Generator().manual_seed(0))
    assert torch.allclose(diagonal.estimate, 2 * d)
    assert len(calls) == FIRST_PROBES + 1
    m = (d.abs() / d.abs().mean() + 1e-2) ** 0.75
    assert torch.allclose(diagonal.scale, m / m.log().mean().exp())
    v = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(diagonal.metric(diagonal.solve(v)), v)
    assert torch.allclose(diagonal.solve(v), v / diagonal.scale)
    assert float(diagonal.scale.log().sum()) == pytest.approx(0, abs=1e-12)


def test_zero_matrix_and_no_probe() -> None:
    diagonal = RunningDiagonal()
    with pytest.raises(RuntimeError, match="update"):
        _ = diagonal.scale
    diagonal.update(lambda v: 0 * v, torch.zeros(3), torch.Generator().manual_seed(0))
    assert torch.allclose(diagonal.scale, torch.ones(3))
