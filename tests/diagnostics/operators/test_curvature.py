"""Operators against dense curvature by double back-propagation, torch.func and the block recursion; and refusals."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import diagnostics
from diagnostics import CaptureError, DiagnosticsError, StaleGraphError
from diagnostics.operators import curvature_tape
from diagnostics.operators.curvature import (
    CurvatureOperator,
    GaussNewtonOperator,
    HessianOperator,
    TensorOperator,
)
from diagnostics.operators.fisher import FisherOperator
from tests.helpers.curvature import CASES, Dense, dense, randn, wavy
from tests.helpers.networks import Chain
from tests.helpers.oracle import relative_error

OPERATORS: dict[str, tuple[type[CurvatureOperator], Callable[[Dense], Tensor]]] = {
    "total": (HessianOperator, lambda d: d.hessian),
    "gn": (GaussNewtonOperator, lambda d: d.gn),
    "tensor": (TensorOperator, lambda d: d.hessian - d.gn),
}


def chain(*widths: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    widths = widths or (5, 4, 4, 3)
    return Chain(*widths).double(), (randn(6, widths[0]), torch.tensor([0, 2, 1, 1, 0, 2]))


@pytest.fixture(params=["together", "one by one"])
def strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Columns of a product by vmap, or in a loop."""
    limit = 2**40 if request.param == "together" else 0
    monkeypatch.setattr(curvature_tape, "TOGETHER_BYTES", {"cpu": limit, "cuda": limit})
    return request.param


