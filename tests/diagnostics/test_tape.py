"""What the autograd tape is asked, and whether batched products can be trusted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diagnostics import tape
from diagnostics.tape import ancestry, batched_vjp
from tests.oracle import relative_error


def test_ancestry_finds_leaves_and_turns_back_at_stops() -> None:
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    frozen = torch.randn(3)
    middle = torch.tanh(a * frozen)
    end = (middle + b).exp() * middle
    leaves, met = ancestry(end)
    assert {id(t) for t in leaves} == {id(a), id(b)}
    assert met == []
    leaves, met = ancestry(end, {middle.grad_fn})
    assert [id(t) for t in leaves] == [id(b)]
    assert met == [middle.grad_fn]
    assert ancestry(frozen) == ([], [])
    assert [id(t) for t in ancestry(middle, {middle.grad_fn})[0]] == [id(a)]  # the walk starts behind the tensor


CENTRES = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cdist": lambda x: torch.cdist(x, CENTRES.to(x.device)),  # torch.vmap is wrong here (PyTorch 2.13)
    "mish": F.mish,  # no batching rule
    "softmax": lambda x: torch.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "max_pool": lambda x: F.max_pool1d(x.unsqueeze(1), 2),
    "sort": lambda x: x.sort(-1).values,
    "conv": lambda x: F.conv1d(x.unsqueeze(1), torch.ones(2, 1, 3, dtype=x.dtype, device=x.device)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_batched_products_equal_single_ones(name: str, device: torch.device) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    unused = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)
    output = OPERATIONS[name](x)
    cotangents = torch.randn(7, *output.shape, dtype=torch.float64).to(device)
    products, nothing = batched_vjp([output], [x, unused], [cotangents])
    single = torch.stack([torch.autograd.grad(output, [x], c, retain_graph=True)[0] for c in cotangents])
    assert nothing is None
    assert products is not None
    assert relative_error(products, single) < 1e-14


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    output = torch.tanh(x).cumsum(-1)
    cotangents = torch.randn(7, 3, 4)
    whole = batched_vjp([output], [x], [cotangents])[0]
    monkeypatch.setattr(tape, "_CHUNK_BYTES", 200)  # two rows at a time
    pieces = batched_vjp([output], [x], [cotangents])[0]
    assert torch.equal(whole, pieces)


def test_products_that_are_not_finite_are_refused() -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="not finite"):
        batched_vjp([x.sum(-1).sqrt()], [x], [torch.ones(2, 3)])
