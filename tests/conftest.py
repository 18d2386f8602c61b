"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import pretend_device  # before the first backward pass, when PyTorch starts a thread for each device


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(pretend_device.NAME, marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every kind of device; what the machine lacks is skipped. Of the pretended one every operation is Python's."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == pretend_device.NAME:
        with pretend_device.pretending() as pretended:
            yield pretended
    else:
        yield torch.device(request.param)