class TestAgainstDenseMatrices:
    @pytest.mark.parametrize("part", OPERATORS)
    @pytest.mark.parametrize("name", CASES)
    def test_equal_double_backpropagation(self, name: str, part: str, strategy: str, device: torch.device) -> None:
        case = CASES[name]
        model, batch = case.build()
        expected = OPERATORS[part][1](oracle := dense(model, batch, case.loss))
        kind = OPERATORS[part][0]
        model, batch = case.build(device)
        op = kind(model, batch, case.loss)
        matrix = op.to_dense().cpu()
        assert (matrix - expected).norm() < 1e-12 * oracle.hessian.norm()
        loss, gradient = op.loss_and_gradient()
        assert relative_error(loss.cpu(), oracle.loss) < 1e-14
        assert relative_error(gradient.cpu(), oracle.gradient) < 1e-13
        vector = torch.randn(op.shape[1], dtype=op.dtype, device=device)
        assert relative_error((op @ vector).cpu(), expected @ vector.cpu()) < 1e-11 or not expected.any()

    @pytest.mark.parametrize("name", sorted(CASES.keys() - {"two_heads"}))
    def test_equal_the_block_recursion(self, name: str) -> None:
        case = CASES[name]
        model, (x, y) = case.build()
        graph = diagnostics.capture(model, x, lambda z: case.loss(z, y))
        for part, (kind, _) in OPERATORS.items():
            expected = diagnostics.parameter_hessian(graph, part)
            assert (kind(model, (x, y), case.loss).to_dense() - expected).norm() < 1e-10 * expected.norm()

    @pytest.mark.parametrize("name", ["chain", "classifier", "residual_cat", "diamond", "called_twice", "cnn"])
    def test_equal_torch_func(self, name: str) -> None:
        case = CASES[name]
        model, (x, y) = case.build()
        op = HessianOperator(model, (x, y), case.loss)

        def loss(point: Tensor) -> Tensor:
            return case.loss(torch.func.functional_call(model, op.unflatten(point), (x,)), y)

        point = op.flatten([p.detach() for p in model.parameters()])
        vector = randn(op.shape[0])
        _, expected = torch.func.vjp(torch.func.grad(loss), point)
        assert relative_error(op @ vector, expected(vector)[0]) < 1e-12

    @pytest.mark.parametrize("name", ["classifier", "tied", "batch_norm_train", "two_heads"])
    def test_products_come_apart_in_one_sweep(self, name: str, strategy: str) -> None:
        case = CASES[name]
        model, batch = case.build()
        oracle = dense(model, batch, case.loss)
        for kind, _ in OPERATORS.values():
            op = kind(model, batch, case.loss)
            vectors = randn(op.shape[0], 5)
            total, gn, tensor = op.products(vectors)
            scale = (oracle.hessian @ vectors).norm()
            assert (total - oracle.hessian @ vectors).norm() < 1e-12 * scale
            assert (gn - oracle.gn @ vectors).norm() < 1e-12 * scale
            assert (tensor - (oracle.hessian - oracle.gn) @ vectors).norm() < 1e-12 * scale
            assert relative_error(op.products(vectors[:, 0]).total, total[:, 0]) < 1e-13

    def test_vmap_is_used_where_it_pays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counts: list[int] = []
        original = curvature_tape.batched_vjp

        def counted(outputs: Any, inputs: Any, cotangents: Any) -> Any:
            counts.append(len(cotangents[0]))
            return original(outputs, inputs, cotangents)

        monkeypatch.setattr(curvature_tape, "batched_vjp", counted)
        model, batch = chain()
        op = HessianOperator(model, batch, F.cross_entropy)
        op @ randn(op.shape[0], 3)
        assert counts == []
        op @ randn(op.shape[0], 4)
        assert counts == [4]
        wide, batch = chain(400, 300, 400, 3)  # 1.9 MiB of parameters
        op = HessianOperator(wide, batch, F.cross_entropy)
        op @ randn(op.shape[0], 4)
        assert counts == [4]

    def test_columns_are_chunked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = chain()
        op = HessianOperator(model, batch, F.cross_entropy)
        expected = op.to_dense()
        (tape,) = op._kept.values()
        monkeypatch.setattr(curvature_tape, "CHUNK_BYTES", 10 * tape.column_bytes)
        assert relative_error(op.to_dense(), expected) < 1e-13

    def test_no_columns_give_no_columns(self) -> None:
        model, batch = chain()
        for kind, _ in OPERATORS.values():
            op = kind(model, batch, F.cross_entropy)
            assert (op @ randn(op.shape[0], 0)).shape == (op.shape[0], 0)

    def test_scipy_finds_the_extreme_eigenvalues(self) -> None:
        case = CASES["residual_cat"]
        model, batch = case.build()
        op = HessianOperator(model, batch, case.loss)
        expected = torch.linalg.eigvalsh(dense(model, batch, case.loss).hessian)
        found = sla.eigsh(op.to_scipy(), k=4, which="BE", return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(found), expected[[0, 1, -2, -1]], rtol=1e-9)

    def test_a_model_without_curvature_has_zero_matrices(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2).double(), randn(4, 3)
        for kind, _ in OPERATORS.values():
            op = kind(model, (x, None), lambda z, _: z.sum())
            assert torch.equal(op.to_dense(), torch.zeros(8, 8, dtype=torch.float64))
            assert torch.equal(op.loss_and_gradient()[1][6:], x.new_full((2,), 4))


