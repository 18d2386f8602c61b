"""Run a model once and cut its autograd tape at chosen modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diagnostics.autograd.custom_backwards import check_custom_backwards, custom_backwards
from diagnostics.autograd.kernels import (
    EXCLUSIVE,
    CompositeKernels,
    RandomState,
    plain_autograd,
    twice_differentiable,
    without_saved_tensor_hooks,
)
from diagnostics.autograd.lean_kernels import LeanKernels
from diagnostics.autograd.loss_checks import (
    check_scalar_loss,
    check_tapes,
    check_unmodified,
    detached_output,
    floating_tensors,
)
from diagnostics.autograd.refusals import check_inputs, check_loss_fn, check_model
from diagnostics.autograd.second_order import second_order_errors
from diagnostics.autograd.substitution import run_model
from diagnostics.autograd.tape import ancestry, rounding
from diagnostics.autograd.trees import map_tensors, tensors
from diagnostics.errors import CaptureError
from diagnostics.graph.cuts import Cuts
from diagnostics.graph.graph import Graph, Node, WholeTape
from diagnostics.graph.layer_rule import FEW_NODES, layers, layers_inside
from diagnostics.graph.selection import OUTPUT, Selection, select_modules


def capture(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    nodes: Selection = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> Graph:
    """Run ``model`` on one batch and return it as a graph of activation nodes.

    The output of each chosen module is replaced, during this one forward pass, by a detached copy that requires grad.
    The pass then leaves one small piece of autograd tape per node, whose leaves are the node's parents and parameters.
    So any eager model works: control flow, functional calls (they belong to the node whose tape holds them), modules
    called several times (one node a call: ``"fc"``, ``"fc@1"``), shared weights, tuple outputs (one node a tensor:
    ``"lstm[0]"``, ``"lstm[1]"``).

    The rule for ``nodes=None``: the modules that a person would name as layers or blocks.

    1. ``Sequential``, ``ModuleList`` and ``ModuleDict`` are opened; so is a body, a module most of whose parameters
       (embeddings aside) are in stacks of blocks: a ``Sequential`` or ``ModuleList`` of several modules of one class,
       each of several layers. The blocks themselves are not, nor modules of a class that the model has three times.
    2. Every other child that has parameters is a layer (or a block, if it has children), except normalisations
       (class name ending in ``Norm``, ``Norm1d``, …) and learned activations (``PReLU``).
    3. Inside a ``Sequential``, what follows a layer and is none itself — activation, normalisation, pooling, dropout
       — belongs to it: the node is the output of the last of them. A ``Sequential`` with one layer is that layer.
    4. While these are fewer than three, those of several layers are opened, and wrappers.
    5. Of these modules' outputs, tensors whose first dimension is not the batch are left uncut. A module that returns
       none (a flow's transform, a distribution) is opened, and the model is run again.

    Where fewer than three nodes are left, ``graph.note`` (and the graph when it is printed) says so.

    The model's output is always the last node: under the name of the module that returned that very tensor, if that
    was chosen, and as ``"output"`` otherwise. Tables leave it out unless ``nodes`` asked for it.

    The model runs in the mode it is in. With dropout in training mode the blocks are those of the network with this
    pass's mask, the one that the next forward pass of the model would have drawn. Batch-norm in training mode couples
    the samples (``graph.coupled``). The model, its buffers, its grads and the global random state are left as found.
    While it runs, captures and operators in other threads wait: hooks, buffers and random state are the process's.

    Args:
        model: The network; eager, in float32 or float64.
        inputs: A tensor ``(B, …)`` or whatever the model takes: a tuple is passed as ``model(*inputs)``, a dict as
            ``model(**inputs)``. B is the first dimension of the first tensor.
        loss_fn: ``loss_fn(z) -> scalar``, of the model's output z.
        nodes: None (the rule above), an iterable of module names or shell patterns (``["layer*", "fc"]``; the name
            ``"output"`` makes the output a chosen node), or a predicate ``(name, module) -> bool``.
        reduction: How the loss reduces over the batch. It changes no block, only what ``blocks.mean()`` means.

    Returns:
        The :class:`diagnostics.Graph`.

    Raises:
        CaptureError: the model is scripted or compiled, runs without gradients, or returns no floating tensor; a
            tensor is complex, half precision or not strided; the batch, the output or a node that was asked for is
            empty; ``nodes`` names no module, or one that was not called; the output is detached from the nodes; the
            loss is not a finite real scalar that depends on the output; a lazy module has no parameters yet; the model
            uses checkpointing, changes its own parameters, or works in place on a node whose memory other tensors
            share. The message names the module and the way out.
        DiagnosticsError: the backward of a ``torch.autograd.Function`` (a fused loss or normalisation) keeps a part of
            the second derivative off the tape, as five more runs of the model have shown.
        TypeError: an argument is of the wrong kind or in the wrong place (targets, a loss function that takes them).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}.')
    check_loss_fn(loss_fn, "z")
    check_model(model)
    recipe = _Recipe(model, inputs, loss_fn, reduction, check_inputs(inputs))
    if nodes is None:
        return recipe.run_on_layers()
    output_named = not callable(nodes) and OUTPUT in nodes
    return recipe.run(select_modules(model, nodes), automatic=False, output_named=output_named)


