"""Models that a capture could get wrong or change without notice: exact, or refused with the way out."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import diagnostics
from diagnostics import CaptureError
from tests.helpers.oracle import check_against_double_backprop, relative_error


class Call(nn.Module):
    """A forward pass given as a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def _linear(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def _loss(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).sum()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 4, dtype=torch.float64)


class TestTransformers:
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
    @pytest.mark.parametrize("frozen", [False, True])
    def test_the_inference_path_is_off_and_restored(self, frozen: bool) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, dtype=torch.float64)
        model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(not frozen)
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        padding = torch.tensor([[False, False, True], [False, False, False]])
        masked = Call(lambda self, x: self.encoder(x, src_key_padding_mask=padding), encoder=model)
        nodes = ["encoder.layers.?", "*.linear1", "*.self_attn"]
        with torch.no_grad():
            value = masked(x)
        graph = check_against_double_backprop(masked, x, lambda z: z.sin().square().mean(), nodes)
        # without padding: inference leaves zeros there (nested tensors)
        assert torch.allclose(graph.nodes[-1].value[~padding], value[~padding], atol=1e-14)
        assert torch.backends.mha.get_fastpath_enabled()

    def test_modules_used_without_being_called_are_refused_by_name(self) -> None:
        model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0))
        with pytest.raises(CaptureError, match=r"'0\.self_attn\.out_proj' was asked for but not called"):
            diagnostics.capture(model, torch.randn(2, 3, 4), _loss, ["0.self_attn.out_proj"])


class TestCheckpointing:
    @staticmethod
    def _model(reentrant: bool) -> nn.Module:
        return Call(
            lambda self, x: self.head(checkpoint(self.inner, self.stem(x), use_reentrant=reentrant)),
            stem=_linear(), inner=nn.Sequential(_linear(), nn.BatchNorm1d(4, dtype=torch.float64)), head=_linear(),
        )  # fmt: skip

    @pytest.mark.parametrize("nodes", [["stem", "head"], ["stem", "inner.0"], None])
    def test_without_reentrance_is_refused_and_changes_nothing(self, x: Tensor, nodes: list[str] | None) -> None:
        model = self._model(reentrant=False)
        with pytest.raises(CaptureError, match=r"checkpoint or other saved-tensor hooks.*Turn them off"):
            diagnostics.capture(model, x, _loss, nodes)
        assert not model.inner[1].num_batches_tracked
        assert checkpoint(model.stem, x, use_reentrant=False).requires_grad  # hooks work again afterwards

    def test_with_reentrance_is_refused(self, x: Tensor) -> None:
        with pytest.raises(CaptureError, match="node 'head' is computed by reentrant checkpointing"):
            diagnostics.capture(self._model(reentrant=True), x, _loss, ["stem", "head"])
        with pytest.raises(CaptureError, match=r"'inner\.0' ran with gradients disabled .*reentrant checkpointing"):
            diagnostics.capture(self._model(reentrant=True), x, _loss, ["stem", "inner.0"])

    def test_in_the_loss_is_refused(self, x: Tensor) -> None:
        with pytest.raises(CaptureError, match="saved-tensor hooks"):
            diagnostics.capture(_linear(), x, lambda z: checkpoint(_loss, z, use_reentrant=False))

    def test_derivatives_inside_the_model_need_no_hooks(self, x: Tensor) -> None:
        model = Call(
            lambda self, x: torch.func.vmap(torch.func.jacrev(lambda row: torch.tanh(self.stem(row))))(x).sum(1),
            stem=nn.Sequential(_linear(), nn.Tanh()),
        )
        check_against_double_backprop(model, x, _loss, ["output"])


class TestParametrizations:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        "normalise", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
    )
    def test_blocks_are_exact_and_buffers_untouched(
        self, normalise: Callable[[nn.Module], nn.Module], training: bool, x: Tensor
    ) -> None:
        model = nn.Sequential(normalise(_linear()), nn.Tanh(), normalise(_linear()), nn.Tanh(), _linear())
        model.train(training)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        graph = diagnostics.capture(model, x, _loss)
        diagnostics.hessian_blocks(graph)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        check_against_double_backprop(model, x, _loss)
        assert all(name.startswith("0.parametrizations") or name == "0.bias" for name in graph["1"].parameters)

    def test_spectral_norm_steps_once_in_a_capture_as_in_a_forward_pass(self, x: Tensor) -> None:
        model = nn.Sequential(parametrizations.spectral_norm(_linear()), nn.Tanh(), _linear()).train()
        graph = diagnostics.capture(model, x, _loss)
        assert torch.equal(graph["2"].value, model(x))


