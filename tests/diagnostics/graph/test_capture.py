"""What a captured graph looks like, what is left as it was, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics import CaptureError
from tests.helpers.networks import Attention, CalledTwice, Chain, Diamond, Recurrent, ResidualCat
from tests.helpers.oracle import double_backprop, relative_error


def _square(z: Tensor) -> Tensor:
    return z.square().mean()


def _names(graph: diagnostics.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


class TestGraph:
    def test_parents_children_and_distances_come_from_the_tape(self, device: torch.device) -> None:
        graph = diagnostics.capture(Diamond().to(device), torch.randn(3, 5, device=device), _square)
        assert _names(graph) == ["stem", "left", "right", "merge", "head"]
        assert graph["stem"].parents == ()
        assert graph["stem"].children == ("left", "right")
        assert graph["merge"].parents == ("left", "right")
        assert graph["head"].children == ()
        assert graph.distance("left", "right") == 2
        assert graph.distance("stem", "head") == 3
        assert graph["merge"].parameters == ("merge.0.weight", "merge.0.bias")
        assert graph["left"].shape == (3, 3)
        assert graph.outputs == ("head",)

    def test_to_networkx_has_the_edges_and_attributes(self) -> None:
        graph = diagnostics.capture(Diamond(), torch.randn(3, 5), _square).to_networkx()
        assert nx.is_directed_acyclic_graph(graph)
        assert set(graph.edges) == {
            ("stem", "left"), ("stem", "right"), ("left", "merge"), ("right", "merge"), ("merge", "head"),
        }  # fmt: skip
        assert graph.nodes["merge"]["module"] == "Sequential"
        assert graph.nodes["merge"]["shape"] == (3, 4)

    def test_unconnected_nodes_are_infinitely_far(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.aside, self.head = nn.Linear(5, 2), nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                self.aside(x)
                return self.head(x)

        graph = diagnostics.capture(Net(), torch.randn(3, 5), _square)
        assert graph.distance("aside", "head") == float("inf")

    def test_a_functional_skip_belongs_to_the_node_that_reads_it(self) -> None:
        graph = diagnostics.capture(ResidualCat(), torch.randn(3, 5), _square)
        assert graph["block2"].parents == ("stem", "block1")
        assert graph["merge"].parents == ("stem", "block1", "block2")

    def test_a_module_called_twice_is_two_nodes(self) -> None:
        graph = diagnostics.capture(CalledTwice(), torch.randn(3, 5), _square)
        assert _names(graph) == ["enter", "step", "step@1", "head"]
        assert graph["step@1"].parents == ("enter", "step")
        assert graph["step"].parameters == graph["step@1"].parameters

    def test_the_output_is_the_last_node_whatever_was_chosen(self) -> None:
        graph = diagnostics.capture(ResidualCat(), torch.randn(3, 5), _square, ["stem"])
        assert _names(graph) == ["stem", "output"]
        assert graph.chosen == ("stem",)
        assert diagnostics.capture(ResidualCat(), torch.randn(3, 5), _square, ["stem", "output"]).chosen == (
            "stem",
            "output",
        )
        assert _names(diagnostics.capture(nn.Linear(5, 3), torch.randn(3, 5), _square)) == ["output"]

    def test_the_values_are_the_activations(self) -> None:
        model, x = ResidualCat(), torch.randn(3, 5)
        graph = diagnostics.capture(model, x, _square)
        assert torch.equal(graph["stem"].value, model.stem(x))
        assert torch.equal(graph["head"].value, model(x))
        assert graph.loss.item() == _square(model(x)).item()

    def test_tuple_outputs_are_one_node_a_tensor(self) -> None:
        graph = diagnostics.capture(Recurrent(), torch.randn(2, 3, 3), _square, ["lstm", "head"])
        assert _names(graph) == ["lstm[0]", "lstm[1]", "lstm[2]", "head", "output"]
        assert graph["head"].parents == ("lstm[0]",)

    def test_tuple_and_dict_inputs_are_unpacked(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(5, 3), nn.Linear(2, 3)

            def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
                return {"sum": self.a(x) + self.b(y), "a": self.a(x)}

        model, x, y = Two(), torch.randn(4, 5), torch.randn(4, 2)

        def loss(z: dict[str, Tensor]) -> Tensor:
            return z["sum"].exp().mean() + z["a"].square().mean()

        for inputs in ((x, y), {"y": y, "x": x}):
            graph = diagnostics.capture(model, inputs, loss)
            assert _names(graph) == ["a", "b", "a@1", "output[0]"]  # a@1 is an output
            assert set(graph.loss_parents) == {"output[0]", "a@1"}
            assert diagnostics.hessian_blocks(graph).gn["a", "b"].norm() > 0

    def test_integer_inputs_of_an_embedding_are_fine(self) -> None:
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
        graph = diagnostics.capture(model, torch.randint(0, 7, (3, 5)), _square)
        assert _names(graph) == ["0", "1"]

    def test_repr_names_nodes_and_an_unknown_name_lists_them(self) -> None:
        graph = diagnostics.capture(ResidualCat(), torch.randn(3, 5), _square)
        assert "Node('merge', Sequential, shape=(3, 5), parents: stem, block1, block2)" in repr(graph)
        with pytest.raises(KeyError, match="no node 'stme'; the nodes are 'stem', 'block1'"):
            graph["stme"]


class TestLeavesNoTrace:
    def test_model_buffers_grads_hooks_and_random_state_are_as_found(self, device: torch.device) -> None:
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).to(device).train()
        x = torch.randn(6, 5, device=device)
        model(x).sum().backward()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        versions = {name: value._version for name, value in model.state_dict(keep_vars=True).items()}
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        objects = {name: id(p.grad) for name, p in model.named_parameters()}
        rng = torch.get_rng_state()

        diagnostics.hessian_blocks(diagnostics.capture(model, x, lambda z: _square(F.dropout(z))))

        assert torch.equal(torch.get_rng_state(), rng)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert {n: v._version for n, v in model.state_dict(keep_vars=True).items()} == versions
        assert all(torch.equal(p.grad, grads[n]) and id(p.grad) == objects[n] for n, p in model.named_parameters())
        assert all(not m._forward_hooks for m in model.modules())
        assert model.training
        assert not x.requires_grad

    def test_hooks_are_removed_when_the_model_fails(self) -> None:
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(3, 3))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            diagnostics.capture(model, torch.randn(2, 5), _square)
        assert all(not m._forward_hooks for m in model.modules())

    def test_works_under_no_grad_and_inference_mode(self) -> None:
        model, x = Chain(5, 4, 3).double(), torch.randn(2, 5, dtype=torch.float64)
        expected = diagnostics.hessian_blocks(diagnostics.capture(model, x, _square)).total["0", "0"]
        with torch.no_grad():
            assert torch.equal(
                diagnostics.hessian_blocks(diagnostics.capture(model, x, _square)).total["0", "0"], expected
            )
        with torch.inference_mode():
            graph = diagnostics.capture(model, x.clone(), _square)
            assert torch.equal(diagnostics.hessian_blocks(graph).total["0", "0"], expected)

    def test_the_callers_tape_is_not_entered(self) -> None:
        enter, model = nn.Linear(5, 5), Chain(5, 4, 3)
        graph = diagnostics.capture(model, enter(torch.randn(2, 5)), _square)
        assert graph["0"].parameters == ("0.0.weight", "0.0.bias")


class TestDocumentedBehaviour:
    def test_dropout_in_training_mode_has_the_mask_of_the_next_forward_pass(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(F.dropout(torch.tanh(self.a(x)), 0.5, self.training))

        torch.manual_seed(3)
        model, x = Net().double(), torch.randn(4, 5, dtype=torch.float64)
        torch.manual_seed(11)
        graph = diagnostics.capture(model.train(), x, _square)
        blocks = diagnostics.hessian_blocks(graph)
        expected = double_backprop(model, x, _square, ["a"], "output").per_sample("total")["a", "a"]
        assert relative_error(blocks.total["a", "a"], expected) < 1e-12
        other = double_backprop(model, x, _square, ["a"], "output").per_sample("total")["a", "a"]
        assert relative_error(blocks.total["a", "a"], other) > 1e-2  # another mask, another network

    def test_frozen_parameters_change_no_block(self) -> None:
        torch.manual_seed(0)
        model, x = ResidualCat().double(), torch.randn(3, 5, dtype=torch.float64)
        before = diagnostics.hessian_blocks(diagnostics.capture(model, x, _square))
        for frozen in (model.stem, model.block1, model.merge, model.block2, model.head):
            frozen.requires_grad_(False)
            graph = diagnostics.capture(model, x, _square)
            blocks = diagnostics.hessian_blocks(graph)
            assert relative_error(blocks.total.assemble(), before.total.assemble()) < 1e-14
        assert graph["stem"].parameters == ()

    @pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.ELU(inplace=True)])
    def test_activations_in_place_equal_those_out_of_place(self, activation: nn.Module) -> None:
        torch.manual_seed(0)
        inside = nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 3), activation, nn.Linear(3, 2)).double()
        x = torch.randn(3, 5, dtype=torch.float64)
        expected = None
        for in_place in (False, True):
            activation.inplace = in_place
            graph = diagnostics.capture(inside, x, _square, ["0", "2"])  # cut before the activation
            blocks = diagnostics.hessian_blocks(graph).total.assemble()
            assert torch.equal(graph["0"].value, inside[0](x))  # the activation did not overwrite the node
            assert expected is None or relative_error(blocks, expected) < 1e-14
            expected = blocks

    def test_sum_in_place_onto_a_node_leaves_the_node_alone(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                h = self.a(x)
                h += self.b(torch.tanh(h))
                return h

        torch.manual_seed(0)
        model, x = Net().double(), torch.randn(3, 5, dtype=torch.float64)
        graph = diagnostics.capture(model, x, _square, ["a", "b"])
        expected = double_backprop(model, x, _square, ["b"], "output").per_sample("total")
        assert _names(graph) == ["a", "b", "output"]
        assert relative_error(diagnostics.hessian_blocks(graph).total["b", "b"], expected["b", "b"]) < 1e-12

    def test_attention_runs_by_a_kernel_with_a_second_derivative_and_the_choice_is_restored(self) -> None:
        before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled
        diagnostics.capture(Attention(fused=True), torch.randn(2, 4, 3), _square)
        assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled) == before


class _NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).detach()


class _Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).argmax(-1)


def _with_nan() -> nn.Module:
    model = Chain(5, 4, 3)
    with torch.no_grad():
        model[0][0].weight[0, 0] = torch.nan
    return model


X = torch.ones(3, 5)
REFUSED: dict[str, tuple[Callable[[], nn.Module], object, Callable[[Tensor], object], object, str]] = {
    "model without grad": (_NoGrad, X, _square, ["output"], r"detached from its nodes and parameters .*torch.no_grad"),
    "chosen module without grad": (_NoGrad, X, _square, ["fc"], r"module 'fc' ran with gradients disabled"),
    "detached output": (_Detached, X, _square, ["a"], r"output 'output' is detached from its nodes"),
    "no floating output": (_Classes, X, _square, None, r"returned no floating-point tensor but Tensor"),
    "chosen module without floating output": (
        lambda: nn.Sequential(nn.Linear(5, 3), _Classes2()),
        X,
        _square,
        ["1"],
        r"module '1' returned no floating",
    ),
    "empty batch": (lambda: Chain(5, 4, 3), torch.ones(0, 5), _square, None, r"batch is empty: .*\(0, 5\)"),
    "loss is not a scalar": (
        lambda: Chain(5, 4, 3),
        X,
        lambda z: z.square(),
        None,
        r"scalar tensor, got shape \(3, 3\)",
    ),
    "loss is a float": (lambda: Chain(5, 4, 3), X, lambda z: z.sum().item(), None, r"scalar tensor, got float"),
    "loss is detached": (lambda: Chain(5, 4, 3), X, lambda z: z.sum().detach(), None, r"the loss is detached"),
    "loss ignores z": (
        lambda: Chain(5, 4, 3),
        X,
        lambda z: torch.ones((), requires_grad=True) * 2,
        None,
        r"does not depend on the model's output",
    ),
    "NaN loss": (
        lambda: Chain(5, 4, 3),
        X,
        lambda z: (z - 1e3).log().mean(),
        None,
        r"loss is nan.*loss function itself",
    ),
    "NaN parameter": (_with_nan, X, _square, None, r"loss is nan\. Parameter '0\.0\.weight' is not finite"),
    "NaN input": (lambda: Chain(5, 4, 3), X * torch.nan, _square, None, r"first tensor that is not finite is node '0'"),
    "unknown node": (
        ResidualCat,
        X,
        _square,
        ["blok1"],
        r"no module of ResidualCat .* 'blok1'\. Did you mean 'block1'",
    ),
    "node that is never called": (
        lambda: nn.Sequential(_Unused(), nn.Linear(3, 3)),
        X,
        _square,
        ["0.spare"],
        r"'0\.spare' was asked for but not called",
    ),
    "non-floating input": (
        lambda: Chain(5, 4, 3),
        X.to(torch.uint8),
        _square,
        None,
        r"does not accept inputs of dtype torch.uint8",
    ),
    "half-precision model": (
        lambda: Chain(5, 4, 3).half(),
        X.half(),
        _square,
        None,
        r"parameter '0\.0\.weight' has dtype torch.float16",
    ),
}


class _Classes2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_cause_and_the_way_out(case: str) -> None:
    build, inputs, loss_fn, nodes, message = REFUSED[case]
    with pytest.raises(CaptureError, match=message):
        diagnostics.capture(build(), inputs, loss_fn, nodes)


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        diagnostics.capture(_square, X, _square)
    with pytest.raises(ValueError, match=r'reduction must be "mean" or "sum", got \'none\''):
        diagnostics.capture(Chain(5, 4, 3), X, _square, reduction="none")
    with pytest.raises(TypeError, match=r"got an entry of type Linear"):
        diagnostics.capture(Chain(5, 4, 3), X, _square, [nn.Linear(1, 1)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, y, ce: diagnostics.capture(m, X, y), r"got Tensor\. Targets go into it: .*lambda z"),
        (lambda m, y, ce: diagnostics.capture(m, X, ce), r"loss_fn\(z\) -> scalar, but CrossEntropyLoss.*lambda z"),
        (lambda m, y, ce: diagnostics.capture(m, X, F.cross_entropy), r"but cross_entropy.*Targets go into it"),
        (lambda m, y, ce: diagnostics.capture(m, X, y, ce), r"got Tensor\. Targets go into it"),
        (lambda m, y, ce: diagnostics.diagnose(m, X, y, ce), r"diagnose\(model, \(inputs, targets\), loss_fn\)"),
        (lambda m, y, ce: diagnostics.diagnose(m, X, y), r"loss_fn\(z, targets\).*got Tensor.*\(inputs, targets\)"),
        (lambda m, y, ce: diagnostics.diagnose(m, (X, y), _square), r"loss_fn\(z, targets\).*_square.*lambda z, _:"),
        (lambda m, y, ce: diagnostics.HessianOperator(m, (X, y), y), r"got Tensor\. A batch is one argument"),
    ],
)  # fmt: skip
def test_arguments_in_the_wrong_place_are_refused_with_what_to_pass(call: Callable[..., object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(Chain(5, 4, 3), torch.zeros(3, dtype=torch.long), nn.CrossEntropyLoss())


def test_autocast_is_refused_with_the_way_out() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match=r"has dtype torch\.bfloat16"):
        diagnostics.capture(Chain(5, 4, 3), X, _square)
