"""BandedNewton's manners as a torch.optim.Optimizer: closures, groups, state, copies."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hessopt import BandedNewton, Damped, Fixed
from tests.helpers.kronecker_reference import (
    LAMBDA,
    Dag,
    batch,
    chain,
    closure_of,
    dense,
    flat,
    losses,
    regression,
    relative,
    resumes,
    skip,
    trained,
    with_backward,
)

RTOL = 1e-8


@pytest.mark.parametrize("loss", ["mse", "cross entropy", "least squares"])
def test_closures_with_and_without_backward_give_the_same_steps(loss: str) -> None:
    ends = []
    for backward in (False, True):
        net = skip()
        closure = closure_of(net, loss)
        optimizer = BandedNewton(net)
        for _ in range(5):
            optimizer.step(with_backward(net, closure) if backward else closure)
        ends.append(flat(trained(net)).detach())
    assert relative(*ends) < RTOL  # the gradient is known as Ĵᵀr only where the closure leaves it to the optimizer


def test_gradients_are_not_touched() -> None:
    net, closure = regression()
    marks = [torch.full_like(p, 3.0) for p in net.parameters()]
    for p, mark in zip(net.parameters(), marks, strict=True):
        p.grad = mark
    BandedNewton(net).step(closure)
    assert all(p.grad is mark and bool((mark == 3).all()) for p, mark in zip(net.parameters(), marks, strict=True))


def test_inside_no_grad() -> None:
    ends = []
    for enabled in (True, False):
        net, closure = regression()
        optimizer = BandedNewton(net)
        with torch.set_grad_enabled(enabled):
            optimizer.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)


def test_loss_with_its_output() -> None:
    ends = []
    for pair in (False, True):
        net, x = chain(), batch()[0]

        def closure(net: Dag = net, x: Tensor = x, pair: bool = pair) -> Any:
            z = net(x)
            loss = losses(2)["mse"](z)
            return (loss, z) if pair else loss

        BandedNewton(net).step(closure)
        ends.append(flat(trained(net)).detach())
    assert torch.equal(*ends)


def test_dropout_and_random_state(device: torch.device) -> None:
    """The trial sees the mask of the first run; afterwards the random state is as if the closure had run once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2)).double().to(device)
    x = torch.randn(9, 3, dtype=torch.float64, device=device)
    trials = []

    def closure() -> Tensor:
        loss = net(x).square().mean()
        trials.append(loss.item())
        return loss

    torch.manual_seed(3)
    closure()
    expected = torch.rand(2), torch.rand(2, device=device)
    trials.clear()
    torch.manual_seed(3)
    BandedNewton(net, lr=1e-30).step(closure)
    assert len(trials) == 2
    assert trials[0] == trials[1]
    found = torch.rand(2), torch.rand(2, device=device)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_zero_gradient_and_zero_lr_change_nothing() -> None:
    net, closure = regression()
    before = [p.detach().clone() for p in net.parameters()]
    BandedNewton(net).step(lambda: closure() * 0)
    optimizer = BandedNewton(net, lr=0.0)
    optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert not optimizer.last_step.accepted
    assert optimizer.state[net[0].weight]["damping"] == 1e-2


def test_ways_to_pass_the_network() -> None:
    ends = []
    for form in (
        lambda net: BandedNewton(net),
        lambda net: BandedNewton(net.parameters(), model=net),
        lambda net: BandedNewton(net.named_parameters(), model=net),
        lambda net: BandedNewton([{"params": m.parameters()} for m in net if isinstance(m, nn.Linear)], model=net),
        lambda net: BandedNewton(net, model=net),
    ):
        net, closure = regression()
        optimizer = form(net)
        for _ in range(2):
            optimizer.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_some_parameters_only() -> None:
    net, closure = regression()
    before = [p.detach().clone() for p in net.parameters()]
    BandedNewton(net[2:5].parameters(), model=net).step(closure)
    changed = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    assert changed == [False, False, True, True, True, True, False, False]


