"""Closed forms of losses' second derivatives against double back-propagation, and losses declared as modules."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hessopt import KroneckerNewton
from hessopt.closure.loss_curvature import criterion_curvature
from hessopt.errors import ClosureError, ModelError, NotConvexError
from tests.helpers.kronecker_reference import batch, chain, gather, kronecker_arguments, kronecker_band

F64 = torch.float64
WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=F64)


class PseudoHuber(nn.Module):
    """Convex, and none of PyTorch's."""

    def __init__(self, sign: int = 1) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.sign * ((1 + (prediction - target).square()).sqrt() - 1).sum(-1).mean()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def classes(*shape: int) -> Tensor:
    return torch.randint(0, 3, shape, generator=generator(1))


def probabilities(*shape: int) -> Tensor:
    return drawn(*shape, seed=2).softmax(1)


def rates(*shape: int) -> Tensor:
    return drawn(*shape, seed=3).exp()


CASES: dict[str, tuple[nn.Module, Tensor, tuple[Any, ...]]] = {
    "cross entropy": (nn.CrossEntropyLoss(), drawn(4, 3), (classes(4),)),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHT), drawn(4, 3), (classes(4),)),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), drawn(4, 3), (classes(4),)),
    "both": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3), drawn(4, 3), (classes(4),)),
    "ignored": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3, ignore_index=0),
        drawn(4, 3, 2),
        (classes(4, 2),),
    ),
    "padded": (nn.CrossEntropyLoss(), drawn(4, 3), (torch.tensor([0, -100, 2, -100]),)),
    "sum": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), drawn(4, 3, 2), (classes(4, 2),)),
    "probabilities": (nn.CrossEntropyLoss(), drawn(4, 3), (probabilities(4, 3),)),
    "weighted probabilities": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        drawn(4, 3, 2),
        (probabilities(4, 3, 2),),
    ),
    "mse": (nn.MSELoss(), drawn(4, 3), (drawn(4, 3, seed=1),)),
    "mse, sum": (nn.MSELoss(reduction="sum"), drawn(4), (drawn(4, seed=1),)),
    "bce": (nn.BCEWithLogitsLoss(), drawn(4, 3), (probabilities(4, 3),)),
    "bce, weights": (
        nn.BCEWithLogitsLoss(weight=rates(4, 1), pos_weight=WEIGHT, reduction="sum"),
        drawn(4, 3),
        (probabilities(4, 3),),
    ),
    "poisson": (nn.PoissonNLLLoss(), drawn(4, 3), (rates(4, 3).round(),)),
    "poisson, full": (nn.PoissonNLLLoss(full=True, reduction="sum"), drawn(4), (rates(4).round(),)),
    "poisson of rates": (nn.PoissonNLLLoss(log_input=False), rates(4, 3), (rates(4, 3).round(),)),
    "gaussian": (nn.GaussianNLLLoss(), drawn(4, 3), (drawn(4, 3, seed=1), rates(4, 3))),
    "gaussian, var (B, 1)": (nn.GaussianNLLLoss(reduction="sum"), drawn(4, 3), (drawn(4, 3, seed=1), rates(4, 1))),
    "gaussian, var (B,)": (nn.GaussianNLLLoss(full=True), drawn(4, 3), (drawn(4, 3, seed=1), rates(4))),
    "gaussian, small var": (nn.GaussianNLLLoss(eps=0.7), drawn(4, 3), (drawn(4, 3, seed=1), rates(4, 3) / 2)),
}


def second_moment(columns: Tensor) -> Tensor:
    """``Σ_k s_k s_kᵀ`` of each sample."""
    flat = columns.reshape(*columns.shape[:2], -1)
    return torch.einsum("kbi,kbj->bij", flat, flat)


