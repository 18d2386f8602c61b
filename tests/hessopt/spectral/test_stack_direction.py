"""Spectral directions from the smaller side alone, against Muon's iteration on the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessopt.averages.averages import Stack
from hessopt.spectral.gram_polar import COEFFICIENTS, inverse_root, inverse_roots
from hessopt.spectral.options import KroneckerCoordinates
from hessopt.spectral.stack_direction import StackDirection, directions_of


def polar(z: Tensor) -> Tensor:
    """``X ← a X + b (XXᵀ) X + c (XXᵀ)² X`` of ``Z/‖Z‖``, as Muon has it."""
    x = z / z.flatten(1).norm(dim=1)[:, None, None]
    for a, b, c in COEFFICIENTS:
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


def normalised(made: StackDirection, momentum: Tensor) -> list[Tensor]:
    directions, scales = directions_of([made], [momentum])
    return [d * scale[:, None, None] for d, scale in zip(directions, scales, strict=True)]


def test_the_quintics_are_the_best_one_after_another() -> None:
    """Each leaves an error that equioscillates four times, at both ends and in between, on the interval it is for."""
    low, high = 0.003, 1.0
    for a, b, c in COEFFICIENTS:
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        inner = torch.cat(
            [error[:1], error[1:-1][(error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) <= 0], error[-1:]]
        )
        assert len(inner) == 4
        assert bool((inner[1:] * inner[:-1] < 0).all())
        torch.testing.assert_close(
            inner.abs(), inner.abs().max().expand(4), rtol=1e-3, atol=0
        )  # seven decimals, a grid
        low, high = float(1 + error.min()), float(1 + error.max())


def test_roots_of_gram_matrices_make_the_polar_factor() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(inverse_root(z @ z.mT) @ z, polar(z), rtol=1e-9, atol=1e-11)
    singular = torch.linalg.svdvals(inverse_root(z @ z.mT) @ z)
    assert float((singular - 1).abs().max()) < 0.2
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
    (found,) = normalised(made, momentum)
    left = power(stack.outputs, exponent, 0.05) if outputs else torch.eye(o, dtype=torch.float64).expand(m, o, o)
    right = power(stack.inputs, exponent, 0.05)
    z = left @ momentum @ right
    expected = left @ (polar(z) if o <= a else polar(z.mT).mT) @ right
    expected = expected * (0.2 * (o * a) ** 0.5 / expected.flatten(1).norm(dim=1))[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_zero_matrix_has_no_direction() -> None:
    stack = Stack((1, 3, 4), (False, False), spd(1, 4), spd(1, 3))
    made = StackDirection(stack, KroneckerCoordinates(), True)
    made.refresh(first=True)
    (found,) = normalised(made, torch.zeros(1, 3, 4, dtype=torch.float64))
    assert torch.equal(found, torch.zeros_like(found))
