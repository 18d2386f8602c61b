"""Hessian-vector products by routing curvature through the graph, node by node: they come apart by their causes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.autograd.kernels import plain_autograd, twice_differentiable
from diagnostics.autograd.second_order import refuse_sparse
from diagnostics.autograd.tape import named_errors, slopes_of
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph
from diagnostics.matrix_free.node_products import ONE_BY_ONE, vector_products

Directions = Mapping[str, Tensor]
"""By name of a node or a parameter: ``(k, *shape)``."""


@dataclass(frozen=True, eq=False)
class RoutedCurvature:
    """``H t`` at every node and parameter, in parts; made by :func:`route`.

    Attributes:
        gn: Gauss-Newton part by name of a node or a parameter, ``(k, *shape)``: the share of the loss's curvature.
        tensor: Tensor part by the same names: the sum of the shares of all nodes.
        tensor_by_source: ``tensor_by_source[u]``: the share of node u's nonlinearity, by the same names, those that it
            reaches; None unless asked for.
    """

    gn: dict[str, Tensor]
    tensor: dict[str, Tensor]
    tensor_by_source: dict[str, dict[str, Tensor]] | None

    @property
    def total(self) -> dict[str, Tensor]:
        """``H t = gn + tensor``."""
        return {name: gn + self.tensor[name] for name, gn in self.gn.items()}


def route(graph: Graph, tangents: Directions, by_source: bool = False) -> RoutedCurvature:
    """The Hessian times tangents at nodes and parameters, for all nodes and parameters, with every node's share.

    Two sweeps over the cut tape. Forwards, tangents move along local Jacobians, ``ṫ_u = t_u + Σ_p D[u,p] ṫ_p``.
    Backwards, curvature signals start at every node that bends and return along the transposed Jacobians,

        h_p = Σ_u ( D[u,p]ᵀ h_u + Σ_q K_u[p,q] ṫ_q ),        h_z = ∇²ℓ ṫ_z,

    with q over the parents of u, its parameters among them. Then h_v is ``Σ_w H[v,w] t_w``. The equation is linear in
    the curvatures, so what starts at the loss is the Gauss-Newton part, and what starts at node u is u's share of the
    tensor part. With tangents at parameters alone, the parameters' entries are the Hessian-vector product of training,
    ``H t``; so every such product comes apart by the nodes that cause it. Both sweeps hold one node at a time.

    Args:
        graph: A captured network.
        tangents: ``{name: (k, *shape)}`` for nodes and parameters, k at once; those not named do not move. Every sample
            has its own tangent at a node; a parameter is shared.
        by_source: Also return the shares of single nodes; as many signals are carried back as nodes lie behind.

    Returns:
        :class:`RoutedCurvature` over all nodes and all parameters that require grad, of exactly the loss that was
        given: zeros where nothing arrives.

    Raises:
        KeyError: a name is neither that of a node nor of a parameter that requires grad.
        DiagnosticsError: tangents are empty or have wrong shapes; a node has no second derivative.
        StaleGraphError: a parameter changed since the capture.

    Source: Def. 20, Eq. I.1 and Cor. 21 of arXiv 2604.11639, for any pair of parents.
    """
    graph.check_fresh()
    k = _check(graph, tangents)
    return graph.once(CurvatureRouting).run(tangents, k, by_source)


@dataclass(frozen=True, eq=False)
class _Bend:
    """One node's piece of tape, and the slopes of ``δ · output`` on a tape of their own.

    Attributes:
        output: What the piece computes.
        inputs: Its parents and parameters by name, those with slopes that bend or not.
        signal: δ, a leaf.
        slopes: Slopes by name of the input.
    """

    output: Tensor
    inputs: dict[str, Tensor]
    signal: Tensor
    slopes: dict[str, Tensor]


class CurvatureRouting:
    """What the sweeps need of a graph, recorded once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._trained = {name: p for name, p in graph.parameters.items() if p.requires_grad}
        self._bends: dict[str, _Bend] = {}
        signals: dict[str, Tensor] = {}
        unit = torch.ones_like(graph.loss)
        self._loss = self._bend("the loss", graph.loss, (*graph.loss_parents, *graph.loss_parameters), unit, signals)
        for node in reversed(graph.nodes):
            inputs = (*node.parents, *node.parameters)
            if inputs and node.name in signals:
                where = f"node {node.name!r}"
                self._bends[node.name] = self._bend(where, node.segment, inputs, signals.pop(node.name), signals)

    def _bend(
        self, where: str, output: Tensor, names: Sequence[str], signal: Tensor, signals: dict[str, Tensor]
    ) -> _Bend:
        inputs = {name: self._value(name) for name in names}
        with plain_autograd(), twice_differentiable(), named_errors(where):
            checked = slopes_of(where, output, list(inputs.values()), signal)
            signal = signal.detach().clone().requires_grad_()
            found = torch.autograd.grad(output, list(inputs.values()), signal, create_graph=True, allow_unused=True)
        refuse_sparse(found, names)
        slopes = {}
        for name, slope, check in zip(names, found, checked, strict=True):
            if slope is not None and check is not None:
                slopes[name] = slope
                if name in self.graph:
                    detached = slope.detach()
                    signals[name] = signals[name] + detached if name in signals else detached
        return _Bend(output, inputs, signal, slopes)

    def run(self, tangents: Directions, k: int, by_source: bool) -> RoutedCurvature:
        """See :func:`route`."""
        moved = {name: tangent.detach() for name, tangent in tangents.items()}
        bent: dict[str, dict[str, Tensor]] = {}
        for node in self.graph.nodes:
            bend = self._bends.get(node.name)
            if bend is not None:
                tangent, bent[node.name] = self._forward(bend, moved)
                if tangent is not None:
                    moved[node.name] = moved[node.name] + tangent if node.name in moved else tangent
        _, from_loss = self._forward(self._loss, moved)

        # h[name][source]: the loss is the source "", and all nodes together are one source unless they are asked for
        h: dict[str, dict[str, Tensor]] = defaultdict(dict)
        _add(h, from_loss, "")
        for node in reversed(self.graph.nodes):
            bend = self._bends.get(node.name)
            if bend is None:
                continue
            if h[node.name]:
                self._backward(bend, h[node.name], h)
            _add(h, bent[node.name], node.name if by_source else _TENSOR)
        return self._collect(h, k, by_source)

    def _forward(self, bend: _Bend, moved: Mapping[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """``Σ D[u,q] ṫ_q`` and ``Σ_q K_u[p,q] ṫ_q`` by input p: both are derivatives of the slopes along ṫ."""
        known = [name for name in bend.slopes if name in moved]
        if not known:
            return None, {}
        inputs = list(bend.inputs.values())
        found = vector_products(
            [bend.slopes[name] for name in known], [bend.signal, *inputs], [moved[name] for name in known]
        )
        bent = zip(bend.inputs, found[1:], strict=True)
        return found[0], {name: value for name, value in bent if value is not None}

    def _backward(self, bend: _Bend, arrived: Mapping[str, Tensor], h: dict[str, dict[str, Tensor]]) -> None:
        names = list(bend.slopes)
        if not names:
            return
        inputs = [bend.inputs[name] for name in names]
        sizes = [len(signal) for signal in arrived.values()]
        if sum(sizes) <= ONE_BY_ONE:  # nothing to be gained from putting them together
            pieces = [vector_products([bend.output], inputs, [signal]) for signal in arrived.values()]
        else:
            together = vector_products([bend.output], inputs, [torch.cat(list(arrived.values()))])
            split = [None if rows is None else rows.split(sizes) for rows in together]
            pieces = [[None if rows is None else rows[i] for rows in split] for i in range(len(sizes))]
        for source, piece in zip(arrived, pieces, strict=True):
            _add(h, {name: share for name, share in zip(names, piece, strict=True) if share is not None}, source)

    def _collect(self, h: Mapping[str, Mapping[str, Tensor]], k: int, by_source: bool) -> RoutedCurvature:
        gn, tensor = {}, {}
        shares: dict[str, dict[str, Tensor]] = {name: {} for name in self._bends}
        for name in (*(node.name for node in self.graph.nodes), *self._trained):
            arrived = h.get(name, {})
            zero = torch.zeros((), dtype=self.graph.loss.dtype, device=self.graph.loss.device)
            shape = (k, *self._value(name).shape)
            gn[name] = arrived.get("", zero.expand(shape))
            of_nodes = {source: share for source, share in arrived.items() if source != ""}
            tensor[name] = sum(of_nodes.values(), zero) if of_nodes else zero.expand(shape)
            if by_source:
                for source, share in of_nodes.items():
                    shares[source][name] = share
        return RoutedCurvature(gn, tensor, shares if by_source else None)

    def _value(self, name: str) -> Tensor:
        return self.graph[name].value if name in self.graph else self.graph.parameters[name]


_TENSOR = "tensor part"


def _add(h: dict[str, dict[str, Tensor]], values: Mapping[str, Tensor], source: str) -> None:
    for name, value in values.items():
        known = h[name].get(source)
        h[name][source] = value if known is None else known + value


def _check(graph: Graph, tangents: Directions) -> int:
    """The number of tangents."""
    if not tangents:
        raise DiagnosticsError("no tangents were given: pass {name of a node or parameter: tensor (k, *shape)}.")
    counts = set()
    for name, tangent in tangents.items():
        if name in graph:
            shape = graph[name].shape
        elif name in graph.parameters and graph.parameters[name].requires_grad:
            shape = graph.parameters[name].shape
        else:
            trained = [n for n, p in graph.parameters.items() if p.requires_grad]
            raise KeyError(
                f"{name!r} is neither a node nor a parameter that requires grad; the nodes are "
                f"{', '.join(map(repr, (n.name for n in graph)))}, the parameters {', '.join(map(repr, trained))}"
            )
        if tangent.ndim == 0 or tangent.shape[1:] != shape or tangent.dtype != graph.loss.dtype:
            raise DiagnosticsError(
                f"the tangents at {name!r} have shape {tuple(tangent.shape)} and dtype {tangent.dtype}; need "
                f"{('k', *shape)} and {graph.loss.dtype}. For a single one, pass tangent.unsqueeze(0)."
            )
        counts.add(len(tangent))
    if len(counts) > 1 or 0 in counts:
        raise DiagnosticsError(f"all tangents need the same number k > 0 of directions, got {sorted(counts)}.")
    return counts.pop()
