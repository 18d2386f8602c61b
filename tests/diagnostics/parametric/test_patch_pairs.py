"""Structured pairs of layers: both orders of contraction give what entry-by-entry maps give."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diagnostics
from diagnostics.parametric import patch_pairs, recognise
from tests.helpers.oracle import relative_error


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).sum() / len(z)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A random pair of convolutions on images of random shape, and a head on positions or on their mean."""
    torch.manual_seed(draw(st.integers(0, 99)))
    channels = [draw(st.integers(1, 3)) for _ in range(3)]
    layers: list[nn.Module] = []
    for a, b in pairwise(channels):
        mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
        layers.append(
            nn.Conv2d(
                a, b, (draw(st.integers(1, 2)), draw(st.integers(1, 3))), stride=draw(st.integers(1, 2)),
                padding=draw(st.sampled_from([0, (1, 0), (0, 1), 1])), dilation=draw(st.integers(1, 2)),
                bias=draw(st.booleans()), padding_mode=mode,
            )
        )  # fmt: skip
        layers.append(draw(st.sampled_from([nn.Tanh, nn.GELU, nn.Identity]))())
    x = torch.randn(2, channels[0], draw(st.integers(5, 6)), draw(st.integers(6, 7)), dtype=torch.float64)
    body = nn.Sequential(*layers).double()
    try:
        size = body(x).flatten(1).shape[1]
    except RuntimeError:  # an image smaller than the kernel, or than its reflection
        reject()
    head = nn.Sequential(nn.Flatten(), nn.Linear(size, 2)) if draw(st.booleans()) else nn.Flatten()
    return nn.Sequential(*body, head).double(), x


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=networks())
def test_both_orders_equal_the_entry_by_entry_map(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    graph = diagnostics.capture(model, x, _wavy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognise, "_patch_map", lambda *_: None)
        expected = {part: diagnostics.parameter_hessian(graph, part) for part in ("total", "gn", "tensor")}
    for products in (0, 2**60):  # of the second order: it is taken always, or never
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(patch_pairs, "_right_products", lambda *_, products=products: products)
            for part, matrix in expected.items():
                assert relative_error(diagnostics.parameter_hessian(graph, part), matrix) < 1e-12


@pytest.mark.parametrize("cached", [1, 2000, 2**22])
def test_groups_of_channels_do_not_change_the_result(
    cached: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(3, 3, 2, padding=1)  # two uses of one weight: its rows are added to after they were filled
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), shared, nn.Tanh(), shared, nn.Flatten(), nn.Linear(75, 4))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    graph = diagnostics.capture(model.double().to(device), x.to(device), _wavy)
    expected = diagnostics.parameter_hessian(graph)
    monkeypatch.setattr(patch_pairs, "_CACHED", cached)
    assert relative_error(diagnostics.parameter_hessian(graph), expected) < 1e-13
