"""Lyapunov exponents against products of autograd Jacobians, and the inequality between the two definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diagnostics
from diagnostics.bounds.lyapunov import lyapunov_norm, lyapunov_qr
from diagnostics.bounds.paths import paths
from tests.helpers.networks import Chain, Diamond


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


def _capture(model: nn.Module, batch: int = 4) -> diagnostics.Graph:
    return diagnostics.capture(model.double(), torch.randn(batch, 5, dtype=torch.float64), _wavy)


def _product(model: nn.Sequential, graph: diagnostics.Graph, first: str, stop: int) -> np.ndarray:
    """Jacobian of the layers after ``first``, by autograd through all of them at once."""
    inside = nn.Sequential(*list(model)[int(first) + 1 : stop])
    return torch.vmap(torch.func.jacrev(inside))(graph[first].value.detach()).detach().numpy()


def test_the_norm_of_the_product_gives_equation_8() -> None:
    torch.manual_seed(0)
    model = Chain(5, 4, 6, 3, 4, 2)
    graph = _capture(model)
    found = lyapunov_norm(graph)
    expected = np.log(np.linalg.norm(_product(model, graph, "0", 4), 2, axis=(1, 2))) / 3
    assert found.steps == 3
    np.testing.assert_allclose(found.per_sample.numpy(), expected, rtol=1e-12)
    assert found.value == pytest.approx(expected.mean(), rel=1e-12)


def test_qr_exponents_equal_the_textbook_loop_of_numpy() -> None:
    torch.manual_seed(0)
    model = Chain(5, 4, 4, 4, 4, 2)
    graph = _capture(model)
    found = lyapunov_qr(graph)
    expected = np.zeros((4, 4))
    for b in range(4):
        frame = np.eye(4)
        for i in range(1, 4):
            value = graph[str(i - 1)].value.detach()
            step = torch.vmap(torch.func.jacrev(model[i]))(value)[b].detach().numpy()
            frame, triangle = np.linalg.qr(step @ frame)
            expected[b] += np.log(np.abs(np.diag(triangle))) / 3
    np.testing.assert_allclose(found.per_sample.numpy(), expected, rtol=1e-10)
    assert found.value == pytest.approx(expected.mean(0).max(), rel=1e-10)
    # all directions together are the determinant of the product
    determinant = np.log(np.abs(np.linalg.det(_product(model, graph, "0", 4)))) / 3
    np.testing.assert_allclose(found.per_sample.sum(1).numpy(), determinant, rtol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(widths=st.lists(st.integers(1, 6), min_size=2, max_size=6), seed=st.integers(0, 2**16))
def test_the_qr_exponents_never_exceed_equation_8(widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    graph = _capture(Chain(5, *widths, 2))
    norm, qr = lyapunov_norm(graph), lyapunov_qr(graph)
    assert qr.per_sample.shape == (4, min(widths))
    assert (qr.per_sample <= norm.per_sample[:, None] + 1e-10).all()
    assert qr.value <= norm.value + 1e-10


def test_the_two_definitions_can_differ_in_sign() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.tensor([[0.5, 4.0], [0.0, 0.5]]))
    graph = diagnostics.capture(model.double(), torch.ones(1, 2, dtype=torch.float64), _wavy)
    assert lyapunov_norm(graph).value > 0.5  # a shear stretches now and contracts in the end
    assert lyapunov_qr(graph).value == pytest.approx(math.log(0.5), rel=1e-12)


def test_deep_products_neither_overflow_nor_underflow() -> None:
    for gain in (1e-20, 1e20):
        model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(41)]).double()
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(gain * torch.eye(2, dtype=torch.float64))
        at_zero = torch.zeros(1, 2, dtype=torch.float64)  # keeps the activations finite
        graph = diagnostics.capture(model, at_zero, _wavy)
        assert lyapunov_norm(graph).value == pytest.approx(math.log(gain), rel=1e-12)
        assert lyapunov_qr(graph).value == pytest.approx(math.log(gain), rel=1e-12)


def test_a_direction_that_is_lost_has_exponent_minus_infinity() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.diag(torch.tensor([2.0, 0.0])))
    graph = diagnostics.capture(model.double(), torch.ones(1, 2, dtype=torch.float64), _wavy)
    assert lyapunov_qr(graph).per_sample.tolist() == [[pytest.approx(math.log(2)), -math.inf]]
    assert lyapunov_qr(graph).value == pytest.approx(math.log(2))


def test_branches_need_a_path() -> None:
    torch.manual_seed(0)
    graph = _capture(Diamond())
    with pytest.raises(diagnostics.DiagnosticsError, match=r"not a chain: 'right'.*Say along which path"):
        lyapunov_norm(graph)
    path = paths(graph, "stem", "merge")[0]
    found = lyapunov_norm(graph, path)
    assert found.value == lyapunov_norm(graph, ["stem", "left", "merge"]).value
    assert found.steps == 2
    with pytest.raises(diagnostics.DiagnosticsError, match="'stem' is no parent of 'merge'"):
        lyapunov_qr(graph, ["stem", "merge"])
    with pytest.raises(diagnostics.DiagnosticsError, match="at least two nodes"):
        lyapunov_qr(graph, ["stem"])