class _Recipe:
    """What it takes to run the model again exactly as it ran, with other cuts."""

    def __init__(
        self, model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], reduction: str, batch_size: int
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.reduction = reduction
        self.batch_size = batch_size
        with EXCLUSIVE, plain_autograd():
            self.inputs = map_tensors(_private_copy, inputs)
            self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            self.parameters = dict(model.named_parameters())
        self.versions = [parameter._version for parameter in self.parameters.values()]
        self.random_state = RandomState([*self.parameters.values(), *model.buffers(), *tensors(inputs)])

    def run(self, modules: dict[str, nn.Module], *, automatic: bool, output_named: bool) -> Graph:
        cuts = Cuts(self.batch_size, skip_unbatched=automatic)
        outputs, loss = self._forward(modules, cuts, {}, None)
        if not automatic:
            _check_all_called(modules, cuts)
        self._check_unmodified(cuts, loss)
        return _assemble(self, cuts, outputs, modules, automatic, output_named, loss)

    def run_on_layers(self) -> Graph:
        """Cut at the layers; of those that return nothing to cut (a distribution, a transform), at the layers inside.

        The same for layers that are not called themselves (``self.encoder.features(x)``), where few others are left.
        """
        names = layers(self.model)
        while True:
            modules = {name: self.model.get_submodule(name) for name in names}
            cuts = Cuts(self.batch_size, skip_unbatched=True)
            outputs, loss = self._forward(modules, cuts, {}, None)
            cut = {id(module) for module in cuts.modules.values()}
            few = len(cuts.values) < FEW_NODES
            inside = {
                name: layers_inside(self.model, name)
                for name, module in modules.items()
                if id(module) not in cut and (few or name in cuts.calls)
            }
            if not any(inside.values()):
                break
            names = [deeper for name in names for deeper in inside.get(name) or [name]]
        self._check_unmodified(cuts, loss)
        return _assemble(self, cuts, outputs, modules, True, False, loss)

    def whole(self, modules: dict[str, nn.Module], *, automatic: bool) -> WholeTape:
        """The same run with the nodes' outputs noted but not cut off, and with constants for parameters."""
        marks = Cuts(self.batch_size, skip_unbatched=automatic, apart=False)
        fixed = {name: parameter.detach() for name, parameter in self.parameters.items()}
        kernels = LeanKernels()
        _, loss = self._forward(modules, marks, fixed, kernels)
        return WholeTape(marks.values, loss, kernels.entries)

    def _forward(
        self, modules: dict[str, nn.Module], cuts: Cuts, parameters: dict[str, Tensor], kernels: LeanKernels | None
    ) -> tuple[tuple[str, ...], Tensor]:
        """Run model and loss once; returns the names of the output's nodes, and the loss."""
        with self._recording(), kernels or nullcontext():
            with ExitStack() as hooks:
                for name, module in modules.items():
                    handle = module.register_forward_hook(cuts.hook(name), with_kwargs=True)
                    hooks.callback(handle.remove)
                replaced = {**{name: buffer.clone() for name, buffer in self.buffers.items()}, **parameters}
                result = run_model(self.model, map_tensors(_private_copy, self.inputs), replaced)
            z, outputs = cuts.cut_output(result)
            return outputs, self.loss_fn(z)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(plain_autograd())
            stack.enter_context(twice_differentiable())
            stack.enter_context(without_saved_tensor_hooks())
            stack.enter_context(self.random_state.replayed())
            stack.enter_context(CompositeKernels())
            yield

    def check_custom_backwards(self, ends: Sequence[Tensor]) -> None:
        """Hold backward passes that are not PyTorch's own, on the tapes of ``ends``, against differences."""
        if custom_backwards(ends):
            with second_order_errors():
                check_custom_backwards(self._run_at, list(self.parameters.values()))

    def _run_at(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The model's output and the loss, uncut, with these parameters."""
        replaced = {name: buffer.clone() for name, buffer in self.buffers.items()}
        replaced.update(zip(self.parameters, parameters, strict=True))
        with self._recording():
            z = run_model(self.model, map_tensors(_private_copy, self.inputs), replaced)
            return [t for t in floating_tensors(z) if t.requires_grad], self.loss_fn(z)

    def _check_unmodified(self, cuts: Cuts, loss: Tensor) -> None:
        """Refuse a run in which the cuts kept an operation in place from reaching other names of the same memory."""
        check_unmodified((name, p, v) for (name, p), v in zip(self.parameters.items(), self.versions, strict=True))
        broken = cuts.modified_before()
        suspects = cuts.modified_behind()
        if not broken and suspects and any(module is not None for module in cuts.modules.values()):
            uncut = self.run({}, automatic=True, output_named=False)
            tolerance = rounding([uncut.loss]) ** 0.5 if loss.is_floating_point() else 0.0
            if not torch.allclose(uncut.loss, loss, rtol=tolerance, atol=0.0, equal_nan=True):
                broken = suspects
        if broken:
            raise CaptureError(
                f"the output of module {broken[0]!r} is modified in place, and other tensors share its memory (it "
                "returns its input, a view, or a tensor that is kept elsewhere): they would not see the change through "
                "the cut. Leave it out of `nodes`, or make it return a copy (.clone())."
            )

    def refined(self) -> Graph:
        """The same network with a node for every call of a module that owns trainable parameters."""
        owners = {
            name: module
            for name, module in self.model.named_modules()
            if name and any(p.requires_grad for p in module.parameters(recurse=False))
        }
        return self.run(owners, automatic=True, output_named=False)


def _assemble(
    recipe: _Recipe,
    cuts: Cuts,
    outputs: tuple[str, ...],
    modules: dict[str, nn.Module],
    automatic: bool,
    output_named: bool,
    loss: Tensor,
) -> Graph:
    model = recipe.model
    order = {name: i for i, name in enumerate(cuts.values)}
    node_of = {id(value): name for name, value in cuts.values.items()}
    parameter_of = {id(p): name for name, p in recipe.parameters.items()}

    def sources(tensor: Tensor) -> tuple[tuple[str, ...], tuple[str, ...]]:
        leaves, _ = ancestry(tensor)
        parents = sorted((node_of[id(t)] for t in leaves if id(t) in node_of), key=order.__getitem__)
        parameters = [name for p, name in parameter_of.items() if any(id(t) == p for t in leaves)]
        return tuple(parents), tuple(parameters)

    links = {name: sources(segment) for name, segment in cuts.segments.items()}
    check_scalar_loss(loss, recipe.parameters.items(), lambda: _called_nodes(cuts.values))
    check_tapes([*_called_nodes(cuts.segments), ("the loss", loss)])
    recipe.check_custom_backwards([loss, *cuts.segments.values()])
    loss_parents, loss_parameters = sources(loss)
    if not loss_parents:
        raise CaptureError("the loss does not depend on the model's output: loss_fn must use its argument z.")
    _check_connected(model, links, loss_parents)
    nodes = tuple(
        Node(
            name=name,
            parents=links[name][0],
            children=tuple(child for child in order if name in links[child][0]),
            parameters=links[name][1],
            value=value,
            segment=cuts.segments[name],
            module=cuts.modules[name],
            received=cuts.received.get(name, ()),
        )
        for name, value in cuts.values.items()
    )
    chosen = tuple(
        n.name for n in nodes if (n.name not in outputs if automatic else n.module is not None or output_named)
    )
    return Graph(
        nodes=nodes,
        chosen=chosen or outputs,
        outputs=outputs,
        loss=loss,
        loss_parents=loss_parents,
        loss_parameters=loss_parameters,
        reduction=recipe.reduction,
        batch_size=recipe.batch_size,
        parameters=recipe.parameters,
        refine=recipe.refined,
        record_whole=partial(recipe.whole, modules, automatic=automatic),
        note=_few_nodes(model, nodes) if automatic and len(nodes) < FEW_NODES else None,
    )


def _called_nodes(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"node {name!r}", tensor) for name, tensor in tensors.items()]


