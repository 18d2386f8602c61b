"""Networks that compute in several precisions: exact to the coarsest, and not taken for wrong derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics import DiagnosticsError
from diagnostics.autograd import tape
from diagnostics.operators.curvature import HessianOperator
from tests.helpers.oracle import joint_double_backprop, joint_error, relative_error

F32, F64 = torch.float32, torch.float64


class _RMSNorm(nn.Module):
    """As in every model of transformers: in single precision, whatever the model's."""

    def __init__(self, d: int, inside: torch.dtype = F32) -> None:
        super().__init__()
        self.weight, self.inside = nn.Parameter(torch.ones(d)), inside

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.inside)
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class _Block(nn.Module):
    def __init__(self, inside: torch.dtype) -> None:
        super().__init__()
        self.norm, self.up, self.down = _RMSNorm(4, inside), nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def _normalised(inside: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), _Block(inside), _Block(inside), _RMSNorm(4, inside), nn.Linear(4, 3)).double()


X, Y = torch.linspace(-1, 1, 15, dtype=F64).view(5, 3).sin(), torch.tensor([0, 1, 2, 0, 1])
NODES = ["0", "1", "2", "4"]


def _graph(model: nn.Module, x: Tensor = X, nodes: Any = NODES) -> diagnostics.Graph:
    return diagnostics.capture(model, x, lambda z: F.cross_entropy(z, Y), nodes)


def test_normalisation_in_single_precision_inside_a_double_network() -> None:
    """To the rounding of single precision, against the same network in double precision throughout."""
    model, exact = _normalised(F32), _normalised(F64)
    blocks = diagnostics.hessian_blocks(_graph(model))
    oracle = joint_double_backprop(exact, X, lambda z: F.cross_entropy(z, Y), NODES)
    assert joint_error(blocks.total, oracle.total) < 1e-5
    assert joint_error(blocks.gn, oracle.gn) < 1e-5
    for part in ("total", "gn", "tensor"):
        found = diagnostics.parameter_hessian(_graph(model), part)  # type: ignore[arg-type]
        assert relative_error(found, diagnostics.parameter_hessian(_graph(exact), part)) < 1e-5  # type: ignore[arg-type]
    for v in NODES:  # eigenvalues are asked of them
        block = blocks.mean().total[v, v]
        assert torch.allclose(block, block.mT, rtol=0, atol=1e-12 * block.norm().item())


def test_everything_takes_it() -> None:
    model = _normalised(F32)
    diagnostics.estimate_metrics(_graph(model), probes=3)
    assert HessianOperator(model, (X, Y), F.cross_entropy).check_symmetric() < 1e-4
    report = diagnostics.diagnose(model, (X, Y), F.cross_entropy, nodes=NODES, progress=False)
    assert set(report.to_dict()["sections"]) >= {"metrics", "sources", "spectrum", "parameters"}


def test_its_products_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in single precision is not taken for a wrong batching rule."""

    def never(*_: Any) -> list[Tensor]:
        raise AssertionError("products were computed one by one")

    monkeypatch.setattr(tape, "_one_by_one", never)
    diagnostics.hessian_blocks(_graph(_normalised(F32)))


class _Wrong(torch.autograd.Function):
    """The square, with a backward of which the derivative is not symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), (g,) = ctx.saved_tensors, gradients
        return g * (2 * x + 0.5 * x.roll(1, -1))


class _WrongNorm(_RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_Wrong.apply(x))  # type: ignore[no-untyped-call]


def test_a_wrong_backward_is_still_refused_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), _WrongNorm(6), nn.Linear(6, 3)).double()
    with pytest.raises(DiagnosticsError, match="is not symmetric"):
        diagnostics.hessian_blocks(_graph(model, nodes=["0", "2"]))
    with pytest.raises(DiagnosticsError, match="is not symmetric"):
        HessianOperator(model, (X, Y), F.cross_entropy).check_symmetric()


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _two_halves(first: torch.dtype, second: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    scaled = nn.LayerNorm(4)  # no patches: its Jacobian is formed
    parts = [nn.Linear(3, 4), nn.Tanh(), scaled, _To(second), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*(part.to(first if i < 3 else second) for i, part in enumerate(parts)))


@pytest.mark.parametrize(("first", "second"), [(F32, F64), (F64, F32)])
def test_layers_of_two_precisions_give_curvature_in_the_finer(first: torch.dtype, second: torch.dtype) -> None:
    model, exact = _two_halves(first, second), _two_halves(F64, F64)
    exact.load_state_dict(model.state_dict())
    graph = _graph(model, X.to(first), ["0", "4", "6"])
    assert graph.dtype == F64
    for part in ("total", "gn", "tensor"):
        found = diagnostics.parameter_hessian(graph, part)  # type: ignore[arg-type]
        assert found.dtype == F64
        expected = diagnostics.parameter_hessian(_graph(exact), part)  # type: ignore[arg-type]
        assert relative_error(found, expected) < 1e-5
    blocks = diagnostics.hessian_blocks(graph)
    oracle = joint_double_backprop(exact, X, lambda z: F.cross_entropy(z, Y), ["0", "4", "6"])
    assert joint_error(blocks.total, oracle.total) < 1e-5
    with pytest.raises(DiagnosticsError, match=r"several dtypes: .*choose nodes of one .*hessian_blocks"):
        diagnostics.estimate_metrics(graph, probes=3)
    with pytest.raises(DiagnosticsError, match="several dtypes"):
        HessianOperator(model, (X.to(first), Y), F.cross_entropy)