class TestParameters:
    @pytest.mark.parametrize("part", OPERATORS)
    def test_a_subset_is_the_submatrix(self, part: str, strategy: str) -> None:
        case = CASES["residual_cat"]
        model, batch = case.build()
        kind = OPERATORS[part][0]
        whole = kind(model, batch, case.loss)
        some = kind(model, batch, case.loss, parameters=["block?.weight", "head.bias"])
        assert list(some.space.parameters) == ["block1.weight", "block2.weight", "head.bias"]
        rows = torch.cat([torch.arange(whole.shape[0])[whole.space.slices[name]] for name in some.space.parameters])
        assert relative_error(some.to_dense(), whole.to_dense()[rows][:, rows]) < 1e-12
        by_predicate = kind(model, batch, case.loss, parameters=lambda name, p: name in some.space.parameters)
        assert torch.equal(by_predicate.to_dense(), some.to_dense())

    def test_parameters_that_the_loss_does_not_depend_on(self, strategy: str) -> None:
        case = CASES["unused"]
        model, batch = case.build()
        for kind, _ in OPERATORS.values():
            op = kind(model, batch, case.loss, parameters=["idle"])
            assert torch.equal(op.to_dense(), torch.zeros(2, 2, dtype=torch.float64))
            assert torch.equal(op.loss_and_gradient()[1], torch.zeros(2, dtype=torch.float64))
            assert torch.equal(op.products(randn(2)).total, torch.zeros(2, dtype=torch.float64))

    def test_frozen_parameters_are_left_out(self) -> None:
        model, batch = chain()
        whole = HessianOperator(model, batch, F.cross_entropy)
        expected = whole.to_dense()[20:, 20:]
        model[0][0].weight.requires_grad_(False)
        assert relative_error(HessianOperator(model, batch, F.cross_entropy).to_dense(), expected) < 1e-13
        with pytest.raises(StaleGraphError, match=r"'0\.0\.weight' was frozen"):
            whole @ randn(whole.shape[0])

    @pytest.mark.parametrize("penalized", ["alone", "times the output"])
    def test_a_loss_with_a_weight_penalty(self, penalized: str, strategy: str) -> None:
        """Its curvature counts to the Gauss-Newton part, as in ``parameter_hessian``."""
        model, (x, y) = chain()
        weight = model[0][0].weight

        def loss(z: Tensor, targets: Tensor) -> Tensor:
            factor = z.square().mean() if penalized == "times the output" else 1.0
            return F.cross_entropy(z, targets) + 0.1 * weight.pow(4).sum() * factor

        graph = diagnostics.capture(model, x, lambda z: loss(z, y))
        for part, (kind, _) in OPERATORS.items():
            op = kind(model, (x, y), loss)
            assert relative_error(op.to_dense(), diagnostics.parameter_hessian(graph, part)) < 1e-12
        gradients = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        assert relative_error(op.loss_and_gradient()[1], op.flatten(gradients)) < 1e-13


class TestSeveralBatches:
    @pytest.mark.parametrize("part", OPERATORS)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("name", ["classifier", "cnn", "tied", "batch_norm_eval", "lstm", "two_heads"])
    def test_ragged_batches_equal_the_one_batch(self, name: str, reduction: Any, part: str) -> None:
        case = CASES[name]
        model, (x, y) = case.build()
        kind = OPERATORS[part][0]

        def loss(z: Any, targets: Any) -> Tensor:
            size = len(z["left"]) if isinstance(z, dict) else len(z)
            return case.loss(z, targets) * (size if reduction == "sum" else 1)

        pieces = [(x[:1], None if y is None else y[:1]), (x[1:], None if y is None else y[1:])]
        one = kind(model, (x, y), loss, reduction=reduction)
        several = kind(model, pieces, loss, reduction=reduction)
        assert len(pieces[0][0]) != len(pieces[1][0])
        assert relative_error(several.to_dense(), one.to_dense()) < 1e-12
        for a, b in zip(several.loss_and_gradient(), one.loss_and_gradient(), strict=True):
            assert relative_error(a, b) < 1e-13
        vectors = randn(one.shape[0], 2)
        for a, b in zip(several.products(vectors), one.products(vectors), strict=True):
            assert relative_error(a, b) < 1e-12

    def test_a_data_loader_that_shuffles(self) -> None:
        model, (x, y) = chain()
        loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
        op = HessianOperator(model, loader, F.cross_entropy)
        matrix = op.to_dense()
        assert relative_error(matrix, HessianOperator(model, (x, y), F.cross_entropy).to_dense()) < 1e-12
        assert torch.equal(op.to_dense(), matrix)  # the order is replayed

    def test_all_columns_in_one_pass_over_the_data(self) -> None:
        class Counting(list[Any]):
            passes = 0

            def __iter__(self) -> Iterator[Any]:
                self.passes += 1
                return super().__iter__()

        model, (x, y) = chain()
        data = Counting([(x[:4], y[:4]), (x[4:], y[4:])])
        op = HessianOperator(model, data, F.cross_entropy)
        before = data.passes
        op @ randn(op.shape[0], 7)
        assert data.passes == before + 1

    def test_a_list_of_one_is_one_batch_whose_tape_is_kept(self) -> None:
        model, batch = chain()
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        op = HessianOperator(model, [batch], F.cross_entropy)
        op.to_dense()
        assert len(calls) == 1

    def test_a_source_whose_size_changes_is_refused(self) -> None:
        class Growing:
            size = 2

            def __iter__(self) -> Iterator[Any]:
                self.size += 1
                return iter([(x[: self.size], y[: self.size])])

        model, (x, y) = chain()
        op = HessianOperator(model, Growing(), F.cross_entropy)
        op @ randn(op.shape[0])
        with pytest.raises(DiagnosticsError, match="5 samples in an earlier pass and 6 in this one"):
            op @ randn(op.shape[0])

    def test_inputs_as_tuples_dicts_and_lists(self) -> None:
        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return torch.tanh(self.left(a)) * self.right(b)

        torch.manual_seed(0)
        model, a, b = Sum().double(), randn(4, 3), randn(4, 3)
        expected = dense(model, ((a, b), None), wavy).hessian
        loader = DataLoader([((a[i], b[i]), i) for i in range(4)], batch_size=3)  # collated to [[a, b], i]
        for batches in (((a, b), None), [({"a": a, "b": b}, None)], loader):
            assert relative_error(HessianOperator(model, batches, wavy).to_dense(), expected) < 1e-12

    def test_batches_are_moved_to_the_parameters(self, device: torch.device) -> None:
        model, batch = chain()
        expected = HessianOperator(model, batch, F.cross_entropy).to_dense()
        op = HessianOperator(model.to(device), batch, F.cross_entropy)
        assert op.device.type == device.type
        assert relative_error(op.to_dense().cpu(), expected) < 1e-12


