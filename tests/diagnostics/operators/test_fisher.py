"""Fisher matrices against expectations written out over targets, and per-sample gradients one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics import DiagnosticsError
from diagnostics.operators.curvature import GaussNewtonOperator
from diagnostics.operators.fisher import FisherOperator
from tests.helpers.curvature import CASES, TiedLanguageModel, dense, randn, token_cross_entropy, two_heads_loss
from tests.helpers.networks import Chain
from tests.helpers.oracle import relative_error

CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])
COUNTS = torch.tensor([[0, 1, 4], [2, 0, 0], [0, 3, 1], [1, 1, 1], [0, 5, 0], [1, 0, 2]], dtype=torch.float64)
EVENTS = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64)


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Chain(5, 4, 4, 3).double(), randn(6, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_squares(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum() / len(z)


def poisson(z: Tensor, y: Tensor) -> Tensor:
    return F.poisson_nll_loss(z, y, reduction="sum") / len(z)


def binary(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)


LOSSES: dict[str, tuple[str, Callable[[Any, Any], Tensor], Tensor, float]] = {
    # likelihood, loss, targets, the factor on -log p apart from 1/B
    "cross entropy": ("categorical", F.cross_entropy, CLASSES, 1.0),
    "summed cross entropy": ("categorical", lambda z, y: F.cross_entropy(z, y, reduction="sum"), CLASSES, 6.0),
    "half squares": ("gaussian", half_squares, EVENTS, 1.0),
    "mean squares": ("gaussian", F.mse_loss, EVENTS, 2 / 3),
    "binary": ("bernoulli", binary, EVENTS, 1.0),
    "poisson": ("poisson", poisson, COUNTS, 1.0),
    "mean poisson": ("poisson", F.poisson_nll_loss, COUNTS, 1 / 3),
    "mean binary": ("bernoulli", F.binary_cross_entropy_with_logits, EVENTS, 1 / 3),
}


def _outcomes(likelihood: str, z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """All targets of one sample with their scores; probabilities from the loss itself, exp(-nll)."""
    size = len(z)
    if likelihood == "categorical":
        targets = [torch.tensor(k) for k in range(size)]
        nll: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    else:
        targets = [torch.tensor(bits, dtype=z.dtype) for bits in itertools.product((0.0, 1.0), repeat=size)]
        nll = lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum")  # noqa: E731
    found = []
    for y in targets:
        free = z.detach().requires_grad_()
        value = nll(free, y)
        found.append((value.detach().neg().exp(), torch.autograd.grad(value, free)[0]))
    assert abs(sum(p for p, _ in found) - 1) < 1e-14
    return found


def _expected(likelihood: str, z: Tensor, jacobian: Tensor) -> Tensor:
    """``Σ_b J_bᵀ E[s sᵀ] J_b`` by summing over all targets."""
    total = torch.zeros(jacobian.shape[1], jacobian.shape[1], dtype=z.dtype)
    for row, own in zip(z, jacobian.reshape(*z.shape, -1), strict=True):
        if likelihood == "gaussian":
            total += own.T @ own
        elif likelihood == "poisson":  # the variance of a count is its rate
            total += own.T @ row.exp().diag() @ own
        else:
            for p, score in _outcomes(likelihood, row):
                g = own.T @ score
                total += p * torch.outer(g, g)
    return total


class TestTypeTwo:
    @pytest.mark.parametrize("name", LOSSES)
    def test_equals_the_expectation_over_all_targets(self, name: str, device: torch.device) -> None:
        likelihood, loss, y, factor = LOSSES[name]
        model, x = network()
        expected = factor / 6 * _expected(likelihood, model(x).detach(), dense(model, (x, y), loss).jacobian)
        op = FisherOperator(model.to(device), (x, y), loss, likelihood=likelihood, reduction="mean")
        assert relative_error(op.to_dense().cpu(), expected) < 1e-12
        assert op.positive_semidefinite

    @pytest.mark.parametrize("name", LOSSES)
    def test_equals_the_gauss_newton_matrix_over_ragged_batches(self, name: str) -> None:
        likelihood, loss, y, _ = LOSSES[name]
        model, x = network()
        reduction = "sum" if "summed" in name else "mean"
        batches = [(x[:2], y[:2]), (x[2:], y[2:])]
        op = FisherOperator(model, batches, loss, likelihood=likelihood, reduction=reduction)
        gn = GaussNewtonOperator(model, (x, y), loss, reduction=reduction)
        assert relative_error(op.to_dense(), gn.to_dense()) < 1e-12

    @pytest.mark.parametrize(
        "loss",
        [
            token_cross_entropy,
            lambda z, ids: F.cross_entropy(z.mT, ids, ignore_index=1),
            lambda z, ids: F.cross_entropy(z.mT, ids, weight=torch.tensor([1, 2, 0.5, 3, 1], dtype=z.dtype)),
            lambda z, ids: token_cross_entropy(z[:, :-1], ids[:, 1:]),
            lambda z, ids: F.cross_entropy(z.mT, ids, label_smoothing=0.1),
        ],
    )
    def test_positions_have_factors_of_their_own(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        model, batch = CASES["tied"].build()
        op = FisherOperator(model, batch, loss, likelihood="categorical")
        assert relative_error(op.to_dense(), dense(model, batch, loss).gn) < 1e-12

    def test_classes_along_the_second_dimension(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 1)).double()
        batch = randn(2, 1, 4, 3), torch.randint(0, 3, (2, 3, 2))
        op = FisherOperator(model, batch, F.cross_entropy, likelihood="categorical")
        assert relative_error(op.to_dense(), dense(model, batch, F.cross_entropy).gn) < 1e-12
        drawn = FisherOperator(
            model, batch, F.cross_entropy,
            likelihood="categorical", kind="monte-carlo", samples=20_000, generator=generator(),
        )  # fmt: skip
        assert relative_error(drawn.to_dense(), op.to_dense()) < 0.03

    def test_a_weight_penalty_is_left_out(self) -> None:
        model, x = network()
        loss = lambda z, y: F.cross_entropy(z, y) + model[0][0].weight.pow(4).sum()  # noqa: E731
        op = FisherOperator(model, (x, CLASSES), loss, likelihood="categorical")
        plain = FisherOperator(model, (x, CLASSES), F.cross_entropy, likelihood="categorical")
        assert relative_error(op.to_dense(), plain.to_dense()) < 1e-12


class TestMonteCarlo:
    @pytest.mark.parametrize("name", LOSSES)
    def test_mean_is_type_two(self, name: str) -> None:
        likelihood, loss, y, _ = LOSSES[name]
        model, x = network()
        exact = FisherOperator(model, (x, y), loss, likelihood=likelihood).to_dense()
        errors = []
        for samples in (100, 10_000):
            op = FisherOperator(
                model, (x, y), loss,
                likelihood=likelihood, kind="monte-carlo", samples=samples, generator=generator(),
            )  # fmt: skip
            errors.append(relative_error(op.to_dense(), exact))
        assert errors[1] < 0.04
        assert errors[1] < errors[0] / 3  # one over the root of 100 on average

    @pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
    def test_one_draw_is_the_gradient_of_one_of_the_targets(self, likelihood: str) -> None:
        model, x = network()
        loss = F.cross_entropy if likelihood == "categorical" else binary
        y = CLASSES if likelihood == "categorical" else EVENTS
        jacobian = dense(model, (x[:1], y[:1]), loss).jacobian
        candidates = [jacobian.T @ score for _, score in _outcomes(likelihood, model(x[0]))]
        seen = set()
        for seed in range(30):
            op = FisherOperator(
                model, (x[:1], y[:1]), loss, likelihood=likelihood, kind="monte-carlo", generator=generator(seed)
            )
            errors = [relative_error(op.to_dense(), torch.outer(g, g)) for g in candidates]
            assert min(errors) < 1e-12
            seen.add(errors.index(min(errors)))
        assert len(seen) >= 3

    def test_positions_are_drawn_apart(self) -> None:
        """Outer products of single positions, so the rank is their number."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        batch = torch.tensor([[0, 1, 4]]), torch.tensor([[1, 4, 2]])
        op = FisherOperator(
            model, batch, token_cross_entropy, likelihood="categorical", kind="monte-carlo", generator=generator()
        )
        assert torch.linalg.matrix_rank(op.to_dense()) == 3

    def test_products_are_of_one_matrix_and_the_generator_decides(self) -> None:
        model, x = network()
        batches = [(x[:2], CLASSES[:2]), (x[2:], CLASSES[2:])]
        source = generator()

        def operator(batches: Any) -> FisherOperator:
            return FisherOperator(
                model, batches, F.cross_entropy, likelihood="categorical", kind="monte-carlo", generator=source
            )

        rng = torch.get_rng_state()
        several, again = operator(batches), operator(batches)
        matrix = several.to_dense()
        assert relative_error(several.to_dense(), matrix) < 1e-15
        assert relative_error(again.to_dense(), matrix) > 0.01
        assert relative_error(matrix, matrix.T) < 1e-13
        assert several.check_deterministic().difference == 0
        one = operator((x, CLASSES))
        first = one.to_dense()
        one.refresh()
        assert torch.equal(one.to_dense(), first)
        assert torch.equal(torch.get_rng_state(), rng)
        source = generator()
        assert torch.equal(operator(batches).to_dense(), matrix)


