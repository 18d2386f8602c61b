"""Local derivatives of each node: Jacobians D, back-propagated signals δ, local curvatures K (docs/recursion.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from einops import rearrange, repeat
from torch import Tensor

from diagnostics.autograd.kernels import plain_autograd, twice_differentiable
from diagnostics.autograd.tape import batched_vjp, checked_symmetric, named_errors, slopes_of
from diagnostics.graph.affine_layer import AffineLayer
from diagnostics.graph.closed_form import ClosedForm
from diagnostics.graph.dense_layer import DenseLayer
from diagnostics.graph.flatness import cannot_bend
from diagnostics.graph.graph import Graph, Node

Curvature: TypeAlias = dict[tuple[str, str], Tensor]
"""``K[p, q]`` of one node for parents ``p`` not before ``q``, ``(S, d_p, d_q)``; absent where structurally zero."""

LOSS = ""
"""Key of the loss among the nodes that have a local curvature: no module has an empty name."""


@dataclass
class LocalDerivatives:
    """What the block recursion needs to know of every node.

    Attributes:
        jacobians: ``jacobians[u][p]`` = D[u,p] = ∂g_u/∂f_p, ``(S, d_u, d_p)``, other parents held fixed.
        signals: ``signals[u]`` = δ_u = ∂L/∂e_u, ``(S, d_u)``; absent for nodes that do not reach the loss.
        curvatures: ``curvatures[u]`` = K_u, Σ_i δ_{u,i} ∂²g_{u,i}/∂f_p∂f_q; under :data:`LOSS` the loss's own ∇²ℓ.
    """

    jacobians: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    signals: dict[str, Tensor] = field(default_factory=dict)
    curvatures: dict[str, Curvature] = field(default_factory=dict)


def local_derivatives(graph: Graph) -> LocalDerivatives:
    """Local Jacobians, signals and curvatures of all nodes of ``graph``, computed once and kept with the graph.

    Whatever grad mode the caller is in.

    Raises:
        StaleGraphError: a parameter changed since the capture.
        DiagnosticsError: a node has no second derivative, named in the message.
    """
    graph.check_fresh()
    return graph.once(_differentiated)


def _differentiated(graph: Graph) -> LocalDerivatives:
    with plain_autograd(), twice_differentiable():
        return differentiate(graph)


def differentiate(graph: Graph) -> LocalDerivatives:
    """Local Jacobians, signals and curvatures of all nodes of ``graph``, by vectorised vector-Jacobian products.

    Costs d_u products for D[u, ·] and d_p products of second order for K_u[p, ·] on the tape of node u alone, each
    for all samples at once; nothing of second order for nodes that cannot bend (:mod:`diagnostics.graph.flatness`), and
    nothing of the kind for nodes with a closed form (:mod:`diagnostics.graph.dense_layer`,
    :mod:`diagnostics.graph.affine_layer`).
    """
    local = LocalDerivatives()
    signals: dict[str, Tensor] = {}
    parents = [graph[name] for name in graph.loss_parents]
    slopes = slopes_of("the loss", graph.loss, [p.value for p in parents], torch.ones_like(graph.loss))
    _accumulate(signals, parents, slopes)
    local.curvatures[LOSS] = _curvature(graph, "the loss", parents, slopes)
    for node in reversed(graph.nodes):
        u = node.name
        parents = [graph[name] for name in node.parents]
        signal = signals.get(u)
        if signal is not None:
            local.signals[u] = signal.reshape(graph.samples, -1)
        where = f"node {u!r}"
        layer = None if graph.coupled else _closed_form(node, parents)
        if layer is not None:
            with named_errors(where):
                _differentiate_layer(graph, local, layer, node, parents[0], signals)
        elif parents:
            local.jacobians[u] = dict(jacobians_of(graph, where, node.segment, parents))
            if signal is not None:
                slopes = slopes_of(where, node.segment, [p.value for p in parents], signal)
                _accumulate(signals, parents, slopes)
                flat = cannot_bend(node, [p.value for p in parents])
                local.curvatures[u] = {} if flat else _curvature(graph, where, parents, slopes)
        else:
            local.jacobians[u] = {}
    return local


def _closed_form(node: Node, parents: Sequence[Node]) -> ClosedForm | None:
    return DenseLayer.recognise(node, parents) or AffineLayer.recognise(node, parents)


def _differentiate_layer(
    graph: Graph,
    local: LocalDerivatives,
    layer: ClosedForm,
    node: Node,
    parent: Node,
    signals: dict[str, Tensor],
) -> None:
    slope = layer.slope(node.segment)
    local.jacobians[node.name] = {parent.name: layer.jacobian(slope, len(node.value)).to(graph.dtype)}
    signal = signals.get(node.name)
    if signal is not None:
        _accumulate(signals, [parent], [layer.back(slope, signal)])
        curvature = layer.curvature(slope, signal)
        found = {} if curvature is None else {(parent.name, parent.name): curvature.to(graph.dtype)}
        local.curvatures[node.name] = found


def _accumulate(signals: dict[str, Tensor], parents: Sequence[Node], slopes: Sequence[Tensor | None]) -> None:
    for parent, slope in zip(parents, slopes, strict=True):
        if slope is not None:
            slope = slope.detach()
            signals[parent.name] = signals[parent.name] + slope if parent.name in signals else slope


def _curvature(graph: Graph, where: str, parents: Sequence[Node], slopes: Sequence[Tensor | None]) -> Curvature:
    """K[p, q] for p not before q: the Jacobian of ∂(δ·g)/∂f_p with respect to f_q."""
    curvature: Curvature = {}
    for i, (parent, slope) in enumerate(zip(parents, slopes, strict=True)):
        if slope is not None and slope.requires_grad:
            for name, block in jacobians_of(graph, where, slope, parents[: i + 1]):
                if name == parent.name:
                    block = checked_symmetric(where, block, [slope])
                curvature[parent.name, name] = block
    return curvature


def jacobians_of(graph: Graph, where: str, output: Tensor, inputs: Sequence[Node]) -> Iterator[tuple[str, Tensor]]:
    """Per-sample Jacobians ``(S, d_out, d_in)`` of ``output``, a tensor of all samples, by the nodes ``inputs``.

    Yields the name and the Jacobian of those that it depends on; ``where`` names the place in errors.
    """
    size = output.numel() // graph.samples
    one_hot = torch.eye(size, dtype=output.dtype, device=output.device)
    # one cotangent seeds the same entry in every sample: samples do not mix, so all are answered at once
    cotangents = repeat(one_hot, "d e -> d s e", s=graph.samples).reshape(size, *output.shape)
    with named_errors(where):
        rows = batched_vjp([output], [node.value for node in inputs], [cotangents])
    for node, row in zip(inputs, rows, strict=True):
        if row is not None:
            yield node.name, rearrange(row.reshape(size, graph.samples, -1), "d s p -> s d p").to(graph.dtype)
