"""What every linear operator does, against a matrix that is formed another way, in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import diagnostics
from diagnostics import DiagnosticsError, LinearOperator
from diagnostics.alignment.exponents import LayerCurvature
from diagnostics.estimators.linear_operator import MatrixOperator
from diagnostics.estimators.spectral_norm import Products, _Gram
from diagnostics.matrix_free.block_operator import BlockOperator
from diagnostics.operators.curvature import GaussNewtonOperator, HessianOperator, TensorOperator
from diagnostics.operators.fisher import FisherOperator
from diagnostics.operators.parameter_groups import GroupBlock, ParameterGroups
from hessopt.closure.loss_hessian import LossHessian
from hessopt.closure.step_curvature import StepCurvature
from tests.contracts.coverage import uncovered


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


X, Y = normal(5, 3), torch.tensor([0, 1, 1, 0, 1])


def loss_of(net: nn.Module, flat: Tensor) -> Tensor:
    """The loss with parameters taken from one vector."""
    parameters, start = {}, 0
    for name, p in net.named_parameters():
        parameters[name] = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    return F.cross_entropy(functional_call(net, parameters, (X,)), Y)


def hessian(net: nn.Module) -> Tensor:
    """Of the loss in all parameters, by double back-propagation."""
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    found = torch.autograd.functional.hessian(lambda v: loss_of(net, v), flat)
    assert isinstance(found, Tensor)
    return found


def gauss_newton(net: nn.Module) -> Tensor:
    """``Σ_b J_bᵀ ∂²ℓ_b J_b`` with dense Jacobians."""

    def output(flat: Tensor) -> Tensor:
        parameters, start = {}, 0
        for name, p in net.named_parameters():
            parameters[name] = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        return functional_call(net, parameters, (X,))

    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    jacobian = torch.autograd.functional.jacobian(output, flat)
    assert isinstance(jacobian, Tensor)
    probabilities = net(X).detach().softmax(1)
    curvature = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    return torch.einsum("bip,bij,bjq->pq", jacobian, curvature, jacobian) / len(X)


class LinearOperatorContract(ABC):
    """Properties of an operator; a subclass makes one, and the same matrix in another way."""

    kind: ClassVar[type[LinearOperator]]

    @abstractmethod
    def make(self) -> tuple[LinearOperator, Tensor]:
        """The operator and its matrix."""

    def test_products_are_those_of_the_matrix(self) -> None:
        """Of one vector, of one column and of several, to 1e-10."""
        op, matrix = self.make()
        assert type(op) is self.kind
        assert op.shape == tuple(matrix.shape)
        for columns in (1, 3):
            vectors = normal(op.shape[1], columns)
            torch.testing.assert_close(op @ vectors, matrix @ vectors, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(op @ vectors[:, 0], matrix @ vectors[:, 0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(op.matvec(vectors[:, 1]), matrix @ vectors[:, 1], rtol=1e-10, atol=1e-11)

    def test_the_adjoint_is_the_transpose(self) -> None:
        """To 1e-10; of a symmetric operator, itself."""
        op, matrix = self.make()
        vectors = normal(op.shape[0], 2)
        torch.testing.assert_close(op.T @ vectors, matrix.mT @ vectors, rtol=1e-10, atol=1e-11)
        columns = normal(op.shape[1], 2)
        assert torch.equal(op.T.T @ columns, op @ columns)
        assert (op.T is op) == op.symmetric

    def test_what_it_says_of_itself_is_so(self) -> None:
        op, matrix = self.make()
        scale = float(matrix.abs().amax())
        assert matrix.shape[0] == matrix.shape[1] or not op.symmetric
        if op.symmetric:
            torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-12 * scale)
        if op.positive_semidefinite:
            assert op.symmetric
            assert float(torch.linalg.eigvalsh(matrix).amin()) >= -1e-12 * scale * len(matrix)

    def test_dense_and_scipy_are_the_matrix(self) -> None:
        op, matrix = self.make()
        torch.testing.assert_close(op.to_dense(), matrix, rtol=1e-10, atol=1e-11)
        vector = normal(op.shape[1])
        found = torch.from_numpy(op.to_scipy().matvec(vector.numpy()))
        torch.testing.assert_close(found, matrix @ vector, rtol=1e-10, atol=1e-11)

    def test_products_carry_no_tape_and_leave_the_vectors(self) -> None:
        op, _ = self.make()
        vectors = normal(op.shape[1], 2)
        before = vectors.clone()
        assert not (op @ vectors).requires_grad
        assert torch.equal(vectors, before)

    def test_no_columns_are_no_columns(self) -> None:
        op, _ = self.make()
        assert (op @ normal(op.shape[1], 0)).shape == (op.shape[0], 0)

    def test_other_shapes_and_precisions_are_refused(self) -> None:
        op, _ = self.make()
        with pytest.raises(DiagnosticsError, match="got shape"):
            op @ normal(op.shape[1] + 1)
        with pytest.raises(DiagnosticsError, match="convert it first"):
            op @ normal(op.shape[1]).float()


class TestMatrixOperator(LinearOperatorContract):
    kind = MatrixOperator

    def make(self) -> tuple[LinearOperator, Tensor]:
        matrix = normal(4, 6)
        return MatrixOperator(matrix), matrix


class TestAdjoint(LinearOperatorContract):
    kind = type(MatrixOperator(normal(2, 3)).T)

    def make(self) -> tuple[LinearOperator, Tensor]:
        matrix = normal(4, 6)
        return MatrixOperator(matrix.mT.contiguous()).T, matrix


class TestGram(LinearOperatorContract):
    kind = _Gram

    def make(self) -> tuple[LinearOperator, Tensor]:
        matrix = normal(4, 6)
        return _Gram(Products(MatrixOperator(matrix))), matrix.mT @ matrix


class TestHessian(LinearOperatorContract):
    kind = HessianOperator

    def make(self) -> tuple[LinearOperator, Tensor]:
        net = network()
        return HessianOperator(net, (X, Y), F.cross_entropy), hessian(net)


class TestGaussNewton(LinearOperatorContract):
    kind = GaussNewtonOperator

    def make(self) -> tuple[LinearOperator, Tensor]:
        net = network()
        return GaussNewtonOperator(net, (X, Y), F.cross_entropy), gauss_newton(net)


class TestTensor(LinearOperatorContract):
    kind = TensorOperator

    def make(self) -> tuple[LinearOperator, Tensor]:
        net = network()
        return TensorOperator(net, (X, Y), F.cross_entropy), hessian(net) - gauss_newton(net)


class TestFisher(LinearOperatorContract):
    """Of a categorical likelihood: the Gauss-Newton matrix."""

    kind = FisherOperator

    def make(self) -> tuple[LinearOperator, Tensor]:
        net = network()
        return FisherOperator(net, (X, Y), F.cross_entropy, likelihood="categorical"), gauss_newton(net)


class TestLayerCurvature(LinearOperatorContract):
    kind = LayerCurvature

    def make(self) -> tuple[LinearOperator, Tensor]:
        net = network()
        return LayerCurvature(net, (X, Y), F.cross_entropy), hessian(net)


class TestGroupBlock(LinearOperatorContract):
    kind = GroupBlock

    def make(self) -> tuple[LinearOperator, Tensor]:
        net = network()
        op = HessianOperator(net, (X, Y), F.cross_entropy)
        return GroupBlock(op, ParameterGroups(op), "2"), hessian(net)[16:, 16:]  # behind 3·4 + 4 parameters


class TestBlock(LinearOperatorContract):
    """Of two nodes of different sizes: rectangular."""

    kind = BlockOperator

    def make(self) -> tuple[LinearOperator, Tensor]:
        graph = diagnostics.capture(network(), X, lambda z: F.cross_entropy(z, Y))
        v, w = graph.nodes[0].name, graph.nodes[-1].name
        assert graph.size(graph[v]) != graph.size(graph[w])
        return BlockOperator(graph, v, w), diagnostics.hessian_blocks(graph).mean().total[v, w]


class TestLossHessian(LinearOperatorContract):
    kind = LossHessian

    def make(self) -> tuple[LinearOperator, Tensor]:
        net = network()
        loss = F.cross_entropy(net(X), Y)
        return LossHessian(StepCurvature(loss, list(net.parameters())), maximize=True), -hessian(net)


def test_every_implementation_is_covered() -> None:
    assert uncovered(LinearOperator, LinearOperatorContract) == set()
