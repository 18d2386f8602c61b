"""What gradient flow conserves because a network is homogeneous: found, and checked, by scaling weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.autograd.kernels import RandomState
from diagnostics.autograd.substitution import run_model
from diagnostics.autograd.tape import walk
from diagnostics.autograd.trees import map_tensors, tensors
from diagnostics.conservation.channel_slices import (
    every_entry,
    incoming,
    is_normalisation,
    outgoing,
    powers_of_two,
    reads_channels,
    whole,
)
from diagnostics.conservation.quantity import ConservedQuantity, QuantityKind
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.capture import capture
from diagnostics.graph.graph import Graph, Node

_ROUNDINGS = 64  # of the output: factors are powers of two, so that a homogeneous network shows none or few


def homogeneous_pairs(model: nn.Module, inputs: Any) -> tuple[ConservedQuantity, ...]:
    """What gradient flow conserves because scaling weights against each other leaves the network's output unchanged.

    Candidates come from the autograd tape: for every linear layer, convolution, embedding or affine normalisation the
    linear layers and convolutions that read its output, through whatever is in between; where these read others as
    well (a residual stream), all of them together. Each candidate is then tried on ``inputs``: channels are scaled by
    random powers of two, which round nothing, and the outputs compared. So ReLU, LeakyReLU, PReLU, dropout, max and
    average pooling, residual sums and gates pass by what they do, not by their names; tanh, GELU, or a batch-norm with
    its ε do not, and the result says by how much. Where channels cannot be scaled one by one (LayerNorm behind them,
    a concatenation), all are scaled together.

    Args:
        model: The network, in the mode in which it is trained. It is left as found.
        inputs: As in :func:`diagnostics.capture`. What a network does elsewhere (a ReLU6 whose limit these inputs do
            not reach) is not seen: :class:`diagnostics.ConservationMonitor` shows it as a residual.

    Returns:
        One :class:`ConservedQuantity` for each layer that has candidates, in topological order, with ``exact`` and
        ``reason``. The last layer has none.

    Raises:
        CaptureError: As in :func:`diagnostics.capture`.

    Source: Du, Hu and Lee 2018 (balancedness); arXiv 2604.07405.
    """
    graph = capture(model, inputs, _any_loss, nodes=["output"]).refined
    layers = _Layers(model, graph)
    trial = _Trial(model, inputs)
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], ConservedQuantity] = {}
    for source in layers.sources:
        tried: list[ConservedQuantity] = []
        for candidate in sorted(layers.candidates(source), key=lambda q: -q.channels):  # stable: kinds stay in order
            tried.append(trial(candidate))
            if tried[-1].exact:
                break
        best = tried[-1] if tried and tried[-1].exact else layers.nearest(source, tried)
        if best is None:
            continue
        if not best.exact:
            best = replace(best, reason=layers.reason(best))
        found.setdefault((best.sources, best.consumers), _with_frozen(best, graph.parameters))
    return tuple(found.values())


class _Layers:
    """Which layers read which, through nodes that are neither (a learned activation, a module with own parameters)."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._graph = graph
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = {name: module for module, name in self._names.items()}
        first = {parameter: name for name, parameter in model.named_parameters()}
        self._first = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}
        self.sources: list[str] = []
        self._readers: dict[str, dict[str, None]] = {}  # in order, each once
        self._to_output: set[str] = set()
        self._to_norm: dict[str, str] = {}
        for node in graph.nodes:
            if node.module is None or not outgoing("", node.module):
                continue
            name = self._names[node.module]
            if name not in self._readers:
                self.sources.append(name)
                self._readers[name] = {}
            self._follow(name, node)

    def _follow(self, source: str, node: Node) -> None:
        if node.name in self._graph.outputs:
            self._to_output.add(source)
        for child in (self._graph[name] for name in node.children):
            if child.module is None:
                self._to_output.add(source)
            elif reads_channels(child.module):
                self._readers[source][self._names[child.module]] = None
            elif is_normalisation(child.module):
                self._to_norm[source] = self._names[child.module]
            else:
                self._follow(source, child)

    def nearest(self, source: str, tried: Sequence[ConservedQuantity]) -> ConservedQuantity | None:
        """What is reported where nothing is exact: the finest of those that change the output about least.

        None for the last layer: nothing reads it, and nothing undoes its scale.
        """
        kind = "balanced" if self._readers[source] and source not in self._to_norm else "scale-invariant"
        fitting = [quantity for quantity in tried if quantity.kind == kind]
        if not fitting or not (self._readers[source] or source in self._to_norm):
            return None
        least = min(quantity.defect for quantity in fitting)
        return next(quantity for quantity in fitting if quantity.defect <= 10 * least)

    def candidates(self, source: str) -> Iterable[ConservedQuantity]:
        """What may be conserved."""
        yield from self._forms("scale-invariant", (source,), ())
        readers = tuple(self._readers[source])
        if readers:
            yield from self._forms("balanced", (source,), readers)
            group = self._closure(source)
            if group != ((source,), readers):
                yield from self._forms("balanced", *group)

    def _closure(self, source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The layers that are scaled together if all that feed a reader are, and the readers of all these."""
        sources, readers = {source}, set(self._readers[source])
        while True:
            more = {name for name in self.sources if readers & self._readers[name].keys()}
            reading = {reader for name in more for reader in self._readers[name]}
            if more <= sources and reading <= readers:
                order = {name: i for i, name in enumerate(self._modules)}
                return tuple(s for s in self.sources if s in sources), tuple(sorted(readers, key=order.__getitem__))
            sources |= more
            readers |= reading

    def _forms(
        self, kind: QuantityKind, sources: tuple[str, ...], readers: tuple[str, ...]
    ) -> Iterable[ConservedQuantity]:
        sign = 1 if kind == "scale-invariant" else -1
        made = [slices for name in sources for slices in outgoing(f"{name}.", self._modules[name])]
        channels = made[0].channels
        read = [incoming(f"{name}.", self._modules[name], channels) for name in readers]
        aligned = [(s, sign) for s in made] + [(s, 1) for s in read if s is not None]
        forms = [(channels, aligned)] if channels > 1 and len(aligned) == len(made) + len(read) else []
        together = [(whole(s), sign) for s in made]
        together += [(every_entry(f"{name}.", self._modules[name]), 1) for name in readers]
        for count, terms in (*forms, (1, together)):
            renamed = [(replace(slices, name=self._first[slices.name]), sign) for slices, sign in terms]
            distinct = len({slices.name for slices, _ in renamed}) == len(renamed)  # no weight tied to another of these
            if distinct and all(slices.channels == count for slices, _ in renamed):
                yield ConservedQuantity(kind, sources, readers, count, tuple(renamed), False, 1.0)

    def reason(self, quantity: ConservedQuantity) -> str:
        """Why scaling changes the output."""
        name = quantity.sources[0]
        change = f"changes the output by {quantity.defect:.1e}"
        if quantity.kind == "scale-invariant":
            norm = self._to_norm.get(name)
            eps = getattr(self._modules[norm], "eps", None) if norm is not None else None
            cause = f" (eps={eps:g} of {type(self._modules[norm]).__name__} {norm!r})" if norm and eps else ""
            return f"scaling {name!r} {change}{cause}"
        nodes = [n for n in self._graph.nodes if n.module is not None and self._names[n.module] in quantity.consumers]
        operations = sorted({op for node in nodes for op in _operations(node.segment)} - _HOMOGENEOUS)
        between = f": the map between is not 1-homogeneous ({', '.join(operations)})" if operations else ""
        beside = " and it also feeds the output directly" if name in self._to_output else ""
        return f"scaling {name!r} by c and {', '.join(map(repr, quantity.consumers))} by 1/c {change}{between}{beside}"


class _Trial:
    """The output of the model with scaled parameters, everything else being the same."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._model = model
        self._inputs = map_tensors(lambda t: t.detach().clone(), inputs)
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._random = RandomState([*self._parameters.values(), *self._buffers.values(), *tensors(inputs)])
        self._output = self._run({})

    def __call__(self, candidate: ConservedQuantity) -> ConservedQuantity:
        """The candidate with what scaling it does to the output."""
        generator = torch.Generator().manual_seed(0)
        factors = powers_of_two(candidate.channels, generator)
        defect = 0.0
        for both in (factors, 1 / factors):
            defect = max(defect, self._change(self._run(candidate.scaled(self._parameters, both))))
        eps = max(torch.finfo(t.dtype).eps for t in self._output)
        return replace(candidate, exact=defect <= _ROUNDINGS * eps, defect=defect)

    def _run(self, scaled: Mapping[str, Tensor]) -> list[Tensor]:
        replaced = {**{name: b.clone() for name, b in self._buffers.items()}, **scaled}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._random.replayed())
            output = run_model(self._model, map_tensors(torch.clone, self._inputs), replaced)
        return [t for t in tensors(output) if t.is_floating_point()]

    def _change(self, output: list[Tensor]) -> float:
        if [t.shape for t in output] != [t.shape for t in self._output]:
            return float("inf")
        changes = []
        for new, old in zip(output, self._output, strict=True):
            largest = old.abs().amax().item()
            difference = (new - old).abs().amax().item()
            changes.append(difference / largest if largest > 0 else float(difference > 0))
        worst = max(changes)
        return worst if worst == worst else float("inf")