def test_single_linear_layer_as_the_network() -> None:
    torch.manual_seed(0)
    net, (x, y, _) = nn.Linear(2, 2).double(), batch()
    optimizer = BandedNewton(net, search=Damped(1e-10))
    for _ in range(3):
        optimizer.step(lambda: functional.mse_loss(net(x), y))
    ones = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], dim=1)
    best = torch.linalg.lstsq(ones, y).solution
    assert torch.allclose(torch.cat([net.weight.T, net.bias[None]]), best, rtol=1e-6)


@pytest.mark.parametrize("through_file", [False, True])
def test_resume_bit_for_bit(through_file: bool) -> None:
    net, closure = regression()
    other, again = regression(seed=9)
    resumed = BandedNewton(other)  # the options come with the state
    resumes((net, BandedNewton(net, search=Damped(1e-4), lr=0.9), closure), (other, resumed, again), through_file)
    assert resumed.state_dict()["state"][0]["step"] == 9


def test_param_groups_hold_hyperparameters_only() -> None:
    net, closure = regression()
    optimizer = BandedNewton(net)
    optimizer.step(closure)
    assert set(optimizer.param_groups[0]) == {"params", "lr", "weight_decay", "maximize", "momentum"}
    assert len(optimizer.state) == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(clone: Callable[[BandedNewton], BandedNewton]) -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, bandwidth=2, search=Damped(0.1, max_rejections=7))
    for _ in range(3):
        optimizer.step(closure)
    twin = clone(optimizer)
    assert twin.model is not net
    assert twin.param_groups[0]["params"][0] is twin.model[0].weight
    assert (twin.bandwidth, twin.search, twin.last_step) == (2, optimizer.search, optimizer.last_step)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = (x[:, :1] * x[:, 1:]).sin()
    for _ in range(3):
        optimizer.step(closure)
        twin.step(lambda: functional.mse_loss(twin.model(x), y))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.model.parameters(), strict=True))


def test_lr_scheduler_and_tensor_lr() -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, lr=torch.tensor(1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        optimizer.step(closure)
        schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == 0.125


def test_hooks_and_printing() -> None:
    net, closure = regression()
    optimizer = BandedNewton(net)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(closure)
    assert seen == ["before", "after"]
    assert repr(optimizer).startswith("BandedNewton (")


def test_unfreezing_and_new_groups_later() -> None:
    net, closure = regression()
    net[0].requires_grad_(False)
    optimizer = BandedNewton(net[:4].parameters(), model=net)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(closure)
    assert torch.equal(net[0].weight, before[0])
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": net[4:].parameters(), "lr": 0.5})
    optimizer.step(closure)
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_structure_may_change_between_steps() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(2, 2).double() for _ in range(3))
            self.parallel = False

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.c(h) + torch.tanh(self.b(x)) if self.parallel else self.c(torch.tanh(self.b(h)))

    net, (x, y, _) = Switch(), batch()
    optimizer = BandedNewton(net, bandwidth="full", search=Fixed(LAMBDA))
    for parallel in (False, True, False):
        net.parallel = parallel
        layers = [net.a, net.c, net.b] if parallel else [net.a, net.b, net.c]
        expected = dense(net, x, losses(2)["mse"], layers)
        parameters = [[m.weight, m.bias] for m in layers]
        before = flat(parameters).detach().clone()
        optimizer.step(lambda: functional.mse_loss(net(x), y))
        matrix = expected.ggn + LAMBDA * torch.eye(len(expected.ggn), dtype=torch.float64)
        assert relative(flat(parameters).detach() - before, -torch.linalg.solve(matrix, expected.gradient)) < RTOL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    net, _ = regression(dtype=torch.float32 if autocast else dtype)
    net[-1] = nn.Linear(8, 3, dtype=net[0].weight.dtype)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=net[0].weight.dtype)
    labels = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 0] > 1).long()

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            return functional.cross_entropy(net(x), labels)

    optimizer = BandedNewton(net)
    values = [optimizer.step(closure).item() for _ in range(12)]
    assert values[-1] < 0.5 * values[0]
    assert net[0].weight.dtype == (torch.float32 if autocast else dtype)


def test_device(device: torch.device) -> None:
    net, _ = regression()
    net.to(device)
    x, y, _ = batch(outputs=1)
    optimizer = BandedNewton(net)
    values = [optimizer.step(lambda: functional.mse_loss(net(x.to(device)), y.to(device))).item() for _ in range(5)]
    assert values[-1] < values[0]