class TestEmpirical:
    @staticmethod
    def _by_samples(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Any, Any], Tensor]) -> Tensor:
        total: Tensor | float = 0.0
        for i in range(len(x)):
            grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
            g = torch.cat([part.reshape(-1) for part in grads])
            total = total + torch.outer(g, g)
        assert isinstance(total, Tensor)
        return total

    @pytest.mark.parametrize("name", [n for n in LOSSES if "summed" not in n])
    def test_equals_the_gradients_of_single_samples(self, name: str, device: torch.device) -> None:
        _, loss, y, _ = LOSSES[name]
        model, x = network()
        expected = self._by_samples(model, x, y, loss) / 6
        model.to(device)
        for batches in ((x, y), [(x[:2], y[:2]), (x[2:], y[2:])]):
            op = FisherOperator(model, batches, loss, kind="empirical")
            assert relative_error(op.to_dense().cpu(), expected) < 1e-12

    def test_of_sums(self) -> None:
        model, x = network()
        loss = LOSSES["summed cross entropy"][1]
        expected = self._by_samples(model, x, CLASSES, loss)
        for batches in ((x, CLASSES), [(x[:2], CLASSES[:2]), (x[2:], CLASSES[2:])]):
            op = FisherOperator(model, batches, loss, kind="empirical", reduction="sum")
            assert relative_error(op.to_dense(), expected) < 1e-12

    def test_of_sequences_and_of_several_outputs(self) -> None:
        model, (x, y) = CASES["tied"].build()
        expected = self._by_samples(model, x, y, token_cross_entropy) / 3
        op = FisherOperator(model, (x, y), token_cross_entropy, kind="empirical")
        assert relative_error(op.to_dense(), expected) < 1e-12
        model, (x, y) = CASES["two_heads"].build()
        expected = self._by_samples(model, x, y, two_heads_loss) / 4
        op = FisherOperator(model, (x, y), two_heads_loss, kind="empirical")
        assert relative_error(op.to_dense(), expected) < 1e-12

    def test_of_an_output_that_the_loss_does_not_use(self) -> None:
        model, (x, y) = CASES["two_heads"].build()

        def loss(z: dict[str, Tensor], y: Tensor) -> Tensor:
            return F.cross_entropy(z["right"], y)

        wrapped = nn.Sequential(model)
        expected = self._by_samples(model, x, y, lambda z, y: loss(z, y) + 0 * z["left"].sum()) / 4
        assert relative_error(FisherOperator(wrapped, (x, y), loss, kind="empirical").to_dense(), expected) < 1e-12
        type_two = FisherOperator(wrapped, (x, y), loss, likelihood="categorical")
        assert relative_error(type_two.to_dense(), GaussNewtonOperator(wrapped, (x, y), loss).to_dense()) < 1e-12