def _with_frozen(quantity: ConservedQuantity, parameters: Mapping[str, nn.Parameter]) -> ConservedQuantity:
    frozen = [slices.name for slices, _ in quantity.terms if not parameters[slices.name].requires_grad]
    if not frozen:
        return quantity
    return replace(quantity, exact=False, reason=f"parameter {frozen[0]!r} is frozen (requires_grad=False)")


def _any_loss(z: Any) -> Tensor:
    floating = [t for t in tensors(z) if t.is_floating_point()]
    if not floating:
        raise DiagnosticsError("the model returned no floating-point tensor.")
    return torch.stack([t.square().mean() for t in floating]).sum()


def _operations(end: Tensor) -> set[str]:
    """Names of the operations on the tape that ends at a tensor."""
    return {re.sub(r"(Backward)?\d*$", "", function.name()) for function in walk(end.grad_fn)}


_HOMOGENEOUS = frozenset(
    [
        "torch::autograd::AccumulateGrad",
        "struct",
        "Addmm",
        "Mm",
        "Bmm",
        "Mv",
        "Dot",
        "T",
        "Transpose",
        "Permute",
        "View",
        "UnsafeView",
        "Reshape",
        "ReshapeAlias",
        "Alias",
        "Clone",
        "Expand",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Select",
        "Index",
        "Cat",
        "Stack",
        "Split",
        "Add",
        "Sub",
        "Neg",
        "Sum",
        "Mean",
        "Convolution",
        "MaxPool2DWithIndices",
        "MaxPool1D",
        "MaxPool3DWithIndices",
        "AvgPool2D",
        "AvgPool3D",
        "AdaptiveAvgPool2D",
        "AdaptiveMaxPool2D",
        "MkldnnConvolution",
        "Relu",
        "LeakyRelu",
        "PreluKernel",
        "Abs",
        "Threshold",
        "MkldnnMaxPool2D",
        "ToCopy",
        "Linear",
    ]
) | {"torch::autograd::CopySlices"}
"""Operations that are not suspected; only the wording of reasons depends on it."""
