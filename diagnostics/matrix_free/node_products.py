"""Products of the Hessian with tangents at nodes, and of its Gauss-Newton and tensor parts, for all nodes at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from diagnostics.autograd.kernels import plain_autograd, twice_differentiable
from diagnostics.autograd.tape import Verified, batched_vjp, named_errors, slopes_of
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph

ONE_BY_ONE = 2
"""Up to so many products, to batch and to verify them would cost more than it saves."""

Tangents = Mapping[str, Tensor]
"""By name of a node: directions ``(k, *shape of the node)``, k of them."""


class NodeProducts:
    """``H r``, ``G r`` and ``T r`` for tangents r at nodes, exact; made by :meth:`of`.

    Let ``q(s) = J[z←·]ᵀ s`` be the signals at all nodes for a cotangent s of the model's output z, recorded once with
    a tape of its own. It is linear in s, so a derivative of ``r · q_w`` by s is ``J[z←w] r``. By the activations, with
    s = ∇ℓ(z) held fixed, it is the tensor part ``T[v,w] r`` for all v; with s = ∇ℓ(z) as the function of z that it
    is, it is ``H[v,w] r``. So one product passes twice through the network, however many nodes there are, and
    ``G r = Jᵀ ∇²ℓ (J r)`` is a third pass on top of the pass that T makes anyway.

    Attributes:
        count: Columns multiplied so far: ``"total"`` and ``"tensor"`` (two passes each), ``"vjp"`` (one pass).
    """

    @classmethod
    def of(cls, graph: Graph) -> NodeProducts:
        """Those of ``graph``, recorded at the first call."""
        return graph.once(cls)

    def __init__(self, graph: Graph) -> None:
        graph.check_fresh()
        _check_one_dtype(graph)
        self.graph = graph
        self.count = {"total": 0, "tensor": 0, "vjp": 0}
        self._verified = Verified()
        self._values = graph.whole.values
        self._ends = [self._values[name] for name in graph.loss_parents]
        with plain_autograd(), twice_differentiable():
            leaves = [graph[name].value for name in graph.loss_parents]
            self._loss_slopes = slopes_of("the loss", graph.loss, leaves, torch.ones_like(graph.loss))
            _check_twice_differentiable(graph, self._loss_slopes)

    def tensor(self, tangents: Tangents, targets: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``Σ_w T[v,w] r_w`` at the targets v, and ``Σ_w J[z←w] r_w`` at the parents z of the loss.

        Args:
            tangents: Tangents r_w at nodes, ``(k, *shape)``.
            targets: Names of nodes.

        Returns:
            Two dicts of tensors ``(k, *shape)``.
        """
        slopes, signal = self._fixed_signal
        names = list(targets)
        found, k = self._derivatives(slopes, tangents, [*signal, *(self._values[v] for v in names)])
        self.count["tensor"] += k
        return dict(zip(names, found[len(signal) :], strict=True)), self._at_ends(found[: len(signal)])

    def total(self, tangents: Tangents, targets: Iterable[str]) -> dict[str, Tensor]:
        """``Σ_w H[v,w] r_w`` at the targets v, ``(k, *shape)`` each; arguments as of :meth:`tensor`."""
        names = list(targets)
        found, k = self._derivatives(self._moving_signal, tangents, [self._values[v] for v in names])
        self.count["total"] += k
        return dict(zip(names, found, strict=True))

    def gauss_newton(self, tangents: Tangents, targets: Iterable[str]) -> dict[str, Tensor]:
        """``Σ_w G[v,w] r_w`` at the targets v, ``(k, *shape)`` each; arguments as of :meth:`tensor`."""
        slopes, signal = self._fixed_signal
        moved, k = self._derivatives(slopes, tangents, list(signal))
        self.count["vjp"] += k
        return self.carried_back(self.loss_curvature(self._at_ends(moved)), targets)

    def carried_back(self, cotangents: Tangents, targets: Iterable[str]) -> dict[str, Tensor]:
        """``Σ_z J[z←v]ᵀ c_z`` at the targets v, for cotangents of the parents z of the loss, ``(k, *shape)``."""
        names = list(targets)
        seeds = [cotangents[name] for name in self.graph.loss_parents]
        found = _products(self._ends, [self._values[v] for v in names], seeds, self._verified)
        self.count["vjp"] += len(seeds[0])
        return dict(zip(names, found, strict=True))

    def loss_curvature(self, tangents: Tangents) -> dict[str, Tensor]:
        """``∇²ℓ t`` for tangents t of the parents z of the loss, ``(k, *shape)``."""
        parents = self.graph.loss_parents
        leaves = [self.graph[name].value for name in parents]
        known = [(name, s) for name, s in zip(parents, self._loss_slopes, strict=True) if s is not None]
        curved = [(name, slope) for name, slope in known if slope.requires_grad]
        k = len(tangents[parents[0]])
        if not curved:
            return {name: leaf.new_zeros(k, *leaf.shape) for name, leaf in zip(parents, leaves, strict=True)}
        slopes = [slope for _, slope in curved]
        found = _products(slopes, leaves, [tangents[name] for name, _ in curved], self._verified)
        return dict(zip(parents, found, strict=True))

    def columns_in(self, memory: int) -> int:
        """How many columns may be multiplied at one time in ``memory`` bytes: at least one."""
        tape = self.graph.whole
        nodes = sum(value.numel() for value in tape.values.values())
        return max(1, memory // ((tape.entries + nodes) * tape.loss.element_size()))

    @cached_property
    def _fixed_signal(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """q_w(s) by node, for a leaf s = ∇ℓ(z), and s for each parent of the loss."""
        slopes = zip(self._ends, self._loss_slopes, strict=True)
        signal = [(torch.zeros_like(z) if s is None else s).detach().clone().requires_grad_() for z, s in slopes]
        return self._signals(self._ends, signal), signal

    @cached_property
    def _moving_signal(self) -> dict[str, Tensor]:
        """q_w(∇ℓ(z)) by node, ∇ℓ a function of z."""
        return self._signals([self.graph.whole.loss], None)

    def _signals(self, ends: Sequence[Tensor], signal: Sequence[Tensor] | None) -> dict[str, Tensor]:
        values = list(self._values.values())
        with plain_autograd(), twice_differentiable(), named_errors("the network"):
            found = torch.autograd.grad(ends, values, signal, create_graph=True, allow_unused=True)
        named = zip(self._values, found, strict=True)
        return {name: slope for name, slope in named if slope is not None and slope.requires_grad}

    def _derivatives(
        self, slopes: Mapping[str, Tensor], tangents: Tangents, inputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], int]:
        self.graph.check_fresh()
        known = [name for name in tangents if self.graph[name].name in slopes]
        k = len(next(iter(tangents.values())))
        if not known:
            return [t.new_zeros(k, *t.shape) for t in inputs], k
        seeds = [tangents[name] for name in known]
        return _products([slopes[name] for name in known], inputs, seeds, self._verified), k

    def _at_ends(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.graph.loss_parents, found, strict=True))