class TestLazyAndEmbedding:
    @pytest.mark.parametrize("build", [lambda: nn.LazyLinear(4), nn.LazyBatchNorm1d], ids=["linear", "batch norm"])
    def test_a_lazy_module_without_parameters_is_refused_and_stays_lazy(
        self, build: Callable[[], nn.Module], x: Tensor
    ) -> None:
        lazy = build()
        with pytest.raises(CaptureError, match=rf"module '1' is a {type(lazy).__name__} .* run the model once"):
            diagnostics.capture(nn.Sequential(_linear(), lazy), x, _loss)
        assert lazy.has_uninitialized_params()

    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    def test_max_norm_is_refused_before_it_changes_the_weight(self, kind: type[nn.Module]) -> None:
        model = nn.Sequential(kind(7, 4, max_norm=0.5), nn.Linear(4, 3))
        before = model[0].weight.clone()
        ids = torch.tensor([[1, 2], [3, 1]])
        with pytest.raises(CaptureError, match=r"module '0' scales its weight down in place .*max_norm=0\.5.*to None"):
            diagnostics.capture(model, ids, _loss)
        assert torch.equal(model[0].weight, before)
        model[0].max_norm = None
        assert diagnostics.capture(model, ids, _loss)["0"].shape[0] == 2

    def test_a_parameter_changed_by_the_forward_pass_is_named(self) -> None:
        model = Call(lambda self, ids: self.fc(F.embedding(ids, self.fc.weight, max_norm=0.1)), fc=nn.Linear(4, 4))
        with pytest.raises(CaptureError, match=r"parameter 'fc\.weight' was changed in place by the forward pass"):
            diagnostics.capture(model, torch.tensor([[0, 1]]), _loss)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_tied_and_sparse_embeddings_are_exact(self, sparse: bool) -> None:
        torch.manual_seed(0)
        model = Call(
            lambda self, ids: self.decode(torch.tanh(self.mix(self.embed(ids)))),
            embed=nn.Embedding(5, 3, sparse=sparse), mix=nn.Linear(3, 3), decode=nn.Linear(3, 5, bias=False),
        ).double()  # fmt: skip
        model.decode.weight = model.embed.weight
        graph = check_against_double_backprop(model, torch.tensor([[1, 2], [3, 1]]), _loss)
        assert graph["embed"].parameters == graph["decode"].parameters == ("embed.weight",)

    def test_a_parameter_that_a_module_returns_is_known_to_its_node(self, x: Tensor) -> None:
        position = Call(lambda self: self.weight)
        position.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        model = Call(lambda self, x: self.head(self.stem(x) * self.position()), stem=_linear(), position=position,
                     head=_linear())  # fmt: skip
        graph = check_against_double_backprop(model, x, _loss)
        assert graph["position"].parameters == ("position.weight",)


