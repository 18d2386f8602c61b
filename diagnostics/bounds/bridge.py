"""From activation blocks to parameter blocks: a bound on the Hessian between the weights of two linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diagnostics.autograd.kernels import plain_autograd
from diagnostics.autograd.tape import batched_vjp
from diagnostics.blocks.containers import HessianBlocks, MeanBlocks
from diagnostics.blocks.factored import TotalJacobians
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.recursion import hessian_blocks
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph
from diagnostics.graph.local import LocalDerivatives, local_derivatives


@dataclass(frozen=True)
class BridgeBound:
    """Bound on ‖∂²L/∂W_v∂W_w‖_F; made by :func:`bridge_bound`.

    Attributes:
        activation: Σ_b ‖x_v‖ ‖x_w‖ ‖H_b[v,w]‖_F.
        cross: Σ_b ‖δ_v‖ ‖x_w‖ ‖∂x_v/∂e_w‖_F, for w before v; 0 where no path leads from one layer to the other.
    """

    activation: float
    cross: float

    @property
    def bound(self) -> float:
        """The bound, the sum of both terms."""
        return self.activation + self.cross


def bridge_bound(
    graph: Graph,
    v: str,
    w: str,
    blocks: HessianBlocks | None = None,
) -> BridgeBound:
    """Bound the Hessian between the weights of two linear layers by the block of their outputs (cf. Cor. 17).

    A layer computes ``a = W x (+ b)``, so ``∂L/∂W_v = Σ_b δ_v x_vᵀ``. Moving W_w by M injects ``M x_w`` at node w; this
    changes δ_v by ``H_b[v,w] M x_w`` and, if v is after w, also x_v by ``∂x_v/∂e_w · M x_w``. So the second derivative
    is a sum over samples of ``H_b[v,w] ⊗ x_v ⊗ x_w`` and ``δ_v ⊗ ∂x_v/∂e_w ⊗ x_w``, and the Frobenius norm of an
    outer product is the product of the norms:

        ‖H[W_v,W_w]‖_F ≤ Σ_b ‖x_v‖ ‖x_w‖ ‖H_b[v,w]‖_F + Σ_b ‖δ_v‖ ‖x_w‖ ‖∂x_v/∂e_w‖_F.

    The first sum alone is a bound only if neither layer is before the other (or v is w). Biases are left out.

    Args:
        graph: A captured network in which both nodes are outputs of ``nn.Linear`` modules called once, on ``(B, d)``.
        v: Name of a node.
        w: Name of a node, possibly the same; the order does not matter.
        blocks: Blocks of single samples of the graph, if known already.

    Raises:
        DiagnosticsError: a node is no such layer, or samples are coupled.
    """
    if graph.coupled:
        raise DiagnosticsError("the bound is a sum over samples, but those of this batch are coupled (batch-norm?).")
    if blocks is not None and isinstance(blocks.gn, MeanBlocks):
        raise DiagnosticsError("the bound needs the blocks of single samples, not batch means.")
    layout = Layout.of(graph)
    if layout.position[graph[v].name] < layout.position[graph[w].name]:
        v, w = w, v
    x_v, x_w = _input(graph, v), _input(graph, w)
    local = local_derivatives(graph)
    block = (hessian_blocks(graph, [(v, w)]) if blocks is None else blocks).total[v, w]
    norm_v, norm_w = x_v.detach().norm(dim=1), x_w.detach().norm(dim=1)
    activation = (norm_v * norm_w * torch.linalg.matrix_norm(block)).sum().item()
    moved = _input_jacobian(graph, layout, v, w, x_v, local) if v != w else None
    if moved is None or v not in local.signals:
        return BridgeBound(activation, 0.0)
    cross = local.signals[v].norm(dim=1) * norm_w * torch.linalg.matrix_norm(moved)
    return BridgeBound(activation, cross.sum().item())


def _input(graph: Graph, name: str) -> Tensor:
    """The input x of a linear layer, ``(B, d)``, on the tape of its node."""
    node = graph[name]
    several = any(other.module is node.module for other in graph.nodes if other is not node)
    if type(node.module) is not nn.Linear or several or len(node.received) != 1 or node.received[0].ndim != 2:
        kind = "the model's output" if node.module is None else type(node.module).__name__
        raise DiagnosticsError(
            f"node {name!r} is not the output of an nn.Linear that is called once on (B, d), but of {kind}"
            f"{' called several times' if several else ''}: capture with nodes that name linear layers themselves."
        )
    received: Tensor = node.received[0]
    return received


def _input_jacobian(graph: Graph, layout: Layout, v: str, w: str, x: Tensor, local: LocalDerivatives) -> Tensor | None:
    """∂x_v/∂e_w, ``(S, d_x, d_w)``: the Jacobians of the layer's input by its parents, times J[parent←w]."""
    parents = [graph[p] for p in graph[v].parents]
    if not parents or not x.requires_grad:
        return None
    rows = TotalJacobians(graph, layout, local.jacobians).rows
    samples, size = x.shape
    seeds = torch.eye(size, dtype=x.dtype, device=x.device)[:, None].expand(-1, samples, -1)
    with plain_autograd():
        products = batched_vjp([x], [p.value for p in parents], [seeds])
    total = None
    for p, entries in zip(parents, products, strict=True):
        if entries is None or layout.position[w] > layout.position[p.name]:
            continue
        own = entries.detach().flatten(2).transpose(0, 1)  # (S, d_x, d_p)
        term = own if p.name == w else own @ rows[p.name][:, :, layout.columns(w)]
        total = term if total is None else total + term
    return total