class TestRefusals:
    def test_of_losses_that_are_no_such_likelihood(self) -> None:
        model, x = network()
        for likelihood, loss, y in (
            ("gaussian", F.cross_entropy, CLASSES),
            ("categorical", F.mse_loss, EVENTS),
            ("bernoulli", F.cross_entropy, CLASSES),
            ("gaussian", lambda z, y: F.mse_loss(z, y).sqrt(), EVENTS),
            ("gaussian", lambda z, y: -F.mse_loss(z, y), EVENTS),
            ("categorical", lambda z, y: F.nll_loss(z.softmax(-1).log().square().neg(), y), CLASSES),
        ):
            with pytest.raises(DiagnosticsError, match=f"not the negative log-likelihood of a {likelihood}"):
                FisherOperator(model, (x, y), loss, likelihood=likelihood)
        with pytest.raises(DiagnosticsError, match="no curvature in z"):
            FisherOperator(model, (x, CLASSES), lambda z, y: z.sum(), likelihood="categorical")

    def test_of_samples_that_cannot_be_told_apart(self) -> None:
        model, x = network()
        with pytest.raises(DiagnosticsError, match="not a sum of losses of samples"):
            FisherOperator(model, (x, EVENTS), lambda z, y: F.mse_loss(z, y).sqrt(), kind="empirical")
        summed = nn.Sequential(model, nn.Flatten(0))
        with pytest.raises(DiagnosticsError, match=r"gradients of 6 samples apart, but .* shape \(18,\)"):
            FisherOperator(summed, (x, EVENTS.flatten()), F.mse_loss, kind="empirical")

    def test_of_several_outputs(self) -> None:
        model, batch = CASES["two_heads"].build()
        with pytest.raises(DiagnosticsError, match="uses 2 output tensors"):
            FisherOperator(model, batch, two_heads_loss, likelihood="categorical")

    def test_of_arguments(self) -> None:
        model, x = network()
        batch = x, CLASSES
        with pytest.raises(ValueError, match="kind must be one of 'type-2', 'monte-carlo', 'empirical', got 'exact'"):
            FisherOperator(model, batch, F.cross_entropy, kind="exact", likelihood="categorical")
        with pytest.raises(ValueError, match="likelihood must be one of"):
            FisherOperator(model, batch, F.cross_entropy, likelihood="gamma")
        with pytest.raises(ValueError, match="say which it is"):
            FisherOperator(model, batch, F.cross_entropy)
        with pytest.raises(ValueError, match="pass a source, generator="):
            FisherOperator(model, batch, F.cross_entropy, kind="monte-carlo", likelihood="categorical")
        with pytest.raises(ValueError, match="samples must be at least 1"):
            FisherOperator(model, batch, F.cross_entropy, samples=0, likelihood="categorical")

    def test_tied_weights_are_one_parameter(self) -> None:
        assert FisherOperator(
            TiedLanguageModel().double(), CASES["tied"].build()[1], token_cross_entropy, kind="empirical"
        ).shape == (27, 27)
