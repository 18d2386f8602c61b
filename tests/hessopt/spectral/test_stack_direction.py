"""Spectral directions from the smaller side alone, against Muon's iteration on the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessopt.averages.averages import Stack
from hessopt.spectral.gram_polar import COEFFICIENTS, ITERATIONS, inverse_root, inverse_roots
from hessopt.spectral.options import KroneckerCoordinates
from hessopt.spectral.stack_direction import StackDirection, directions_of


def muon(z: Tensor) -> Tensor:
    """``X ← a X + b (XXᵀ) X + c (XXᵀ)² X`` of ``Z/‖Z‖``."""
    a, b, c = COEFFICIENTS
    x = z / z.flatten(1).norm(dim=1)[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def power(factor: Tensor, exponent: float, damping: float) -> Tensor:
    shift = damping**0.5 * factor.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    values, vectors = torch.linalg.eigh(factor + shift * torch.eye(factor.shape[1], dtype=factor.dtype))
    return (vectors * values.unsqueeze(1) ** -exponent) @ vectors.mT


def spd(count: int, n: int) -> Tensor:
    x = torch.randn(count, n, 2 * n, dtype=torch.float64)
    return x @ x.mT / n


def test_roots_of_gram_matrices_make_muons_polar_factor() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(inverse_root(z @ z.mT) @ z, muon(z), rtol=1e-9, atol=1e-11)
    singular = torch.linalg.svdvals(inverse_root(z @ z.mT) @ z)
    assert float(singular.min()) > 0.65
    assert float(singular.max()) < 1.25
    assert not inverse_root(torch.zeros(1, 3, 3)).isnan().any()


def test_matrices_of_different_sizes_go_together() -> None:
    torch.manual_seed(0)
    grams = [spd(2, 3), spd(1, 7), spd(1, 70), spd(3, 7)]
    for found, gram in zip(inverse_roots(grams), grams, strict=True):
        torch.testing.assert_close(found, inverse_root(gram), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 4, 9), (3, 8, 3), (1, 5, 5)])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
@pytest.mark.parametrize("outputs", [True, False])
def test_directions_are_the_definition(shape: tuple[int, int, int], exponent: float, outputs: bool) -> None:
    torch.manual_seed(0)
    m, o, a = shape
    stack = Stack(shape, (False, False), spd(m, a), spd(m, o))
    made = StackDirection(stack, KroneckerCoordinates(exponent, 0.05), outputs)
    made.refresh(first=True)
    momentum = torch.randn(shape, dtype=torch.float64)
    (found,) = directions_of([made], [momentum])
    left = power(stack.outputs, exponent, 0.05) if outputs else torch.eye(o, dtype=torch.float64).expand(m, o, o)
    right = power(stack.inputs, exponent, 0.05)
    z = left @ momentum @ right
    expected = left @ (muon(z) if o <= a else muon(z.mT).mT) @ right
    expected = expected * (0.2 * (o * a) ** 0.5 / expected.flatten(1).norm(dim=1))[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_zero_matrix_has_no_direction() -> None:
    stack = Stack((1, 3, 4), (False, False), spd(1, 4), spd(1, 3))
    made = StackDirection(stack, KroneckerCoordinates(), True)
    made.refresh(first=True)
    (found,) = directions_of([made], [torch.zeros(1, 3, 4, dtype=torch.float64)])
    assert torch.equal(found, torch.zeros_like(found))
