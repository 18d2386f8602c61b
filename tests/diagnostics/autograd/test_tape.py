"""What the autograd tape is asked, and whether batched products can be trusted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diagnostics.autograd import tape
from diagnostics.autograd.tape import Verified, ancestry, batched_vjp, passes_through, walk
from tests.helpers.oracle import relative_error


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


def test_walk_meets_every_function_once_and_does_not_pass_where_it_turns_back() -> None:
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    middle = torch.tanh(a)
    end = (middle + b) * middle
    names = [function.name() for function in walk(end.grad_fn)]
    assert names[0] == "MulBackward0"
    leaf = "torch::autograd::AccumulateGrad"
    assert sorted(names) == ["AddBackward0", "MulBackward0", "TanhBackward0", leaf, leaf]
    short = [function.name() for function in walk(end.grad_fn, lambda function: function is middle.grad_fn)]
    assert sorted(short) == ["AddBackward0", "MulBackward0", "TanhBackward0", leaf]
    assert list(walk(middle.grad_fn, lambda function: True)) == [middle.grad_fn]
    assert list(walk(None)) == []


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


class _ExpInPlace(torch.autograd.Function):
    """exp whose backward works in place on a tensor that torch.vmap does not batch."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return torch.ones_like(ctx.saved_tensors[0]).mul_(grad) * ctx.saved_tensors[0].exp()


def test_what_vmap_cannot_do_is_done_one_by_one() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    output = _ExpInPlace.apply(x)
    with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
        torch.vmap(lambda c: torch.autograd.grad(output, [x], c, retain_graph=True))(torch.ones(5, 3, 4))
    cotangents = torch.randn(5, 3, 4)
    (products,) = batched_vjp([output], [x], [cotangents])
    assert torch.allclose(products, cotangents * x.exp().detach())


def test_large_rounding_is_not_taken_for_an_infinite_derivative() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    output = ((x + 1e13 * x.sum()) - 1e13 * x.sum()) ** 2  # products agree to a few digits only
    cotangents = torch.randn(6, 1, 3, dtype=torch.float64)
    (products,) = batched_vjp([output], [x], [cotangents])
    single = torch.stack([torch.autograd.grad(output, [x], c, retain_graph=True)[0] for c in cotangents])
    assert torch.equal(products, single)


def test_a_missing_derivative_is_not_taken_for_a_missing_batching_rule() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 3])
    (slope,) = torch.autograd.grad(torch.nn.functional.multi_margin_loss(x, labels), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="multi_margin_loss_backward is not implemented"):
        batched_vjp([slope], [x], [torch.ones(2, 3, 4)])


def test_operations_on_the_tape_are_found_from_its_end_to_its_leaves() -> None:
    x = torch.randn(3, requires_grad=True)
    end = torch.tanh(x.exp()) * 2
    assert all(passes_through(end, f"{name}Backward0") for name in ("Mul", "Tanh", "Exp"))
    assert not passes_through(end, "SinBackward0")
    assert not passes_through(torch.ones(3), "ExpBackward0")


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    output = torch.tanh(x).cumsum(-1)
    cotangents = torch.randn(7, 3, 4)
    whole = batched_vjp([output], [x], [cotangents])[0]
    monkeypatch.setattr(tape, "CHUNK_BYTES", 200)  # two rows at a time
    pieces = batched_vjp([output], [x], [cotangents])[0]
    assert torch.equal(whole, pieces)


class TestVerified:
    """Products over a tape that was found right are not checked again; all others are."""

    @staticmethod
    def _single_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Grows by one for each product that is not batched."""
        seen: list[int] = []
        original = torch.autograd.grad

        def counted(outputs: object, inputs: object, cotangents: list[Tensor], **options: object) -> object:
            if not torch._C._functorch.is_batchedtensor(cotangents[0]):
                seen.append(1)
            return original(outputs, inputs, cotangents, **options)

        monkeypatch.setattr(torch.autograd, "grad", counted)
        return seen

    def test_a_tape_is_checked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, unused = torch.randn(3, 4, requires_grad=True), torch.randn(2, requires_grad=True)
        output, other = torch.tanh(x), torch.sin(x)
        cotangents = torch.randn(7, 3, 4)
        checked, verified = batched_vjp([output], [unused, x], [cotangents]), Verified()
        seen = self._single_products(monkeypatch)
        for _ in range(3):
            nothing, products = batched_vjp([output], [unused, x], [cotangents], verified)
            assert nothing is None
            assert torch.equal(products, checked[1])
        assert len(seen) == 1
        batched_vjp([other], [unused, x], [cotangents], verified)
        batched_vjp([output], [x], [cotangents], verified)
        assert len(seen) == 3

    @pytest.mark.parametrize("operation", [OPERATIONS["cdist"], lambda x: _ExpInPlace.apply(x)], ids=["wrong", "none"])
    def test_a_tape_that_cannot_be_batched_is_never_trusted(self, operation: Callable[[Tensor], Tensor]) -> None:
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output, verified = operation(x), Verified()
        cotangents = torch.randn(5, *output.shape, dtype=torch.float64)
        single = torch.stack([torch.autograd.grad(output, [x], c, retain_graph=True)[0] for c in cotangents])
        for _ in range(2):
            (products,) = batched_vjp([output], [x], [cotangents], verified)
            assert relative_error(products, single) < 1e-14
            assert verified.used([output], [x]) is None

    def test_what_is_not_finite_is_refused_all_the_same(self) -> None:
        x, verified = torch.ones(3, requires_grad=True), Verified()
        output = x.square()
        batched_vjp([output], [x], [torch.ones(2, 3)], verified)
        with pytest.raises(RuntimeError, match="not finite"):
            batched_vjp([output], [x], [torch.full((2, 3), torch.inf)], verified)
        (large,) = batched_vjp([output], [x], [torch.full((2, 3), 1e38)], verified)  # only their sum overflows
        assert large.isfinite().all()


def test_products_that_are_not_finite_are_refused() -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="not finite"):
        batched_vjp([x.sum(-1).sqrt()], [x], [torch.ones(2, 3)])