class TestOutputs:
    """The same blocks whatever container a module returns its tensors in."""

    Named = namedtuple("Named", ["a", "b"])

    @dataclasses.dataclass(frozen=True)
    class Frozen:
        a: Tensor
        b: Tensor
        note: str = dataclasses.field(default="", init=False)

    @dataclasses.dataclass
    class Nested:
        inner: Any
        count: int

    class Dict(dict):
        pass

    CONTAINERS: ClassVar[dict[str, Callable[[Tensor, Tensor], Any]]] = {
        "list": lambda a, b: [a, b],
        "dict": lambda a, b: {"a": a, "b": b},
        "named tuple": Named,
        "ordered dict": lambda a, b: OrderedDict(a=a, b=b),
        "dict of its own class": lambda a, b: TestOutputs.Dict(a=a, b=b),
        "frozen dataclass": Frozen,
        "dataclass in a tuple": lambda a, b: (TestOutputs.Nested({"a": a, "b": [b]}, 3),),
    }

    @staticmethod
    def _two(container: Any) -> tuple[Tensor, Tensor]:
        match container:
            case (TestOutputs.Nested(inner=inner),):
                return inner["a"], inner["b"][0]
            case {"a": a, "b": b}:
                return a, b
            case TestOutputs.Frozen(a=a, b=b) | (a, b):
                return a, b
        raise AssertionError

    def _blocks(self, pack: Callable[[Tensor, Tensor], Any], last: bool, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        inner = Call(lambda self, h: pack(torch.sin(h), torch.exp(h)))
        if last:
            model = Call(lambda self, x: self.inner(self.stem(x)), stem=_linear(), inner=inner)
        else:
            model = Call(
                lambda self, x: torch.tanh(torch.mul(*TestOutputs._two(self.inner(self.stem(x))))),
                stem=_linear(), inner=inner,
            )  # fmt: skip
        loss = (lambda z: _loss(torch.mul(*self._two(z)))) if last else _loss
        graph = diagnostics.capture(model, x, loss, ["stem", "inner"])
        assert [n.name for n in graph.nodes][:3] == ["stem", *(n for n in graph["stem"].children)]
        return diagnostics.hessian_blocks(graph).total.assemble()

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("container", CONTAINERS)
    def test_containers_change_no_block(self, container: str, last: bool, x: Tensor) -> None:
        expected = self._blocks(lambda a, b: (a, b), last, x)
        assert torch.equal(self._blocks(self.CONTAINERS[container], last, x), expected)

    @pytest.mark.parametrize(
        "function",
        [
            lambda h: (h, h),
            lambda h: h.chunk(2, 1),
            lambda h: (h[:, :2], h[:, 1:3]),
            lambda h: (h.view(3, 2, 2)[:, 0], h[:, 2:]),
        ],
        ids=["the same tensor twice", "chunk", "overlapping views", "views of a view"],
    )
    def test_outputs_that_share_memory_are_nodes_of_their_own(
        self, function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor
    ) -> None:
        split = Call(lambda self, h: function(h))
        model = Call(
            lambda self, x: (lambda pair: torch.tanh(pair[0]) * pair[1].exp())(self.split(self.stem(x))),
            stem=_linear(), split=split,
        )  # fmt: skip
        graph = check_against_double_backprop(model, x, _loss, ["stem", "split"])
        assert graph["split[0]"].parents == graph["split[1]"].parents == ("stem",)
        last = Call(lambda self, x: self.split(torch.tanh(self.stem(x))), stem=_linear(), split=split)
        check_against_double_backprop(last, x, lambda z: _loss(z[0] * z[1].exp()), ["stem"])

    def test_modules_that_return_their_input_or_a_view_are_linear_nodes(self, x: Tensor) -> None:
        model = nn.Sequential(_linear(), nn.Identity(), nn.Flatten(), nn.Dropout(0.0), nn.Tanh(), _linear())
        graph = check_against_double_backprop(model, x, _loss, lambda name, module: True)
        blocks = diagnostics.hessian_blocks(graph).total
        assert relative_error(blocks["0", "0"], blocks["3", "2"]) < 1e-15

    def test_data_dependent_control_flow_is_that_of_the_pass(self, x: Tensor) -> None:
        model = Call(
            lambda self, x: self.head(torch.tanh(self.a(x)) if x.sum() > 0 else torch.exp(self.b(x))),
            a=_linear(), b=_linear(), head=_linear(),
        )  # fmt: skip
        assert check_against_double_backprop(model, x.abs(), _loss)["head"].parents == ("a",)
        assert check_against_double_backprop(model, -x.abs(), _loss)["head"].parents == ("b",)


class TestInPlace:
    def test_a_change_that_the_cut_would_hide_from_another_tensor_is_refused(self, x: Tensor) -> None:
        def through_the_output(self: nn.Module, x: Tensor) -> Tensor:
            h = self.stem(x)
            y = self.same(h)
            y += 1  # in the model itself, h changes too
            return self.head(h.sin() * y)

        def through_the_input(self: nn.Module, x: Tensor) -> Tensor:
            h = self.stem(x)
            y = self.same(h)
            h += 1
            return self.head(h.sin() * y)

        for function in (through_the_output, through_the_input):
            for same in (nn.Identity(), nn.Flatten()):
                model = Call(function, stem=_linear(), same=same, head=_linear())
                with pytest.raises(CaptureError, match=r"module 'same' is modified in place.*make it return a copy"):
                    diagnostics.capture(model, x, _loss, ["stem", "same", "head"])
                check_against_double_backprop(model, x, _loss, ["stem", "head"])

    def test_a_change_that_nothing_else_sees_is_exact(self, x: Tensor) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            skip = self.stem(x)
            h = self.relu(self.inner(torch.tanh(skip)))
            h += skip
            return self.head(h.sigmoid_())

        model = Call(forward, stem=_linear(), inner=_linear(), relu=nn.ReLU(inplace=True), head=_linear())
        graph = check_against_double_backprop(model, x, _loss, ["stem", "inner", "relu", "head"])
        assert graph["head"].parents == ("stem", "relu")

    def test_inputs_are_left_alone(self, x: Tensor) -> None:
        before = x.clone()
        graph = diagnostics.capture(nn.Sequential(nn.ReLU(inplace=True), _linear()), x, _loss)
        assert torch.equal(x, before)
        assert graph["1"].value.shape == (3, 4)

    def test_a_loss_in_place_on_its_argument_is_exact(self, x: Tensor) -> None:
        check_against_double_backprop(nn.Sequential(_linear(), nn.Tanh(), _linear()), x, lambda z: z.exp_().mean())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_nested_tensors_are_refused_by_the_name_of_the_module() -> None:
    pieces = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    model = nn.Sequential(nn.Linear(3, 3), Call(lambda self, x: pieces))
    with pytest.raises(CaptureError, match="output of module '1' is not a dense tensor"):
        diagnostics.capture(model, torch.ones(2, 3), lambda z: z.sum(), ["1"])


def test_inputs_in_a_dataclass_are_found() -> None:
    @dataclasses.dataclass
    class Batch:
        x: Tensor
        label: str

    model = Call(lambda self, batch: self.fc(batch.x), fc=nn.Linear(4, 3))
    batch = Batch(torch.randn(2, 4), "a")
    graph = diagnostics.capture(model, batch, _loss)
    assert graph.batch_size == 2
    assert batch.label == "a"
