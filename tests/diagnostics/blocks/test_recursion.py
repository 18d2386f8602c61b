"""Blocks against double back-propagation, and the structure that theory demands of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.graph.local import LOSS, LocalDerivatives, differentiate
from tests.helpers.networks import (
    Attention,
    CalledTwice,
    Chain,
    Counterexample,
    DeadEnd,
    Diamond,
    Normalised,
    Recurrent,
    ResidualCat,
    SkipIntoMerge,
)
from tests.helpers.oracle import double_backprop, relative_error

TOLERANCE = 1e-12


def _cross_entropy(batch: int) -> Callable[[Tensor], Tensor]:
    labels = torch.arange(batch) % 3
    return lambda z: F.cross_entropy(z, labels.to(z.device))


def _wavy(z: Tensor) -> Tensor:
    """A loss that is neither convex nor quadratic in the output."""
    return (torch.sin(z) * z).mean()


CASES = {
    "chain": (lambda: Chain(5, 4, 3, 4, 3), (4, 5), None, ["0", "1", "2"], "3"),
    "residual_cat": (ResidualCat, (3, 5), None, ["stem", "block1", "block2", "merge"], "head"),
    "diamond": (Diamond, (3, 5), None, ["stem", "left", "right", "merge"], "head"),
    "called_twice": (CalledTwice, (3, 5), None, ["enter", "step", "step@1"], "head"),
    "attention": (Attention, (2, 4, 3), ["q", "k", "v", "out"], ["q", "k", "v", "out"], "output"),
    "fused_attention": (lambda: Attention(fused=True), (2, 4, 3), ["q", "k", "v"], ["q", "k", "v"], "output"),
    "layer_norm": (Normalised, (3, 5), None, ["layers.0", "layers.1", "layers.2"], "head"),
    "lstm": (Recurrent, (2, 3, 3), ["head"], ["head"], "output"),
    "counterexample": (Counterexample, (3, 3), None, ["w", "q", "v"], "u"),
    "skip_into_merge": (SkipIntoMerge, (3, 3), None, ["v", "q"], "u"),
    "single_sample": (ResidualCat, (1, 5), None, ["stem", "block1", "block2", "merge"], "head"),
    "hidden_nodes": (ResidualCat, (3, 5), ["stem", "merge"], ["stem", "merge"], "output"),
}


@pytest.mark.parametrize("loss", ["cross_entropy", "wavy"])
@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_double_backpropagation(case: str, loss: str, device: torch.device) -> None:
    build, shape, nodes, names, output = CASES[case]
    torch.manual_seed(0)
    model = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    loss_fn = _cross_entropy(shape[0]) if loss == "cross_entropy" else _wavy
    oracle = double_backprop(model, x, loss_fn, names, output)
    expected, expected_gn = oracle.per_sample("total"), oracle.per_sample("gn")

    model.to(device)
    graph = diagnostics.capture(model, x.to(device), loss_fn, nodes)
    blocks = diagnostics.hessian_blocks(graph, by_source=True)

    assert blocks.nodes == (*names, output)
    assert not graph.coupled
    scale = max(block.norm().item() for block in expected.values())
    for pair, block in expected.items():
        total, gn, tensor = (part[pair].cpu() for part in (blocks.total, blocks.gn, blocks.tensor))
        floor = 1e-15 * scale  # blocks that are zero are zero to the rounding of the others
        assert (total - block).norm() <= TOLERANCE * block.norm() + floor
        assert (gn - expected_gn[pair]).norm() <= TOLERANCE * expected_gn[pair].norm() + floor
        assert (tensor - (block - expected_gn[pair])).norm() <= TOLERANCE * block.norm() + floor
        shares = sum(share[pair].cpu() for share in blocks.tensor_by_source.values())
        assert (shares - tensor).norm() <= TOLERANCE * block.norm() + floor
        averaged = blocks.mean()
        assert (averaged.total[pair].cpu() - block.sum(0)).norm() <= TOLERANCE * block.norm() + floor


def _textbook_recursion(graph: diagnostics.Graph, local: LocalDerivatives) -> dict[tuple[str, str], Tensor]:
    """H[v,w] = Σ_u D[u,v]ᵀ H[u,w] + Σ_u Σ_q K_u[v,q] J[q←w], term by term as written in docs/recursion.md."""
    names = [node.name for node in graph.nodes]
    size = {node.name: graph.size(node) for node in graph.nodes}

    def zeros(v: str, w: str) -> Tensor:
        return torch.zeros(graph.samples, size[v], size[w], dtype=torch.float64)

    def curvature(u: str, v: str, q: str) -> Tensor:
        known = local.curvatures.get(u, {})
        return known[v, q] if (v, q) in known else known[q, v].mT if (q, v) in known else zeros(v, q)

    jacobian = {}
    for w in names:
        for u in names:
            jacobian[u, w] = torch.eye(size[w]).double().expand(graph.samples, -1, -1) if u == w else zeros(u, w)
            for p, local_jacobian in local.jacobians[u].items():
                jacobian[u, w] = jacobian[u, w] + local_jacobian @ jacobian[p, w]
    blocks = {}
    for v in reversed(names):
        users = [*graph[v].children, *([LOSS] if v in graph.loss_parents else [])]
        for w in names:
            block = zeros(v, w)
            for u in users:
                if u != LOSS:
                    block = block + local.jacobians[u][v].mT @ blocks[u, w]
                for q in graph.loss_parents if u == LOSS else graph[u].parents:
                    block = block + curvature(u, v, q) @ jacobian[q, w]
            blocks[v, w] = block
    return blocks


@pytest.mark.parametrize("model", [ResidualCat, Diamond, CalledTwice, Counterexample, SkipIntoMerge])
def test_elimination_equals_the_recursion_as_written(model: type[nn.Module]) -> None:
    torch.manual_seed(1)
    net = model().double()
    x = torch.randn(3, 3 if model in (Counterexample, SkipIntoMerge) else 5, dtype=torch.float64)
    graph = diagnostics.capture(net, x, _wavy)
    blocks = diagnostics.hessian_blocks(graph)
    written = _textbook_recursion(graph, differentiate(graph))
    for pair, block in written.items():
        assert relative_error(blocks.total[pair], block) < TOLERANCE


def test_printed_recursion_misses_an_unrelated_pair_and_ours_does_not() -> None:
    torch.manual_seed(0)
    model = Counterexample().double()
    x = torch.randn(3, 3, dtype=torch.float64)
    expected = double_backprop(model, x, _wavy, ["w", "v", "q"], "u").per_sample("total")["v", "w"]
    graph = diagnostics.capture(model, x, _wavy)
    blocks = diagnostics.hessian_blocks(graph)
    local = differentiate(graph)

    # v and w have no common child, so Eq. 2 as printed has only its first term here
    printed = local.jacobians["u"]["v"].mT @ blocks.total["u", "w"]
    missing = (
        local.curvatures["u"]["v", "q"] if ("v", "q") in local.curvatures["u"] else local.curvatures["u"]["q", "v"].mT
    )
    assert relative_error(blocks.total["v", "w"], expected) < TOLERANCE
    assert relative_error(printed, expected) > 0.1
    assert relative_error(printed + missing @ local.jacobians["q"]["w"], expected) < TOLERANCE


def test_printed_recursion_misses_the_diagonal_of_a_skip_and_ours_does_not() -> None:
    torch.manual_seed(0)
    model = SkipIntoMerge().double()
    x = torch.randn(3, 3, dtype=torch.float64)
    expected = double_backprop(model, x, _wavy, ["v", "q"], "u").per_sample("total")["v", "v"]
    graph = diagnostics.capture(model, x, _wavy)
    blocks = diagnostics.hessian_blocks(graph)
    local = differentiate(graph)

    back = {u: local.jacobians[u]["v"].mT for u in ("q", "u")}
    printed = (
        sum(back[a] @ blocks.total[a, b] @ back[b].mT for a in back for b in back) + local.curvatures["u"]["v", "v"]
    )
    assert relative_error(blocks.total["v", "v"], expected) < TOLERANCE
    assert relative_error(printed, expected) > 0.01


def test_tensor_part_of_relu_networks_vanishes(device: torch.device) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 6)
            self.block = nn.Linear(6, 6)
            self.merge = nn.Sequential(nn.Linear(12, 6), nn.LeakyReLU())
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            early = self.stem(x).relu()
            return self.head(self.merge(torch.cat([early, early + self.block(early).relu()], -1)))

    torch.manual_seed(0)
    model = Net().double().to(device)
    x = torch.randn(8, 5, dtype=torch.float64, device=device)
    blocks = diagnostics.hessian_blocks(diagnostics.capture(model, x, _cross_entropy(8)))
    assert blocks.gn.assemble().norm() > 1e-2
    assert blocks.tensor.assemble().norm() < 1e-15
    smooth = diagnostics.hessian_blocks(diagnostics.capture(ResidualCat().double().to(device), x, _cross_entropy(8)))
    assert smooth.tensor.assemble().norm() > 1e-3


@pytest.mark.parametrize("model", [ResidualCat, Diamond, CalledTwice, Normalised])
def test_gauss_newton_part_is_positive_semidefinite_and_blocks_are_symmetric(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    blocks = diagnostics.hessian_blocks(diagnostics.capture(model().double(), x, _cross_entropy(4)))
    gn, total = blocks.gn.assemble(), blocks.total.assemble()
    eigenvalues = torch.linalg.eigvalsh(gn)
    assert (eigenvalues >= -1e-14 * eigenvalues.amax()).all()
    assert (torch.linalg.eigvalsh(total) < -1e-6).any()  # the Hessian itself is indefinite: the check above can fail
    for part in (blocks.total, blocks.gn, blocks.tensor):
        for v, w in part:
            assert torch.equal(part[v, w], part[w, v].mT) or v == w
            assert relative_error(part[v, w], part[w, v].mT) < TOLERANCE or part[v, w].norm() < 1e-15


def test_tensor_part_at_the_node_before_a_linear_head_is_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    blocks = diagnostics.hessian_blocks(diagnostics.capture(ResidualCat().double(), x, _cross_entropy(4)))
    assert blocks.tensor["merge", "merge"].norm() == 0
    assert blocks.tensor["block2", "block2"].norm() > 1e-4


def test_nodes_that_do_not_reach_the_loss_have_zero_blocks() -> None:
    torch.manual_seed(0)
    blocks = diagnostics.hessian_blocks(diagnostics.capture(DeadEnd(), torch.randn(2, 5), _cross_entropy(2)))
    assert set(blocks.nodes) == {"used", "unused", "head"}
    for w in blocks.nodes:
        assert not blocks.total["unused", w].any()
        assert blocks.total[w, "unused"].shape == (2, blocks.layout.sizes[w], 2)
        assert not blocks.mean().total[w, "unused"].any()
    assert blocks.total["used", "head"].any()


def test_pairs_limit_the_nodes_and_leave_their_blocks_unchanged() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    graph = diagnostics.capture(ResidualCat().double(), x, _wavy)
    everything = diagnostics.hessian_blocks(graph)
    some = diagnostics.hessian_blocks(graph, pairs=[("merge", "stem")], by_source=True)
    assert some.nodes == ("stem", "merge")
    for pair in some.total:
        assert relative_error(some.total[pair], everything.total[pair]) < TOLERANCE
        assert relative_error(some.mean().total[pair], everything.mean().total[pair]) < TOLERANCE
    with pytest.raises(KeyError, match="no blocks for node 'block1'"):
        some.total["block1", "stem"]
    with pytest.raises(KeyError, match="no node 'nowhere'"):
        diagnostics.hessian_blocks(graph, pairs=[("nowhere", "stem")])


def test_batch_norm_in_training_mode_gives_joint_blocks(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))
    model.double().train()
    x = torch.randn(4, 3, dtype=torch.float64)
    oracle = double_backprop(model, x, _cross_entropy(4), ["0", "3"], "output")
    graph = diagnostics.capture(model.to(device), x.to(device), _cross_entropy(4), ["0", "3"])
    blocks = diagnostics.hessian_blocks(graph)
    assert graph.coupled
    assert graph.samples == 1
    for (v, w), joint in oracle.total.items():
        expected = joint.reshape(1, joint.shape[0] * joint.shape[1], -1)
        assert relative_error(blocks.total[v, w].cpu(), expected) < TOLERANCE
        assert relative_error(blocks.mean().total[v, w].cpu(), joint.sum((0, 2))) < TOLERANCE
    assert not diagnostics.capture(model.eval(), x.to(device), _cross_entropy(4), ["0", "3"]).coupled


def test_a_loss_that_mixes_samples_gives_joint_blocks() -> None:
    torch.manual_seed(0)
    model = Chain(5, 4, 3).double()
    x = torch.randn(3, 5, dtype=torch.float64)

    def spread(z: Tensor) -> Tensor:
        return torch.logsumexp(z @ z.mT, dim=(0, 1))

    oracle = double_backprop(model, x, spread, ["0"], "1")
    blocks = diagnostics.hessian_blocks(diagnostics.capture(model, x, spread))
    for pair, joint in oracle.total.items():
        assert relative_error(blocks.total[pair][0], joint.flatten(2).flatten(0, 1)) < TOLERANCE
        assert relative_error(blocks.gn[pair][0], oracle.gn[pair].flatten(2).flatten(0, 1)) < TOLERANCE


def test_mean_of_a_sum_loss_divides_by_the_batch() -> None:
    torch.manual_seed(0)
    model = Chain(5, 4, 3).double()
    x, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    means = diagnostics.hessian_blocks(diagnostics.capture(model, x, lambda z: F.cross_entropy(z, labels))).mean()
    summed = diagnostics.capture(model, x, lambda z: F.cross_entropy(z, labels, reduction="sum"), reduction="sum")
    blocks = diagnostics.hessian_blocks(summed)
    assert relative_error(blocks.mean().total.assemble(), means.total.assemble()) < TOLERANCE
    assert relative_error(blocks.total.assemble().mean(0), means.total.assemble()) < TOLERANCE


def test_the_graph_can_be_used_again_and_refuses_after_an_optimizer_step() -> None:
    torch.manual_seed(0)
    model = Chain(5, 4, 3)
    graph = diagnostics.capture(model, torch.randn(3, 5), _cross_entropy(3))
    first, second = diagnostics.hessian_blocks(graph), diagnostics.hessian_blocks(graph)
    assert torch.equal(first.total.assemble(), second.total.assemble())
    before = first.total["0", "1"].clone()
    with torch.no_grad():
        model[0][0].weight.mul_(2)
    with pytest.raises(
        diagnostics.StaleGraphError, match=r"'0\.0\.weight' was changed after the capture.*Capture again"
    ):
        diagnostics.hessian_blocks(graph)
    assert torch.equal(first.total["0", "1"], before)  # blocks already computed do not need the tape


def test_more_memory_than_allowed_is_refused_with_the_size() -> None:
    graph = diagnostics.capture(Chain(5, 64, 64, 3), torch.randn(16, 5), _cross_entropy(16))
    with pytest.raises(diagnostics.MemoryBudgetError, match=r"take \d+\.\d GiB, more than the limit of 0\.0 GiB"):
        diagnostics.hessian_blocks(graph, memory_limit=1000)


class _ExpOnce(torch.autograd.Function):
    """exp whose backward is declared differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class _ExpOffTape(_ExpOnce):
    """exp whose backward silently leaves the tape, as one written with NumPy does."""

    @staticmethod
    def backward(ctx, grad):
        return grad.detach() * ctx.saved_tensors[0].detach().exp()


@pytest.mark.parametrize("operation", [_ExpOnce, _ExpOffTape])
@pytest.mark.parametrize("last", [True, False])
def test_an_operation_without_a_second_derivative_is_named(
    operation: type[torch.autograd.Function], last: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return operation.apply(self.b(self.a(x))) if last else self.b(operation.apply(self.a(x)))

    graph = diagnostics.capture(Net(), torch.randn(2, 5), _cross_entropy(2))
    name = "output" if last else "b"
    with pytest.raises(diagnostics.DiagnosticsError, match=rf"node '{name}' cannot be differentiated twice"):
        diagnostics.hessian_blocks(graph)


def test_results_keep_dtype_and_gradients_stay_untouched() -> None:
    model = Chain(5, 4, 3)
    model[0][0].weight.grad = torch.ones_like(model[0][0].weight)
    graph = diagnostics.capture(model, torch.randn(3, 5), _cross_entropy(3))
    blocks = diagnostics.hessian_blocks(graph)
    assert blocks.total["0", "1"].dtype == torch.float32
    assert not blocks.total["0", "1"].requires_grad
    assert torch.equal(model[0][0].weight.grad, torch.ones_like(model[0][0].weight))
    assert model[0][0].bias.grad is None
