"""Averages of iterates: weights, and exchange in place."""

from __future__ import annotations

import pytest
import torch

from hessopt.spectral.iterate_average import IterateAverage


@pytest.mark.parametrize("power", [1, 3, 8])
def test_weights_are_the_product_of_the_recursion(power: int) -> None:
    """For k = 1 the plain mean; in general weights ``w_t Π_{s>t} (1 − w_s)``, ``w_t = min(1, k/t)``."""
    torch.manual_seed(0)
    iterates = torch.randn(20, 3, dtype=torch.float64)
    p = iterates[0].clone()
    average = IterateAverage([p], power)
    for iterate in iterates:
        p.copy_(iterate)
        average.update()
    shares = [min(1.0, power / t) for t in range(1, 21)]
    weights = torch.tensor([shares[i] * torch.tensor([1 - s for s in shares[i + 1 :]]).prod() for i in range(20)])
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(average.others[0], weights.double() @ iterates, rtol=1e-5, atol=1e-6)
    if power == 1:
        torch.testing.assert_close(average.others[0], iterates.mean(0), rtol=1e-12, atol=1e-14)


def test_parameters_and_average_are_exchanged_in_place() -> None:
    p = torch.arange(4.0)
    average = IterateAverage([p], 2)
    average.update()
    p.add_(1)
    average.update()
    iterate, mean, address = p.clone(), average.others[0].clone(), p.data_ptr()
    for _ in range(2):
        average.swap(True)  # the second time nothing happens
        assert torch.equal(p, mean)
    average.swap(False)
    assert torch.equal(p, iterate)
    assert torch.equal(average.others[0], mean)
    assert p.data_ptr() == address