def _few_nodes(model: nn.Module, nodes: tuple[Node, ...]) -> str:
    """What to say where the rule has found next to nothing, and how to choose."""
    taken = {id(module) for node in nodes if node.module is not None for module in node.module.modules()}
    others = [
        name
        for name, module in model.named_modules()
        if name and id(module) not in taken and any(True for _ in module.parameters(recurse=False))
    ]
    among = f", among {', '.join(map(repr, others[:4]))}{' …' if len(others) > 4 else ''}" if others else ""
    return (
        f"the rule for nodes=None found only {len(nodes)} node{'s' if len(nodes) > 1 else ''}; choose others by "
        f'nodes=["name", "pattern.*"]{among}'
    )


def _check_all_called(modules: dict[str, nn.Module], cuts: Cuts) -> None:
    for name in modules:
        if name not in cuts.calls:
            raise CaptureError(
                f"module {name!r} was asked for but not called in the forward pass (its parameters may be used without "
                "calling it). Leave it out of `nodes`, or choose a module around it."
            )


def _check_connected(
    model: nn.Module,
    links: dict[str, tuple[tuple[str, ...], tuple[str, ...]]],
    loss_parents: tuple[str, ...],
) -> None:
    connected = any(parents or parameters for parents, parameters in (links[name] for name in loss_parents))
    expected = len(links) > len(loss_parents) or any(p.requires_grad for p in model.parameters())
    if expected and not connected:
        raise detached_output(f"the model's output {loss_parents[0]!r}", "its nodes and parameters")


def _private_copy(value: Tensor) -> Tensor:
    """A copy without the caller's tape, so that the graph ends here and operations in place leave the original."""
    copy = value.detach().clone()
    return copy.requires_grad_(value.requires_grad) if copy.is_floating_point() else copy