def vector_products(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    verified: Verified | None = None,
) -> list[Tensor | None]:
    """Vector-Jacobian products for cotangents ``(k, *shape)``, ``(k, *shape)`` each; None where nothing depends on it.

    Up to :data:`ONE_BY_ONE` are computed one by one; more of them by :func:`diagnostics.autograd.tape.batched_vjp`.
    """
    known = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not known:
        return [None] * len(inputs)
    outputs, cotangents = [o for o, _ in known], [c for _, c in known]
    with plain_autograd(), twice_differentiable(), named_errors("the network"):
        if len(cotangents[0]) > ONE_BY_ONE:
            return batched_vjp(outputs, inputs, cotangents, verified)
        rows = [
            torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True)
            for seeds in zip(*cotangents, strict=True)
        ]
    found = [None if column[0] is None else _stacked(column) for column in zip(*rows, strict=True)]
    # a sum is finite unless an entry is not, or it overflows itself; only then are entries looked at
    if not all(t.sum().isfinite() or t.isfinite().all() for t in found if t is not None):
        raise DiagnosticsError("a derivative is not finite (a norm or a root at zero?).")
    return found


def _stacked(column: Sequence[Tensor]) -> Tensor:
    return column[0].unsqueeze(0) if len(column) == 1 else torch.stack(list(column))


def _products(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], verified: Verified
) -> list[Tensor]:
    """The same, with zeros where nothing depends on an input."""
    k = len(cotangents[0])
    rows = vector_products(outputs, inputs, cotangents, verified)
    return [t.new_zeros(k, *t.shape) if row is None else row for t, row in zip(inputs, rows, strict=True)]


def _check_one_dtype(graph: Graph) -> None:
    kinds = {node.value.dtype: f"node {node.name!r}" for node in reversed(graph.nodes)}
    kinds.setdefault(graph.loss.dtype, "the loss")
    if len(kinds) > 1:
        listed = ", ".join(f"{what} ({dtype})" for dtype, what in kinds.items())
        raise DiagnosticsError(
            f"nodes and loss are of several dtypes: {listed}. Products and estimates need one: choose nodes of one "
            "(nodes=…), convert the model (.double()), or take the exact blocks (hessian_blocks), which are in the "
            "finest."
        )


def _check_twice_differentiable(graph: Graph, loss_slopes: Sequence[Tensor | None]) -> None:
    """Refuse a graph in which an operation has no second derivative, by node."""
    signals: dict[str, Tensor] = {}

    def accumulate(names: Sequence[str], slopes: Sequence[Tensor | None]) -> None:
        for name, slope in zip(names, slopes, strict=True):
            if slope is not None:
                signals[name] = signals[name] + slope.detach() if name in signals else slope.detach()

    accumulate(graph.loss_parents, loss_slopes)
    for node in reversed(graph.nodes):
        if node.parents and node.name in signals:
            parents = [graph[name].value for name in node.parents]
            accumulate(node.parents, slopes_of(f"node {node.name!r}", node.segment, parents, signals[node.name]))
