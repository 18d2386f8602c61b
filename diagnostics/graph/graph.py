"""The captured network: a directed acyclic graph of activation nodes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal, TypeAlias, TypeVar

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diagnostics.autograd.sample_mixing import mixes_samples
from diagnostics.autograd.tape import rounding
from diagnostics.errors import DiagnosticsError, StaleGraphError

Part: TypeAlias = Literal["total", "gn", "tensor"]
"""The Hessian, its Gauss-Newton part, or its tensor part."""

T = TypeVar("T")
V = TypeVar("V", bound=Hashable)
Again = TypeVar("Again", bound="Graph | WholeTape")


@dataclass(frozen=True, eq=False)
class Node:
    """One activation tensor of the network, and the piece of autograd tape that computes it.

    Attributes:
        name: Qualified name of the module, ``"fc@1"`` for its second call, ``"lstm[0]"`` for one tensor of several.
        parents: Names of the nodes it is computed from, in topological order.
        children: Names of the nodes computed from it, in topological order.
        parameters: Qualified names of the trainable parameters it is computed from.
        value: The activation, ``(B, …)``: a leaf that requires grad; everything downstream was computed from it.
        segment: The same activation as the end of its own tape, whose leaves are the parents and the parameters.
        module: The module that returned it; None for the model's output.
        received: What that module was called with, on the node's own tape.
    """

    name: str
    parents: tuple[str, ...]
    children: tuple[str, ...]
    parameters: tuple[str, ...]
    value: Tensor
    segment: Tensor
    module: nn.Module | None
    received: tuple[Any, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """Shape of the activation, batch dimension included."""
        return self.value.shape

    def __repr__(self) -> str:
        kind = type(self.module).__name__ if self.module is not None else "output of the model"
        parents = ", ".join(self.parents) or "-"
        return f"Node({self.name!r}, {kind}, shape={tuple(self.shape)}, parents: {parents})"


@dataclass(frozen=True, eq=False)
class WholeTape:
    """The same forward pass as a graph's, recorded without cuts; made by ``graph.whole``.

    Parameters are constants on this tape. The derivative of anything by ``values[v]`` is its derivative by an additive
    injection at node v, for all that was computed from v.

    Attributes:
        values: For each node of the graph its activation, ``(B, …)``, on the tape.
        loss: The loss, a scalar.
        entries: Entries of all intermediate tensors of the tape: about what a product holds for each probe.
    """

    values: dict[str, Tensor]
    loss: Tensor
    entries: int


class Graph:
    """A network on one batch, cut at chosen nodes; made by :func:`diagnostics.capture`.

    ``graph.nodes`` are the nodes in topological order, the model's output last; ``graph["name"]`` is one of them.
    The graph holds the autograd tape of one forward pass and can be used any number of times, until the parameters
    change: then it describes another network, and using it raises :class:`diagnostics.StaleGraphError`.

    Attributes:
        nodes: All nodes in topological order, those of the model's output last.
        chosen: Names of the nodes that were asked for (tables range over these).
        outputs: Names of the nodes that hold the model's output.
        loss: The loss, a scalar at the end of its own tape.
        loss_parents: Names of the nodes that the loss is computed from.
        loss_parameters: Names of the trainable parameters that the loss is computed from directly.
        parameters: The model's parameters by qualified name, in the order of ``model.parameters()``.
        reduction: ``"mean"`` or ``"sum"``: how the loss reduces over the batch.
        batch_size: Size of the first dimension of the inputs.
        note: That the rule for ``nodes=None`` found fewer than three nodes, and how to choose; None otherwise.
    """

    def __init__(
        self,
        nodes: tuple[Node, ...],
        chosen: tuple[str, ...],
        outputs: tuple[str, ...],
        loss: Tensor,
        loss_parents: tuple[str, ...],
        loss_parameters: tuple[str, ...],
        reduction: str,
        batch_size: int,
        parameters: dict[str, nn.Parameter],
        refine: Callable[[], Graph],
        record_whole: Callable[[], WholeTape],
        note: str | None = None,
    ) -> None:
        self.nodes = nodes
        self.chosen = chosen
        self.outputs = outputs
        self.loss = loss
        self.loss_parents = loss_parents
        self.loss_parameters = loss_parameters
        self.parameters = parameters
        self.reduction = reduction
        self.batch_size = batch_size
        self.note = note
        self._by_name = {node.name: node for node in nodes}
        self._refine = refine
        self._made: dict[Callable[[Graph], Any], Any] = {}
        self._record_whole = record_whole
        self._versions = {name: (parameter, parameter._version) for name, parameter in parameters.items()}

    def __getitem__(self, name: str) -> Node:
        """The node called ``name``; a KeyError that lists the names otherwise."""
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no node {name!r}; the nodes are {', '.join(map(repr, self._by_name))}") from None

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __repr__(self) -> str:
        lines = [f"Graph of {len(self)} nodes, batch of {self.batch_size}, loss {self.loss.item():.6g}"]
        lines += [f"  {node!r}" for node in self.nodes]
        lines += [f"  Note: {self.note}"] if self.note else []
        return "\n".join(lines)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of blocks: the finest of all nodes, their parameters and the loss, where these are several."""
        used = {name for node in self.nodes for name in node.parameters} | set(self.loss_parameters)
        tensors = [self.loss, *(node.value for node in self.nodes), *(self.parameters[name] for name in used)]
        return reduce(torch.promote_types, {t.dtype for t in tensors})

    @cached_property
    def coupled(self) -> bool:
        """Whether samples of the batch influence each other (batch-norm in training mode, a contrastive loss …).

        Nodes are tested on the tape with respect to their parents, and of the loss the gradient with respect to the
        output (:func:`diagnostics.autograd.sample_mixing.mixes_samples`). A node without the batch as its first
        dimension counts as coupled. The blocks of a coupled graph are those of one joint sample.
        """
        if self.batch_size == 1:
            return False
        if not all(self.is_batched(node) for node in self.nodes):
            return True
        inner = [node for node in self.nodes if node.parents]
        if inner and mixes_samples([n.segment for n in inner], [n.value for n in self.nodes if n.children]):
            return True
        sources = [self[name].value for name in self.loss_parents]
        gradients = torch.autograd.grad(self.loss, sources, create_graph=True, materialize_grads=True)
        curved = [g for g in gradients if g.requires_grad]
        return bool(curved) and mixes_samples(curved, sources)

    def is_batched(self, node: Node) -> bool:
        """Whether the node's first dimension has the batch size."""
        return node.value.ndim > 0 and node.shape[0] == self.batch_size

    @property
    def samples(self) -> int:
        """Number S of independent samples: the batch size, or 1 when the samples are coupled."""
        return 1 if self.coupled else self.batch_size

    def size(self, node: Node) -> int:
        """Entries d of the node in one independent sample."""
        return node.value.numel() // self.samples

    @cached_property
    def distances(self) -> Tensor:
        """Shortest undirected path length between every two nodes, ``(n, n)``; infinite when unconnected (Thm 77)."""
        return torch.from_numpy(shortest_paths(list(self._by_name), self.to_networkx().edges)).to(
            torch.get_default_dtype()
        )

    def distance(self, v: str, w: str) -> float:
        """Length of the shortest undirected path between nodes ``v`` and ``w``; infinite when there is none."""
        names = list(self._by_name)
        return self.distances[names.index(self[v].name), names.index(self[w].name)].item()

    def to_networkx(self) -> nx.DiGraph[str]:
        """The graph in networkx: edges from parent to child; nodes with ``shape``, ``module`` and ``parameters``."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        for node in self.nodes:
            kind = type(node.module).__name__ if node.module is not None else None
            graph.add_node(node.name, shape=tuple(node.shape), module=kind, parameters=node.parameters)
        graph.add_edges_from((parent, node.name) for node in self.nodes for parent in node.parents)
        return graph

    @cached_property
    def refined(self) -> Graph:
        """The same network on the same batch with a node for every call of a module that owns parameters.

        The model is run once more, from the same random state and buffers.

        Raises:
            DiagnosticsError: this run gave another loss, so the model keeps state of its own.
        """
        return self._run_again(self._refine)

    @cached_property
    def whole(self) -> WholeTape:
        """The same network on the same batch with its tape in one piece, for products.

        The model is run once more, from the same random state and buffers.

        Raises:
            DiagnosticsError: this run gave another loss, so the model keeps state of its own.
        """
        return self._run_again(self._record_whole)

    def once(self, make: Callable[[Graph], T]) -> T:
        """``make(graph)``, made at the first call with this ``make`` and kept with the graph.

        For what is recorded of a graph once and used by many: the graph itself knows none of its users.
        """
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made

    def _run_again(self, run: Callable[[], Again]) -> Again:
        self.check_fresh()
        found = run()
        loss = found.loss
        if not loss.equal(self.loss) and not torch.allclose(loss, self.loss, rtol=rounding([loss]) ** 0.75, atol=0):
            raise DiagnosticsError(
                f"running the model again on the same batch gave the loss {loss.item():.8g} instead of "
                f"{self.loss.item():.8g}, although buffers and random state were the same: its forward pass or the "
                "loss function keeps state outside of buffers (a counter, NumPy's random numbers). Remove that."
            )
        return found

    def check_fresh(self) -> None:
        """Raise :class:`diagnostics.StaleGraphError` if a parameter was changed in place since the capture."""
        changed = [name for name, (parameter, version) in self._versions.items() if parameter._version != version]
        if changed:
            raise StaleGraphError(
                f"parameter {changed[0]!r} was changed after the capture (an optimizer step?), so the recorded graph "
                "belongs to the network as it was. Capture again."
            )


def shortest_paths(nodes: Sequence[V], edges: Iterable[tuple[V, V]]) -> NDArray[np.float64]:
    """``(n, n)`` lengths of the shortest undirected paths between the nodes, in their order; infinite for none."""
    at = {node: i for i, node in enumerate(nodes)}
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(at.values())
    graph.add_edges_from((at[v], at[w]) for v, w in edges)
    distances = np.full((len(at), len(at)), np.inf)
    for i, lengths in nx.all_pairs_shortest_path_length(graph):
        distances[i, list(lengths)] = list(lengths.values())
    return distances
