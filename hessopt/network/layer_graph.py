"""Which layers of a network are connected, from the tape of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diagnostics.autograd.tape import Function, ancestry
from diagnostics.graph.graph import shortest_paths
from hessopt.network.layers import Layer
from hessopt.network.parameter_uses import Use

Edges = tuple[tuple[int, int], ...]


def layer_edges(layers: Sequence[Layer], uses: Iterable[Use], ends: Sequence[Tensor]) -> Edges:
    """Direct connections of the layers, as the forward pass shows them.

    Args:
        layers: The layers, ``0..n-1``.
        uses: Uses of their parameters; those in derivatives of the network are left out, since a derivative connects
            every layer with the output directly.
        ends: What the network returned, or else what the loss is computed from.

    Returns:
        ``(v, w)`` for every layer v of which a result reaches an input of layer w without passing through another
        layer; the output is layer number n. A layer none of whose uses was seen is taken for a neighbour of the output.
    """
    owner = {p: v for v, layer in enumerate(layers) for p in layer.parameters}
    calls = [(use, sorted({owner[p] for p in use.parameters if p in owner})) for use in uses if use.forward]
    position: dict[Function, list[int]] = {
        use.result.grad_fn: own for use, own in calls if own and use.result.grad_fn is not None
    }
    ways = [(own, tensor) for use, own in calls for tensor in use.inputs] + [([len(layers)], end) for end in ends]
    edges = set()
    for targets, tensor in ways:
        met = [tensor.grad_fn] if tensor.grad_fn in position else ancestry(tensor, position.keys())[1]
        edges |= {(v, w) for function in met for v in position[function] for w in targets if v != w}
    seen = {v for own in position.values() for v in own}
    edges |= {(v, len(layers)) for v in range(len(layers)) if v not in seen}
    return tuple(sorted(edges))


def layer_distances(count: int, edges: Iterable[tuple[int, int]]) -> NDArray[np.float64]:
    """``(n, n)`` lengths of the shortest undirected paths between layers, ``inf`` where there is none.

    A path may pass through the network's output: two heads of a network are two apart.

    Args:
        count: n.
        edges: As of :func:`layer_edges`: pairs of layers of which one feeds the other without a third one in between;
            the output is number n.
    """
    return shortest_paths(range(count + 1), edges)[:count, :count]
