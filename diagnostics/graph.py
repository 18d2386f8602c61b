"""The captured network: a directed acyclic graph of activation nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import Tensor, nn

from diagnostics.coupling import couples_samples
from diagnostics.errors import DiagnosticsError, StaleGraphError
from diagnostics.tape import rounding
from diagnostics.whole_tape import WholeTape

if TYPE_CHECKING:
    from diagnostics.block_operator import BlockOperator
    from diagnostics.parametric import Part
    from diagnostics.products import CurvatureProducts
    from diagnostics.routing import CurvatureRouting


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

        Tested on the tape by vector-Jacobian products seeded at subsets of the samples (see
        :func:`diagnostics.coupling.couples_samples`). A node without the batch as its first dimension counts as
        coupled. The blocks of a coupled graph are those of one joint sample.
        """
        return couples_samples(self)

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
        distance = torch.full((len(self), len(self)), torch.inf)
        order = {name: i for i, name in enumerate(self._by_name)}
        for v, lengths in nx.all_pairs_shortest_path_length(self.to_networkx().to_undirected(as_view=True)):
            for w, length in lengths.items():
                distance[order[v], order[w]] = length
        return distance

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
        self.check_fresh()
        graph = self._refine()
        self._check_same_loss(graph.loss)
        return graph

    @cached_property
    def whole(self) -> WholeTape:
        """The same network on the same batch with its tape in one piece, for products.

        The model is run once more, from the same random state and buffers.

        Raises:
            DiagnosticsError: this run gave another loss, so the model keeps state of its own.
        """
        self.check_fresh()
        tape = self._record_whole()
        self._check_same_loss(tape.loss)
        return tape

    @cached_property
    def products(self) -> CurvatureProducts:
        """Products of the Hessian, its Gauss-Newton and its tensor part with tangents at nodes."""
        from diagnostics.products import CurvatureProducts

        return CurvatureProducts(self)

    @cached_property
    def routing(self) -> CurvatureRouting:
        """The slopes of all nodes with tapes of their own, for :func:`diagnostics.route`."""
        from diagnostics.routing import CurvatureRouting

        return CurvatureRouting(self)

    def block_operator(self, v: str, w: str, part: Part = "total") -> BlockOperator:
        """The batch-mean block H[v,w] as a linear operator, ``(d_v, d_w)``, without forming it.

        ``graph.block_operator(v, w) @ x`` is ``hessian_blocks(graph).mean().total[v, w] @ x``: one injection x at w,
        shared by all samples, and the response at v, summed over them (averaged, for a summed loss). A product passes
        through the part of the network behind w and v twice, however large the block is.

        Args:
            v: Name of the node of the rows.
            w: Name of the node of the columns.
            part: ``"total"``, ``"gn"`` or ``"tensor"``.

        Returns:
            A :class:`diagnostics.block_operator.BlockOperator`, symmetric where v is w.

        Raises:
            KeyError: there is no such node.
            DiagnosticsError: a node has no second derivative, named in the message.
            StaleGraphError: a parameter changed since the capture; also when the operator is used.
        """
        from diagnostics.block_operator import BlockOperator

        return BlockOperator(self, v, w, part)

    def _check_same_loss(self, loss: Tensor) -> None:
        if not loss.equal(self.loss) and not torch.allclose(loss, self.loss, rtol=rounding([loss]) ** 0.75, atol=0):
            raise DiagnosticsError(
                f"running the model again on the same batch gave the loss {loss.item():.8g} instead of "
                f"{self.loss.item():.8g}, although buffers and random state were the same: its forward pass or the "
                "loss function keeps state outside of buffers (a counter, NumPy's random numbers). Remove that."
            )

    def check_fresh(self) -> None:
        """Raise :class:`diagnostics.StaleGraphError` if a parameter was changed in place since the capture."""
        changed = [name for name, (parameter, version) in self._versions.items() if parameter._version != version]
        if changed:
            raise StaleGraphError(
                f"parameter {changed[0]!r} was changed after the capture (an optimizer step?), so the recorded graph "
                "belongs to the network as it was. Capture again."
            )
