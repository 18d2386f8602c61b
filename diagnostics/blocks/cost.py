"""What the blocks cost: multiplications counted from the structure of the graph, beside measured seconds."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, fields

import torch

from diagnostics.blocks.layout import Layout
from diagnostics.blocks.recursion import hessian_blocks
from diagnostics.graph.graph import Graph
from diagnostics.graph.local import local_derivatives


@dataclass(frozen=True)
class BlockCost:
    """Scalar multiplications of ``hessian_blocks(graph).mean()`` after the local derivatives, all samples together.

    Attributes:
        jacobians: Total Jacobians J, one sweep from input to output.
        elimination: Fronts Φ, one sweep from the loss back.
        tensor: The products Φ J of all blocks of the tensor part, averaged over the batch.
        gauss_newton: J[z←·], and the products Jᵀ ∇²ℓ J of all blocks of the Gauss-Newton part, averaged.
    """

    jacobians: int
    elimination: int
    tensor: int
    gauss_newton: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class MeasuredCost:
    """Predicted and measured cost side by side; made by :func:`measure_cost`.

    Attributes:
        predicted: Multiplications.
        seconds: Wall time of ``hessian_blocks(graph).mean()``, local derivatives included: the least of the repeats.
    """

    predicted: BlockCost
    seconds: float

    @property
    def rate(self) -> float:
        """Multiplications per second; far below the machine's where layers are small and overhead rules."""
        return self.predicted.total / self.seconds


def predict_cost(graph: Graph, exact: bool = False) -> BlockCost:
    """Multiplications that all batch-mean blocks take, counted from the elimination itself (cf. Prop. 89).

    Per sample, with d the sizes, ``N_u`` the entries of all nodes before u, k the size of the output:

    - J: ``Σ_{edges p→u} d_u d_p N_p``, unless the tensor part is zero;
    - elimination of u with front F: ``Σ_{p∈Pa(u)} Σ_{s∈F} d_p d_u d_s``, and ``Σ_{q≤p} d_p d_u d_q`` for its pivot;
    - tensor part: ``Σ_v Σ_{s∈F_v} d_v d_s N_s``;
    - Gauss-Newton part: ``Σ_edges k d_u d_p + k² N + Σ_v d_v k (N_v + d_v)``.

    A chain of n nodes of size d takes ``n² d³ + O(n d³)`` in the first three. What the local derivatives take depends
    on the operations inside each node and is not counted.

    Args:
        graph: A captured network.
        exact: Compute the local derivatives, which say which local curvatures are zero, so that the count is exact.
            False: every node may be curved in all its parents, and the count is an upper bound.
    """
    local = local_derivatives(graph) if exact else None
    layout, sizes = Layout.of(graph), {node.name: graph.size(node) for node in graph.nodes}
    steps = [(u.name, p) for u in graph.nodes for p in u.parents if local is None or p in local.jacobians[u.name]]
    parents = {u.name: [p for v, p in steps if v == u.name] for u in graph.nodes}
    jacobians = sum(sizes[u] * sizes[p] * layout.before(p) for u, p in steps)

    elimination = tensor = 0
    bent = False
    front: dict[str, set[str]] = {node.name: set() for node in graph.nodes}
    for node in reversed(graph.nodes):
        u = node.name
        row = front.pop(u)
        for s in row - {u}:
            front[s].discard(u)
        bent |= bool(row)
        tensor += sum(sizes[u] * sizes[s] * layout.before(s) for s in row)
        others = row - {u}
        for p in parents[u]:
            elimination += sum(sizes[p] * sizes[u] * sizes[s] for s in others)
            _join(front, p, others)
        if u in row:
            for p in parents[u]:
                earlier = [q for q in parents[u] if layout.position[q] <= layout.position[p]]
                elimination += sizes[p] * sizes[u] * (sizes[u] + sum(sizes[q] for q in earlier))
                _join(front, p, earlier)
        if local is None:
            curved = [(p, q) for p in parents[u] for q in parents[u]]
        else:
            curved = list(local.curvatures.get(u, {}))
        for p, q in curved:
            _join(front, p, [q])

    jacobians = jacobians if bent else 0  # nothing to carry forward

    output = sum(sizes[z] for z in graph.loss_parents)
    seen = _reaching(graph, parents)
    gauss_newton = sum(output * sizes[u] * sizes[p] for u, p in steps if u in seen)
    gauss_newton += output**2 * sum(sizes.values())
    gauss_newton += sum(sizes[v] * output * layout.width(v) for v in layout.names)
    samples = layout.samples
    return BlockCost(samples * jacobians, samples * elimination, samples * tensor, samples * gauss_newton)


def measure_cost(graph: Graph, exact: bool = False, repeats: int = 3) -> MeasuredCost:
    """Count the multiplications of ``hessian_blocks(graph).mean()`` and time it.

    Args:
        graph: A captured network.
        exact: As for :func:`predict_cost`.
        repeats: Number of runs; the fastest counts.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    seconds = []
    for _ in range(repeats):
        _synchronise(graph)
        start = time.perf_counter()
        hessian_blocks(graph).mean()
        _synchronise(graph)
        seconds.append(time.perf_counter() - start)
    return MeasuredCost(predict_cost(graph, exact), min(seconds))


def _join(front: dict[str, set[str]], p: str, others: Collection[str]) -> None:
    front[p].update(others)
    for s in others:
        front[s].add(p)


def _reaching(graph: Graph, parents: dict[str, list[str]]) -> set[str]:
    seen = set(graph.loss_parents)
    for node in reversed(graph.nodes):
        if node.name in seen:
            seen.update(parents[node.name])
    return seen


def _synchronise(graph: Graph) -> None:
    if graph.loss.is_cuda:  # kernels run behind the clock
        torch.cuda.synchronize(graph.loss.device)