class TestNoTrace:
    @pytest.mark.parametrize("kind", [k for k, _ in OPERATORS.values()])
    @pytest.mark.parametrize("several", [False, True])
    def test_model_and_random_state_stay(self, kind: type[CurvatureOperator], several: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
        model[0].weight.grad = randn(4, 3)
        x = randn(6, 3)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        grad, rng, inputs = model[0].weight.grad.clone(), torch.get_rng_state(), x.clone()
        op = kind(model, [(x[:3], None), (x[3:], None)] if several else (x, None), wavy)
        first = op @ torch.ones(op.shape[1], dtype=op.dtype)
        assert torch.equal(torch.get_rng_state(), rng)
        torch.rand(3)  # the caller's own draws must not matter
        assert torch.equal(op @ torch.ones(op.shape[1], dtype=op.dtype), first)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(model[0].weight.grad, grad)
        assert [p.grad is None for p in model.parameters()] == [False] + [True] * 5
        assert model.training
        assert torch.equal(x, inputs)
        assert not first.requires_grad
        assert not any(m._forward_hooks for m in model.modules())

    def test_dropout_keeps_the_mask_of_the_construction(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
        batch = randn(4, 3), None
        torch.manual_seed(7)
        expected = dense(model, batch, wavy)
        torch.manual_seed(7)
        assert relative_error(HessianOperator(model, batch, wavy).to_dense(), expected.hessian) < 1e-12
        torch.manual_seed(8)
        assert relative_error(HessianOperator(model, batch, wavy).to_dense(), expected.hessian) > 1e-2

    def test_every_run_starts_from_the_buffers_of_the_construction(self) -> None:
        torch.manual_seed(0)
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))  # a forward pass moves its buffers
        model, x = nn.Sequential(normed, nn.Tanh(), nn.Linear(4, 2)).double().train(), randn(4, 3)
        batches = [(x[:2], None), (x[2:], None)]
        for part, (kind, get) in OPERATORS.items():
            op = kind(model, batches, wavy)
            expected = sum(get(dense(model, batch, wavy)) for batch in batches) / 2
            for _ in range(2):
                assert relative_error(op.to_dense(), expected) < 1e-12, part

    @pytest.mark.parametrize("inplace_on", ["input", "output"])
    def test_operations_in_place_leave_the_data_alone(self, inplace_on: str) -> None:
        model, (x, y) = chain()
        seen = x.relu() if inplace_on == "input" else x
        oracle = dense(model, (seen, y), F.cross_entropy)
        expected = {part: get(oracle) for part, (_, get) in OPERATORS.items()}
        changed = nn.Sequential(nn.ReLU(inplace=True), model) if inplace_on == "input" else model
        before = x.clone()
        for part, (kind, _) in OPERATORS.items():
            for batches in ((x, y), [(x, y), (x, y)]):
                op = kind(changed, batches, lambda z, t: F.cross_entropy(z.mul_(1.0), t))
                assert (op.to_dense() - expected[part]).norm() < 1e-12 * expected["total"].norm()
        assert torch.equal(x, before)

    def test_works_under_no_grad_inference_mode_and_autocast(self) -> None:
        torch.manual_seed(0)
        model, x, y = Chain(5, 4, 3), torch.randn(6, 5), torch.tensor([0, 2, 1, 1, 0, 2])
        for kind, _ in OPERATORS.values():
            expected = kind(model, (x, y), F.cross_entropy).to_dense()
            for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
                with context:
                    one, two = kind(model, (x, y), F.cross_entropy), kind(model, [(x, y), (x, y)], F.cross_entropy)
                    assert torch.equal(one.to_dense(), expected)
                    torch.testing.assert_close(two.to_dense(), expected)
                    assert one.dtype == torch.float32

    def test_vectors_that_require_grad_give_plain_products(self) -> None:
        model, batch = chain()
        op = HessianOperator(model, batch, F.cross_entropy)
        assert not (op @ randn(op.shape[0]).requires_grad_()).requires_grad

    @pytest.mark.parametrize(
        "make",
        [
            *(k for k, _ in OPERATORS.values()),
            partial(FisherOperator, likelihood="categorical"),
            partial(FisherOperator, likelihood="categorical", kind="monte-carlo", generator=torch.Generator()),
            partial(FisherOperator, kind="empirical"),
        ],
    )
    def test_memory_is_freed_with_the_operator(self, make: Callable[..., CurvatureOperator]) -> None:
        model, batch = chain()
        gc.collect()
        gc.disable()
        try:
            op = make(model, batch, F.cross_entropy)
            op.products(op @ randn(op.shape[0]))
            watched = [weakref.ref(op), *(weakref.ref(tape) for tape in op._kept.values())]
            watched += [weakref.ref(g) for tape in op._kept.values() for g in tape.gradients]
            assert len(watched) > 5
            del op
            assert [ref() for ref in watched] == [None] * len(watched)
        finally:
            gc.enable()