def hessians(criterion: nn.Module, z: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """The diagonal blocks, ``(B, K, K)``, of the Hessian, which has no others."""
    whole = torch.autograd.functional.hessian(lambda t: criterion(t, *rest), z).reshape(z.numel(), -1)
    width = z[0].numel()
    blocks = [whole[i : i + width, i : i + width] for i in range(0, len(whole), width)]
    assert torch.equal(torch.block_diag(*blocks), whole)
    return torch.stack(blocks)


@pytest.mark.parametrize("name", CASES)
def test_exact_columns_are_a_root_of_the_hessian(name: str) -> None:
    criterion, z, rest = CASES[name]
    form = criterion_curvature(criterion, z, *rest)
    assert form is not None
    expected = hessians(criterion, z, rest)
    assert torch.allclose(second_moment(form.columns("exact", False, generator())), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sampled", [False, True])
def test_random_columns_have_it_as_their_expectation(name: str, sampled: bool) -> None:
    criterion, z, rest = CASES[name]
    form = criterion_curvature(criterion, z, *rest)
    assert form is not None
    expected = hessians(criterion, z, rest)
    found = second_moment(form.columns(20_000, sampled, generator()))
    assert torch.allclose(found, expected, atol=0.06 * float(expected.abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (4,)])
def test_mean_and_variance_have_the_fisher_information(reduction: str, shape: tuple[int, ...]) -> None:
    """Its expectation over targets of the Hessian is exact with three nodes: that is quadratic in them."""
    criterion, mean, variance = nn.GaussianNLLLoss(reduction=reduction), drawn(4, 3), rates(*shape)
    expanded = variance.reshape(4, -1).expand(4, 3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    expected: Any = 0.0

    def loss(m: Tensor, v: Tensor, target: Tensor) -> Tensor:
        return criterion(m, target, v)

    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        target = mean + expanded.sqrt() * node  # the same node everywhere, since the loss is a sum over entries
        rows = torch.autograd.functional.hessian(lambda m, v, t=target: loss(m, v, t), (mean, variance))
        sizes = (mean.numel(), variance.numel())
        whole = [torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip(sizes, rows, strict=True)]
        expected = expected + weight * torch.cat(whole)
    form = criterion_curvature(criterion, mean, mean, variance.clone().requires_grad_())
    assert form is not None
    columns = form.columns("exact", False, generator())
    found = second_moment(columns)
    order = torch.cat([torch.arange(12).view(4, 3), 12 + torch.arange(variance.numel()).view(4, -1)], 1)
    for b in range(4):
        assert torch.allclose(found[b], expected[order[b]][:, order[b]], rtol=1e-10, atol=1e-12)


def test_predicted_variances_reach_both_heads() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.mean, self.spread = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.body(x))
            return self.mean(h), nn.functional.softplus(self.spread(h))

    net, x = Heads(), torch.randn(64, 4, generator=generator())
    y = x[:, :2] + 0.1 * x[:, 2:].exp() * torch.randn(64, 2, generator=generator(1))
    criterion = nn.GaussianNLLLoss()
    optimizer = KroneckerNewton(net, bandwidth=1, loss=criterion)
    losses = []
    for _ in range(60):
        mean, variance = net(x)
        loss = criterion(mean, y, variance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.band.averages.factors is not None
    assert len(optimizer.band.averages.factors.blocks) == 3
    assert losses[-1] < losses[0] - 1


MODULES: dict[str, tuple[nn.Module, bool]] = {
    "weights and smoothing": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0], dtype=F64), label_smoothing=0.1),
        True,
    ),
    "mse": (nn.MSELoss(), False),
    "broadcast": (nn.MSELoss(), False),
    "other": (PseudoHuber(), False),
    "huber": (nn.HuberLoss(delta=10.0), False),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", MODULES)
