"""NullProject keeps final updates off its memory, after momentum, Adam and weight decay; the memories themselves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics.operators.curvature import HessianOperator
from hessopt.errors import ClosureError, ModelError
from hessopt.memories import gpm_memory, hessian_top_memory, null_memory, ogd_memory, random_memory
from hessopt.wrappers.memory import LayerMemory, Memory, SubspaceMemory, memory_from_state
from hessopt.wrappers.null_project import NullProject
from tests.hessopt.wrappers.test_null_boost import BASES, Problem

F64 = torch.float64
DECAYING: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd, momentum, decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "lbfgs": BASES["lbfgs"],
}


def _operator(problem: Problem) -> HessianOperator:
    return HessianOperator(problem.net, (problem.x, problem.y), F.cross_entropy)


MEMORIES: dict[str, Callable[[Problem], Memory]] = {
    "null": lambda problem: null_memory(_operator(problem), 16),
    "hessian_top": lambda problem: hessian_top_memory(_operator(problem), 8),
    "ogd": lambda problem: ogd_memory(problem.net, problem.x, problem.y),
    "gpm": lambda problem: gpm_memory(problem.net, problem.x, 0.9),
    "random": lambda problem: random_memory(problem.net, 8),
}


def _violation(memory: Memory, update: list[Tensor]) -> float:
    """How much of a unit update is where the memory does not want it; dense, from the definitions."""
    flat = torch.cat([u.reshape(-1) for u in update])
    if isinstance(memory, SubspaceMemory):
        inside = memory.basis @ (memory.basis.mT @ flat)
        return float((flat - inside if memory.keep else inside).norm() / flat.norm())
    assert isinstance(memory, LayerMemory)
    total = 0.0
    for (weight, bias), basis in memory.bases.items():
        joint = torch.cat([update[weight], update[bias].unsqueeze(1)], 1)
        total += float((joint @ basis).square().sum())
    return total**0.5 / float(flat.norm())


@pytest.mark.parametrize("base", DECAYING)
@pytest.mark.parametrize("kind", MEMORIES)
def test_the_final_update_is_orthogonal_to_the_memory(kind: str, base: str, device: torch.device) -> None:
    problem = Problem(device)
    plain = copy.deepcopy(problem)
    memory = MEMORIES[kind](problem)
    assert memory.numbers > 0
    optimizer = NullProject(DECAYING[base](problem.net.parameters()), memory, model=problem.net)
    reference = DECAYING[base](plain.net.parameters())
    for _ in range(6):
        before = [p.detach().clone() for p in problem.net.parameters()]
        optimizer.step(problem.closure(optimizer))
        update = [p.detach() - b for p, b in zip(problem.net.parameters(), before, strict=True)]
        assert sum(float(u.norm()) for u in update) > 1e-6
        assert _violation(memory, update) <= 1e-12
        assert all(p.requires_grad for p in problem.net.parameters())
    before = [p.detach().clone() for p in plain.net.parameters()]
    for _ in range(3):
        reference.step(plain.closure(reference))  # type: ignore[arg-type]
    update = [p.detach() - b for p, b in zip(plain.net.parameters(), before, strict=True)]
    assert _violation(memory, update) > 1e-3  # the base alone does not care


def test_projecting_the_gradient_is_not_enough() -> None:
    """Adam and weight decay turn a projected gradient back into the memory: why the update is projected."""
    problem = Problem()
    memory = MEMORIES["ogd"](problem)
    optimizer = DECAYING["adamw"](problem.net.parameters())
    before = [p.detach().clone() for p in problem.net.parameters()]
    problem.closure(optimizer)()
    parameters = list(problem.net.parameters())
    for p, g in zip(parameters, memory.project([p.grad for p in parameters]), strict=True):  # type: ignore[misc]
        p.grad = g
    optimizer.step()
    assert _violation(memory, [p.detach() - b for p, b in zip(parameters, before, strict=True)]) > 0.05


@pytest.mark.parametrize("base", BASES)
def test_without_a_memory_it_is_the_base_bit_for_bit(base: str, device: torch.device) -> None:
    ours, plain = Problem(device), Problem(device)
    optimizer, reference = NullProject(BASES[base](ours.net.parameters())), BASES[base](plain.net.parameters())
    for _ in range(5):
        loss = optimizer.step(ours.closure(optimizer))
        assert loss == reference.step(plain.closure(reference))  # type: ignore[arg-type]
        assert torch.equal(ours.flat(), plain.flat())


def test_the_projection_is_the_nearest_allowed_update() -> None:
    torch.manual_seed(0)
    basis = torch.randn(7, 3, dtype=F64)
    updates = [torch.randn(2, 2, dtype=F64), torch.randn(3, dtype=F64)]
    flat = torch.cat([u.reshape(-1) for u in updates])
    fit = basis @ torch.linalg.lstsq(basis, flat.unsqueeze(1)).solution.squeeze(1)
    for keep, expected in ((False, flat - fit), (True, fit)):
        memory = SubspaceMemory(basis, ["a", "b"], [(2, 2), (3,)], keep=keep)
        found = torch.cat([u.reshape(-1) for u in memory.project(updates)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("keep", [False, True])
def test_what_does_not_move_stays_and_the_joint_update_is_allowed(keep: bool) -> None:
    torch.manual_seed(0)
    basis = torch.randn(9, 5, dtype=F64)
    memory = SubspaceMemory(basis, ["a", "b", "c"], [(3,), (2,), (4,)], keep=keep)
    updates = [torch.randn(3, dtype=F64), torch.zeros(2, dtype=F64), torch.randn(4, dtype=F64)]
    found = memory.project(updates)
    assert not found[1].any()
    assert _violation(memory, found) <= 1e-12
    free = torch.cat([basis[:3], basis[5:]])
    flat, moved = (torch.cat([u[0], u[2]]) for u in (updates, found))
    if keep:  # the nearest of { Bc : B_held c = 0 }
        kernel = torch.linalg.svd(basis[3:5]).Vh[2:].mT
        free = free @ kernel
        expected = free @ torch.linalg.lstsq(free, flat.unsqueeze(1)).solution.squeeze(1)
    else:
        expected = flat - free @ torch.linalg.lstsq(free, flat.unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    assert all(not u.any() for u in memory.project([torch.zeros_like(u) for u in updates]))


def test_a_frozen_layer_stays() -> None:
    problem = Problem()
    for kind in MEMORIES:
        problem = Problem()
        # at 0.9, what GPM remembers would leave the weight alone no freedom
        memory = gpm_memory(problem.net, problem.x, 0.5) if kind == "gpm" else MEMORIES[kind](problem)
        optimizer = NullProject(DECAYING["adamw"](problem.net.parameters()), memory, model=problem.net)
        problem.net[0].bias.requires_grad_(False)
        before = [p.detach().clone() for p in problem.net.parameters()]
        optimizer.step(problem.closure(optimizer))
        assert torch.equal(before[1], problem.net[0].bias)
        update = [p.detach() - b for p, b in zip(problem.net.parameters(), before, strict=True)]
        assert sum(float(u.norm()) for u in update) > 1e-6
        assert _violation(memory, update) <= 1e-12


def test_ogd_remembers_gradients_of_the_outputs() -> None:
    problem = Problem()
    parameters = list(problem.net.parameters())
    rows = []
    for x, y in zip(problem.x, problem.y, strict=True):
        slopes = torch.autograd.grad(problem.net(x)[y], parameters)
        rows.append(torch.cat([s.reshape(-1) for s in slopes]))
    expected = torch.stack(rows, 1)
    memory = ogd_memory(problem.net, problem.x, problem.y)
    assert memory.basis.shape == expected.shape
    outside = expected - memory.basis @ (memory.basis.mT @ expected)
    assert outside.norm() <= 1e-12 * expected.norm()
    everything = ogd_memory(problem.net, problem.x[:4])
    assert everything.basis.shape[1] == 12


def test_hessian_top_holds_the_dominant_eigenvectors_and_null_the_isotropic_span() -> None:
    problem = Problem()
    hessian = problem.hessian()
    memory = hessian_top_memory(_operator(problem), 4)
    values, vectors = torch.linalg.eigh(hessian)
    top = vectors[:, values.abs().argsort(descending=True)[:4]]
    assert torch.linalg.svdvals(top.mT @ memory.basis).min() > 0.99  # 1 to within the square of rtol over gaps
    kept = null_memory(_operator(problem), 16)
    assert kept.keep
    form = kept.basis.mT @ hessian @ kept.basis
    assert form.abs().max() <= 1e-12 * values.abs().max()


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gpm_leaves_the_response_to_remembered_inputs(convolution: bool, bias: bool) -> None:
    """At threshold 1 the output for these inputs cannot change, whatever is trained: that is the theorem."""
    torch.manual_seed(0)
    if convolution:
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=bias), nn.Tanh(), nn.Conv2d(4, 5, 2, dilation=2, bias=bias),
            nn.Tanh(), nn.Flatten(), nn.Linear(20, 3, bias=bias),
        ).double()  # fmt: skip
        x, z = torch.randn(1, 3, 8, 8, dtype=F64), torch.randn(9, 3, 8, 8, dtype=F64)
    else:
        net = nn.Sequential(nn.Linear(8, 9, bias=bias), nn.Tanh(), nn.Linear(9, 7, bias=bias)).double()
        x, z = torch.randn(4, 8, dtype=F64), torch.randn(9, 8, dtype=F64)
    memory = gpm_memory(net, x, 1.0)
    if convolution:  # 16 + 1 patches of the first layer fill 27 (+ 1) entries only in part
        assert all(basis.shape[1] < basis.shape[0] for basis in memory.bases.values())
    optimizer = NullProject(torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1), memory, model=net)
    before, other = net(x).detach(), net(z).detach()
    for _ in range(5):
        optimizer.step(lambda: net(z).square().sum())
    torch.testing.assert_close(net(x).detach(), before, rtol=0, atol=1e-10)
    assert (net(z) - other).abs().max() > 1e-2


def test_gpm_takes_the_fewest_directions_that_hold_the_share() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 2, bias=False).double()
    first = torch.randn(40, 6, dtype=F64) * torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1])
    second = torch.randn(40, 6, dtype=F64) * torch.tensor([2.0, 1.5, 1.0, 1.0, 2.0, 3.0])
    memory = gpm_memory(net, first, 0.9)
    basis = memory.bases[0, -1]
    values = torch.linalg.svdvals(first).square().cumsum(0) / first.square().sum()
    assert basis.shape[1] == int((values < 0.9).sum()) + 1
    for x, data in ((memory, first), (gpm_memory(net, second, 0.9, memory), second)):
        held = x.bases[0, -1]
        assert (data @ held).square().sum() >= 0.9 * data.square().sum()
        torch.testing.assert_close(held.mT @ held, torch.eye(held.shape[1], dtype=F64), rtol=0, atol=1e-12)
    assert torch.equal(gpm_memory(net, second, 0.9, memory).bases[0, -1][:, : basis.shape[1]], basis)
    assert gpm_memory(net, first, 0.9, memory).bases[0, -1].shape == basis.shape  # known already
    outside = second - second @ basis @ basis.mT
    known = (second.square().sum() - outside.square().sum()) / second.square().sum()
    further = known + torch.linalg.svdvals(outside).square().cumsum(0) / second.square().sum()
    assert known > 0.05
    added = gpm_memory(net, second, 0.9, memory).bases[0, -1].shape[1] - basis.shape[1]
    assert added == int((further < 0.9).sum()) + 1
    assert gpm_memory(net, first, [0.5]).numbers < memory.numbers


def test_memories_grow_and_stay_orthonormal() -> None:
    problem = Problem()
    first = ogd_memory(problem.net, problem.x[:5], problem.y[:5])
    both = ogd_memory(problem.net, problem.x[3:9], problem.y[3:9], first)
    assert both.basis.shape[1] == 9  # 3 and 4 are in both
    torch.testing.assert_close(both.basis.mT @ both.basis, torch.eye(9, dtype=F64), rtol=0, atol=1e-12)
    assert torch.equal(both.basis[:, :5], first.basis)
    assert random_memory(problem.net, 4, both, seed=1).basis.shape[1] == 13
    assert hessian_top_memory(_operator(problem), 3, both).basis.shape[1] == 12
    with pytest.raises(ValueError, match="directions to remove"):
        random_memory(problem.net, 4, null_memory(_operator(problem), 8))
    with pytest.raises(ValueError, match="gpm_memory made"):
        gpm_memory(problem.net, problem.x, 0.9, both)


def test_directions_are_contiguous_however_they_came() -> None:
    """Projections are bound by memory: with the directions across rows they take three times as long."""
    shapes = [torch.Size((4, 5)), torch.Size((3,))]
    for keep in (False, True):
        memory = SubspaceMemory(torch.linalg.qr(torch.randn(23, 6)).Q.contiguous(), ["a", "b"], shapes, keep=keep)
        state = memory.state_dict()
        state["basis"] = state["basis"].contiguous()  # as a file format may bring it back
        grown = memory.extended(torch.randn(23, 2))
        for each in (memory, grown, memory_from_state(state)):
            assert each.basis.mT.is_contiguous()  # type: ignore[attr-defined]
        memory.project([torch.randn(4, 5), torch.zeros(3)])
        assert memory._restricted is not None
        assert memory._restricted[1].mT.is_contiguous()


@pytest.mark.parametrize("kind", MEMORIES)
def test_making_a_memory_changes_nothing_and_is_deterministic(kind: str) -> None:
    problem = Problem()
    for p in problem.net.parameters():
        p.grad = torch.ones_like(p)
    start, state = problem.flat(), torch.get_rng_state()
    first, second = (MEMORIES[kind](problem).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(start, problem.flat())
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in problem.net.parameters())  # type: ignore[arg-type]
    assert problem.net.training
    assert not problem.net[0]._forward_pre_hooks
    for a, b in zip(_tensors(first), _tensors(second), strict=True):
        assert torch.equal(a, b)
    again = memory_from_state(pickle.loads(pickle.dumps(first))).state_dict()
    for a, b in zip(_tensors(first), _tensors(again), strict=True):
        assert torch.equal(a, b)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [t for part in inside for t in _tensors(part)]


@pytest.mark.parametrize("kind", MEMORIES)
def test_resuming_goes_on_bit_for_bit(kind: str) -> None:
    problem = Problem()
    optimizer = NullProject(DECAYING["adamw"](problem.net.parameters()), MEMORIES[kind](problem), model=problem.net)
    for _ in range(3):
        optimizer.step(problem.closure(optimizer))
    other = copy.deepcopy(problem)
    second = NullProject(DECAYING["adamw"](other.net.parameters()), model=other.net)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pickled = pickle.loads(pickle.dumps((problem, optimizer)))
    for _ in range(3):
        optimizer.step(problem.closure(optimizer))
        second.step(other.closure(second))
        pickled[1].step(pickled[0].closure(pickled[1]))
    assert torch.equal(problem.flat(), other.flat())
    assert torch.equal(problem.flat(), pickled[0].flat())


def test_groups_in_another_order_are_matched_by_name_and_new_ones_are_free() -> None:
    problem = Problem()
    memory = MEMORIES["ogd"](problem)
    parameters = list(problem.net.parameters())
    reordered = [{"params": parameters[2:]}, {"params": parameters[:2], "lr": 0.01}]
    with pytest.raises(ValueError, match="pass model="):
        NullProject(torch.optim.SGD(reordered, lr=0.1), memory)
    optimizer = NullProject(torch.optim.SGD(reordered, lr=0.1), memory, model=problem.net)
    head = nn.Parameter(torch.ones(3, dtype=F64))
    optimizer.add_param_group({"params": [head]})
    before = [p.detach().clone() for p in parameters]
    optimizer.step(lambda: problem.loss() + (head * problem.net(problem.x).mean(0)).sum())
    assert _violation(memory, [p.detach() - b for p, b in zip(parameters, before, strict=True)]) <= 1e-12
    assert not torch.equal(head, torch.ones_like(head))


def test_a_matrix_is_a_memory_and_steps_need_no_closure() -> None:
    problem = Problem()
    columns = torch.randn(len(problem.flat()), 3, dtype=F64)
    optimizer = NullProject(torch.optim.Adam(problem.net.parameters(), lr=0.1), columns)
    before = problem.flat()
    problem.loss().backward()
    assert optimizer.step() is None
    update = problem.flat() - before
    assert update.norm() > 0
    assert (columns.mT @ update).abs().max() <= 1e-12
    optimizer.memory = None
    assert optimizer.memory is None
    named = NullProject(torch.optim.Adam(problem.net.parameters(), lr=0.1), columns, model=problem.net)
    assert named.memory is not None
    assert named.memory.names == tuple(name for name, _ in problem.net.named_parameters())


def test_what_cannot_be_is_refused() -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="memory is a"):
        NullProject(base, "gpm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(57, m\)"):
        NullProject(base, torch.ones(3, 1))
    with pytest.raises(ValueError, match="not finite"):
        NullProject(base, torch.full((57, 1), float("nan")))
    with pytest.raises(ValueError, match="does not have"):
        NullProject(base, SubspaceMemory(torch.ones(2, 1), ["nowhere"], [(2,)]), model=problem.net)
    with pytest.raises(ModelError, match="'1\\.weight'"):
        gpm_memory(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), torch.ones(1, 3))
    with pytest.raises(ValueError, match="threshold"):
        gpm_memory(problem.net, problem.x, [0.9])
    with pytest.raises(ValueError, match="threshold"):
        gpm_memory(problem.net, problem.x, 0.0)
    with pytest.raises(ModelError, match="requires grad"):
        random_memory(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ModelError, match="unknown to this version"):
        memory_from_state({"kind": "other", "names": [], "shapes": []})
    with pytest.raises(ClosureError, match="returned None"):
        NullProject(base).step(lambda: None)  # type: ignore[arg-type, return-value]
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([0])).sum().backward()
    with pytest.raises(ModelError, match="sparse"):
        NullProject(torch.optim.SGD(table.parameters(), lr=0.1)).step()