class TestFreshness:
    @pytest.mark.parametrize("several", [False, True])
    def test_changed_parameters_need_a_refresh(self, several: bool) -> None:
        model, (x, y) = chain()
        op = HessianOperator(model, [(x[:2], y[:2]), (x[2:], y[2:])] if several else (x, y), F.cross_entropy)
        stale, vector = op.to_dense(), randn(op.shape[0])
        op.products(vector)
        with torch.no_grad():
            model[1][0].bias.add_(0.3)
        with pytest.raises(StaleGraphError, match=r"'1\.0\.bias' was changed.*refresh\(\)"):
            op @ randn(op.shape[0])
        op.refresh()
        assert relative_error(op.to_dense(), dense(model, (x, y), F.cross_entropy).hessian) < 1e-12
        assert relative_error(op.to_dense(), stale) > 1e-3
        assert relative_error(op.products(vector).total, op @ vector) < 1e-12
        model[1][0].bias.data = model[1][0].bias.data.clone()
        with pytest.raises(StaleGraphError, match="was changed"):
            op @ randn(op.shape[0])

    def test_a_switched_mode_needs_a_refresh(self) -> None:
        case = CASES["batch_norm_train"]
        model, batch = case.build()
        op = HessianOperator(model, batch, case.loss)
        model[1].eval()
        with pytest.raises(StaleGraphError, match=r"module '1' was switched by train\(\) or eval\(\)"):
            op @ randn(op.shape[0])
        op.refresh()
        assert relative_error(op.to_dense(), dense(model, batch, case.loss).hessian) < 1e-12

    def test_a_replaced_parameter_is_refused(self) -> None:
        model, (x, y) = chain()
        op = HessianOperator(model, [(x, y), (x, y)], F.cross_entropy)
        model[0][0].bias = nn.Parameter(randn(4))
        with pytest.raises(StaleGraphError, match=r"'0\.0\.bias' was replaced"):
            op @ randn(op.shape[0])


