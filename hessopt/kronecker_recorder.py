"""Hooks that see what Kronecker factors are made of: inputs of layers, and where to stop back-propagation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from diagnostics.tape import Function
from hessopt.errors import ModelError
from hessopt.kronecker_layers import Block
from hessopt.weak_hooks import WeakHooks


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Attributes:
        block: Position of its block.
        module: The layer.
        input: Its input, detached.
        source: Where the input comes from on the tape; None for data.
        edge: The output's place on the tape, which in-place operations downstream do not move.
        cotangent: The gradient that an ordinary backward brought here, if it was asked for.
    """

    block: int
    module: nn.Module
    input: Tensor
    source: Function | None
    edge: GradientEdge
    cotangent: Tensor | None = None


class Recorder:
    """Persistent forward hooks on the layers of the blocks. Unless :attr:`active`, they do nothing.

    Args:
        blocks: The blocks, numbered in this order.
        catch: Keep the cotangents of the ordinary backward.
    """

    def __init__(self, blocks: Sequence[Block], catch: bool) -> None:
        self.active = False
        self.catch = catch
        self.calls: list[Call] = []
        self._hooks = WeakHooks(self, "record")
        for number, block in enumerate(blocks):
            for module in block.modules:
                self._hooks.attach(module, number, prepend=True)

    def start(self) -> None:
        """Record the calls from here on."""
        self.calls, self.active = [], True

    def stop(self) -> list[Call]:
        """Stop recording and hand over the calls."""
        calls, self.calls, self.active = self.calls, [], False
        return calls

    def remove(self) -> None:
        """Take the hooks away."""
        self._hooks.remove()

    def record(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note a call of a layer of block ``number``: the forward hook."""
        if not self.active or not isinstance(output, Tensor) or not output.requires_grad:
            return
        x = args[0] if args else kwargs["input"]
        call = Call(number, module, x.detach(), x.grad_fn, get_gradient_edge(output))
        if self.catch:

            def catch(gradients: Sequence[Tensor | None]) -> None:
                if call.cotangent is None:
                    call.cotangent = gradients[call.edge.output_nr]

            call.edge.node.register_prehook(catch)
        self.calls.append(call)


def block_distances(calls: Sequence[Call], output: Function | None, count: int) -> NDArray[np.float64]:
    """Lengths of the shortest undirected paths between blocks, ``(n, n)``, ``inf`` where there is none.

    Two blocks are adjacent if the output of one reaches an input of the other (or the network's output, which is a
    vertex too) on the tape without passing through a third block. A block with several calls is one vertex.

    Args:
        calls: The calls of one forward pass.
        output: The ``grad_fn`` of the network's output.
        count: n.
    """
    owner: dict[Function, int] = {call.edge.node: call.block for call in calls}
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(count + 1))
    for target, source in [*((call.block, call.source) for call in calls), (count, output)]:
        graph.add_edges_from((block, target) for block in _reached(source, owner) if block != target)
    distance = np.full((count + 1, count + 1), np.inf)
    for v, lengths in nx.all_pairs_shortest_path_length(graph):
        distance[v, list(lengths)] = list(lengths.values())
    return distance[:count, :count]


def _reached(start: Function | None, owner: dict[Function, int]) -> Iterable[int]:
    """Blocks whose outputs the walk back from ``start`` (itself included) meets first."""
    seen: set[Function] = set()
    stack = [start]
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if function in owner:
            yield owner[function]
        else:
            stack += [parent for parent, _ in function.next_functions]


def back_propagate(
    output: Tensor, columns: Tensor, calls: Sequence[Call], others: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Columns back-propagated to the outputs of calls and to parameters; the tape is retained.

    Args:
        output: The network's output.
        columns: ``(K, *output.shape)``.
        calls: Where to.
        others: Parameters.

    Returns:
        For each call ``(K, *its output's shape)``, for each parameter ``(K, *shape)``; None where the output does not
        depend on it.

    Raises:
        ModelError: a parameter's gradient is sparse.
    """
    targets: list[Any] = [*(call.edge for call in calls), *others]
    columns = columns.to(output.dtype)
    if len(columns) == 1:
        found = torch.autograd.grad(output, targets, columns[0], retain_graph=True, allow_unused=True)
        check_strided(found)
        products: list[Tensor | None] = [None if t is None else t.unsqueeze(0) for t in found]
    else:
        products = list(
            torch.autograd.grad(output, targets, columns, retain_graph=True, allow_unused=True, is_grads_batched=True)
        )
    return products[: len(calls)], products[len(calls) :]


def check_strided(gradients: Sequence[Tensor | None]) -> None:
    """Raise a ModelError if a gradient is sparse."""
    for g in gradients:
        if g is not None and g.layout != torch.strided:
            raise ModelError(
                f"a parameter of shape {tuple(g.shape)} has a sparse gradient, which Kronecker factors do not take; "
                "build its layer with sparse=False."
            )