def test_a_module_gives_the_factors_of_an_undeclared_loss(name: str) -> None:
    criterion, labelled = MODULES[name]
    net, (x, y, labels) = chain(), batch()
    target = labels if labelled else y[:, :1] if name == "broadcast" else y
    options: dict[str, Any] = {"curvature": "ggn", "columns": "exact"}
    declared = kronecker_band(net, 1, loss=criterion, **options)
    gather(declared, criterion(net(x), target))
    assert not declared.waits
    undeclared = kronecker_band(net, 1, **options)
    z = net(x)
    undeclared.gather(criterion(z, target), z)
    undeclared.commit()
    assert declared.averages.factors is not None
    assert undeclared.averages.factors is not None
    assert declared.scale == pytest.approx(undeclared.scale, rel=1e-10)
    for a, b in zip(declared.averages.factors.tensors, undeclared.averages.factors.tensors, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_positions_as_rows_are_those_of_the_class_dimension(curvature: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    twin = copy.deepcopy(net)
    tokens, target = torch.randint(0, 7, (3, 6)), torch.randint(0, 7, (3, 6))
    criterion = nn.CrossEntropyLoss()
    by_name = kronecker_band(net, 0, curvature=curvature, loss="cross_entropy", class_dim=-1, columns=2000)
    module = kronecker_band(twin, 0, curvature=curvature, loss=criterion, columns=2000)
    gather(by_name, net(tokens))
    gather(module, criterion(twin(tokens).flatten(0, 1), target.flatten()))
    assert by_name.averages.factors is not None
    assert module.averages.factors is not None
    for a, b in zip(by_name.averages.factors.tensors, module.averages.factors.tensors, strict=True):
        assert torch.allclose(a, b, atol=0.1 * float(a.abs().max()))


def test_exact_columns_of_positions_that_mix() -> None:
    """Rows of the output are positions here, which an average over the sequence couples."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            z: Tensor = self.last(h + 3 * h.mean(1, keepdim=True))
            return z

    torch.manual_seed(0)
    net, criterion = Mixing().double(), nn.MSELoss(reduction="sum")
    x, y = torch.randn(1, 5, 2, dtype=F64), torch.zeros(5, 2, dtype=F64)
    mean: Any = 0.0
    for seed in range(400):
        band = kronecker_band(net, 0, curvature="ggn", loss=criterion, columns="exact", seed=seed)
        gather(band, criterion(net(x).flatten(0, 1), y))
        assert band.averages.factors is not None
        block = [b.modules[0] for b in band.averages.factors.blocks].index(net.first)
        number, start = band.averages.factors.place[block]
        mean = mean + band.averages.factors.stacks[number].outputs[start] / 400
        band.detach()
    mixing = torch.eye(5, dtype=F64) + 3 / 5
    expected = 2 * mixing.square().sum() * (net.last.weight.mT @ net.last.weight).detach()
    assert torch.allclose(mean, expected, atol=0.1 * float(expected.diagonal().max()))


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(64, 4)
    return net, x, (x[:, :3] * x[:, 1:]).argmax(1)


def build(net: nn.Module, criterion: nn.Module, **options: Any) -> KroneckerNewton:
    return KroneckerNewton(net, **kronecker_arguments(loss=criterion, **options))


def step(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = criterion(net(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks)


def test_with_and_without_closure_alike() -> None:
    net, x, y = problem()
    twin, criterion = copy.deepcopy(net), nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer, other = build(net, criterion), build(twin, criterion)
    for _ in range(12):
        before = step(optimizer, criterion, net, x, y)
        after = other.step(lambda: criterion(twin(x), y))
        assert after is not None
        assert after.item() == before
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    assert before < 0.9


def test_other_networks_and_validation_are_not_gathered() -> None:
    net, x, y = problem()
    criterion = nn.CrossEntropyLoss()
    optimizer, band = build(net, criterion), None
    other = copy.deepcopy(net)
    criterion(other(x), y)
    with torch.no_grad():
        criterion(net(x), y)
    band = optimizer.band
    assert band.averages.factors is None
    assert band.waits
    step(optimizer, criterion, net, x, y)
    assert band.averages.factors is not None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_hooks_leave_with_theoptimizer(clone: Any) -> None:
    net, x, y = problem()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    optimizer = build(net, criterion)
    for _ in range(3):
        step(optimizer, criterion, net, x, y)
    twin, resumed, its = clone((net, optimizer, criterion))
    assert resumed.loss is its
    for _ in range(15):
        assert step(optimizer, criterion, net, x, y) == step(resumed, its, twin, x, y)
    assert hooks(criterion) == hooks(its) == 1
    del optimizer
    gc.collect()
    assert hooks(criterion) == 0
    assert hooks(copy.deepcopy(its)) == 1  # a dead one, which does nothing
    step(resumed, its, twin, x, y)


@pytest.mark.parametrize("maximize", [False, True])
def test_any_module_without_a_closure(maximize: bool) -> None:
    net, x, _ = problem()
    criterion = PseudoHuber(-1 if maximize else 1)
    optimizer = KroneckerNewton(net, maximize=maximize, loss=criterion)
    losses = [criterion.sign * step(optimizer, criterion, net, x, x[:, :3]) for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


class Mixed(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().mean().sqrt()


class Pair(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (z - y).square().mean(), z


class Concave(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return -(z - y).square().mean()


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (Mixed(), ModelError, "not a sum or mean over samples"),
        (Pair(), ModelError, "the declared Pair does not return the loss"),
        (Concave(), NotConvexError, "not convex"),
    ],
)
def test_modules_that_do_not_fit(criterion: nn.Module, error: type[Exception], message: str) -> None:
    net, x, _ = problem()
    optimizer = build(net, criterion)
    value = criterion(net(x), x[:, :3])
    (value[0] if isinstance(value, tuple) else value).backward()
    with pytest.raises(error, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": nn.MSELoss(reduction="none")}, 'declared MSELoss has reduction="none"'),
        (
            {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0]))},
            "weight of the declared CrossEntropyLoss has neg",
        ),
        ({"loss": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([-1.0]))}, "pos_weight of the declared"),
        ({"loss": nn.functional.mse_loss}, 'loss must be one of "cross_entropy".*a torch.nn.Module'),
        ({"loss": "mse", "class_dim": -1}, "class_dim must be an integer, and the loss"),
        ({"loss": None, "reduction": "sum"}, 'only the reduction is known, is for curvature="empirical"'),
    ],
)
def test_bad_declarations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KroneckerNewton(nn.Linear(2, 2), **kronecker_arguments(**options))


def test_a_declared_module_that_is_not_called() -> None:
    net, x, y = problem()
    optimizer = build(net, nn.CrossEntropyLoss())
    with pytest.raises(ClosureError, match=r"the declared CrossEntropyLoss was not called.*Call that very module"):
        optimizer.step(lambda: nn.functional.cross_entropy(net(x), y))
    nn.functional.cross_entropy(net(x), y).backward()
    with pytest.raises(ClosureError, match="no curvature was gathered"):
        optimizer.step()


def test_subclasses_with_a_forward_of_their_own_have_no_closed_form() -> None:
    class Doubled(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    class Named(nn.MSELoss):
        pass

    z, y = drawn(4, 3), drawn(4, 3, seed=1)
    assert criterion_curvature(Doubled(), z, y) is None
    assert criterion_curvature(Named(), z, y) is not None
    assert criterion_curvature(nn.MSELoss(), z, y[:, :1]) is None  # broadcast
    net, (x, y, _) = chain(), batch()
    scales = []
    for criterion in (Doubled(), nn.MSELoss()):
        band = kronecker_band(net, 0, curvature="ggn", columns="exact", loss=criterion)
        gather(band, criterion(net(x), target=y))
        scales.append(band.scale)
        band.detach()
    assert scales[0] == pytest.approx(2 * scales[1])


def test_random_state_is_theoptimizers_own() -> None:
    for name, (criterion, z, rest) in itertools.islice(CASES.items(), 3):
        before = torch.get_rng_state()
        form = criterion_curvature(criterion, z, *rest)
        assert form is not None, name
        form.columns(2, True, generator())
        assert torch.equal(before, torch.get_rng_state())