class TestRefusals:
    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            (lambda x, y: (pair for pair in [(x, y)]), "read only once"),
            (lambda x, y: iter([(x, y)]), "read only once"),
            (lambda x, y: [], "batches is empty"),
            (lambda x, y: (x, y, y), "tuple of 3"),
            (lambda x, y: ((x, y), (x, y)), "one batch with two inputs and two targets, or two batches"),
            (lambda x, y: x, "batches is a Tensor"),
            (lambda x, y: [x, y], "batch 0 is a Tensor, not a pair"),
            (lambda x, y: [(x, y, y)], "batch 0 is a tuple of 3, not a pair"),
            (lambda x, y: (x[:0], y[:0]), "the batch is empty"),
            (lambda x, y: (x.half(), y), "too coarse for second derivatives"),
        ],
    )
    def test_of_data(self, batches: Callable[[Tensor, Tensor], Any], message: str) -> None:
        model, (x, y) = chain()
        with pytest.raises(DiagnosticsError, match=message):
            HessianOperator(model, batches(x, y), F.cross_entropy)

    @pytest.mark.parametrize("kind", [k for k, _ in OPERATORS.values()])
    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda z, y: F.cross_entropy(z, y, reduction="none"), r"must return a scalar tensor, got shape \(6,\)"),
            (lambda z, y: F.cross_entropy(z, y).item(), "must return a scalar tensor, got float"),
            (lambda z, y: F.cross_entropy(z, y).detach(), "the loss is detached"),
            (lambda z, y: F.cross_entropy(z, y) * torch.nan, "the loss is nan. The model's output is finite"),
            (lambda z, y: F.cross_entropy(z, y).to(torch.complex64), "the loss is complex"),
            (lambda z, y: z.argmax(), "dtype torch.int64"),
        ],
    )
    def test_of_losses(self, kind: type[CurvatureOperator], loss: Callable[..., Any], message: str) -> None:
        model, batch = chain()
        with pytest.raises(CaptureError, match=message):
            kind(model, batch, loss)

    def test_of_parameters_that_are_not_finite_or_not_exact(self) -> None:
        model, (x, y) = chain()
        with torch.no_grad():
            model[0][0].weight[0, 0] = torch.nan
        with pytest.raises(CaptureError, match=r"Parameter '0\.0\.weight' is not finite"):
            HessianOperator(model, (x, y), F.cross_entropy)
        with pytest.raises(CaptureError, match=r"parameter '0\.0\.weight' has dtype torch.bfloat16"):
            HessianOperator(Chain(5, 4, 3).bfloat16(), (x.bfloat16(), y), F.cross_entropy)
        with pytest.raises(CaptureError, match="is complex"):
            HessianOperator(nn.Linear(3, 2, dtype=torch.complex64), (torch.randn(4, 3), None), wavy)
        with pytest.raises(DiagnosticsError, match="no parameter of Chain requires grad"):
            HessianOperator(Chain(5, 4, 3).requires_grad_(False), (x, y), F.cross_entropy)

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_of_compiled_and_scripted_code(self) -> None:
        model, batch = chain()
        with pytest.raises(CaptureError, match=r"compiled \(torch.compile\)"):
            HessianOperator(torch.compile(model), batch, F.cross_entropy)
        with pytest.raises(CaptureError, match="the loss function is compiled"):
            HessianOperator(model, batch, torch.compile(lambda z, y: F.cross_entropy(z, y)))
        scripted = torch.jit.trace(model, batch[0])
        with pytest.raises(CaptureError, match="scripted or traced"):
            HessianOperator(scripted, batch, F.cross_entropy)

    def test_of_detached_outputs(self) -> None:
        class Detached(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x).detach()

        _, batch = chain()
        with pytest.raises(CaptureError, match="the model's output is detached"):
            HessianOperator(Detached().double(), batch, F.cross_entropy)

    @pytest.mark.parametrize("kind", [k for k, _ in OPERATORS.values()])
    def test_of_checkpointing_and_sparse_gradients(self, kind: type[CurvatureOperator]) -> None:
        class Checkpointed(nn.Module):
            def __init__(self, reentrant: bool) -> None:
                super().__init__()
                self.first, self.last, self.reentrant = nn.Linear(5, 4), nn.Linear(4, 3), reentrant

            def forward(self, x: Tensor) -> Tensor:
                return self.last(checkpoint(lambda h: self.first(h).tanh(), x, use_reentrant=self.reentrant))

        _, (x, y) = chain()
        with pytest.raises(CaptureError, match="saved-tensor hooks"):
            kind(Checkpointed(False).double(), (x, y), F.cross_entropy)
        with pytest.raises(DiagnosticsError, match="checkpoint"):
            kind(Checkpointed(True).double(), (x.requires_grad_(), y), F.cross_entropy)
        embedding = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Tanh(), nn.Flatten()).double()
        with pytest.raises(DiagnosticsError, match="sparse"):
            kind(embedding, (torch.tensor([[0, 1], [2, 2]]), None), wavy)

    @pytest.mark.parametrize("kind", [k for k, _ in OPERATORS.values()])
    @pytest.mark.parametrize("marked", [False, True])
    def test_of_backward_passes_without_a_derivative(self, kind: type[CurvatureOperator], marked: bool) -> None:
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x.square()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                (x,) = ctx.saved_tensors
                return 2 * (x * grad).detach()

        if marked:
            Square.backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        model[1].forward = Square.apply
        _, batch = chain()
        with pytest.raises(DiagnosticsError, match="cannot be differentiated twice"):
            kind(model, batch, F.cross_entropy) @ randn(39)

    def test_of_an_operation_with_a_wrong_second_derivative(self) -> None:
        class Skewed(torch.autograd.Function):
            """x² summed over features, with a backward that is no gradient of anything."""

            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x.square().sum(-1, keepdim=True)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                (x,) = ctx.saved_tensors
                return grad * (2 * x + x.cumsum(-1))

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(1, 2)).double()
        model[1].forward = Skewed.apply
        op = HessianOperator(model, (randn(5, 3), None), wavy)
        with pytest.raises(DiagnosticsError, match="not symmetric"):
            op.check_symmetric()
        for name in ("chain", "batch_norm_train", "attention", "tied"):
            model, batch = CASES[name].build()
            assert HessianOperator(model, batch, CASES[name].loss).check_symmetric() < 1e-14

    def test_of_infinite_second_derivatives(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2, bias=False).double(), randn(4, 3)
        nn.init.zeros_(model.weight)
        op = HessianOperator(model, (x, None), lambda z, _: z.abs().pow(1.5).sum())
        with pytest.raises(DiagnosticsError, match="not finite"):
            op @ randn(6)

    def test_of_arguments(self) -> None:
        model, batch = chain()
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
            HessianOperator(lambda x: x, batch, F.cross_entropy)
        with pytest.raises(TypeError, match="loss_fn must be callable"):
            HessianOperator(model, batch, "cross_entropy")
        with pytest.raises(ValueError, match='reduction must be "mean" or "sum"'):
            HessianOperator(model, batch, F.cross_entropy, reduction="none")
        op = HessianOperator(model, batch, F.cross_entropy)
        with pytest.raises(DiagnosticsError, match="multiplies vectors"):
            op.products(randn(3))
        with pytest.raises(DiagnosticsError, match="convert it first"):
            op.products(randn(op.shape[0]).float())
        with pytest.raises(TypeError, match="multiplies tensors, got list"):
            op.products([1.0])
