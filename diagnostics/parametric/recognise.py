"""Which map the parameters of a node have: of a plain layer, or of anything."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from diagnostics.autograd.patches import patches_of
from diagnostics.autograd.tape import ancestry
from diagnostics.graph.affine_layer import is_activation, is_plain_layer, is_same
from diagnostics.graph.graph import Graph, Node
from diagnostics.graph.local import jacobians_of
from diagnostics.parametric.dense_map import dense_map
from diagnostics.parametric.maps import ParameterMap
from diagnostics.parametric.patch_map import PatchMap


def parameter_map(graph: Graph, node: Node, signal: Tensor | None) -> ParameterMap:
    """The map of a node's trainable parameters.

    Args:
        graph: The graph that the node belongs to.
        node: A node with parameters.
        signal: δ of the node, ``(S, d)``; None if the node does not reach the loss.
    """
    return _patch_map(graph, node, signal) or dense_map(
        graph, f"node {node.name!r}", node.segment, node.parameters, node.parents, signal
    )


def _patch_map(graph: Graph, node: Node, signal: Tensor | None) -> PatchMap | None:
    """The map, if the node is a plain linear or 2-D convolutional layer of some function of its parents."""
    module = node.module
    if not is_plain_layer(module):
        return None
    if isinstance(module, nn.Conv2d) and (module.groups > 1):
        return None
    owned = {id(p): kind for kind, p in module.named_parameters(recurse=False)}
    kinds = {owned.get(id(graph.parameters[name])): name for name in node.parameters}
    x = node.received[0] if node.received else None
    if None in kinds or not isinstance(x, Tensor) or not graph.is_batched(node) or x.shape[:1] != node.shape[:1]:
        return None
    receives = _receives(graph, node, x) if "weight" in kinds else {}  # nothing bends a bias
    if receives is None or x.numel() == 0:
        return None
    joint = graph.batch_size // graph.samples
    if isinstance(module, nn.Conv2d):
        index = _patch_index(module, x.shape[1:]).to(x.device)
        entries, channels, unfold = "(b i l)", module.out_channels, partial(_conv_unfold, index, joint)
        positions = _conv_unfold(index, 1, x.detach().reshape(len(x), -1, 1)).squeeze(3)
    else:
        entries, channels, unfold = "(b l i)", node.shape[-1], partial(_linear_unfold, x.shape[-1])
        positions = x.detach().reshape(len(x), -1, x.shape[-1])
    if "weight" not in kinds:
        positions = positions[:, :, :0]
    if "bias" in kinds:
        positions = nn.functional.pad(positions, (0, 1), value=1.0)
    if signal is not None:
        signal = rearrange(signal, f"s {entries} -> s (b l) i", b=joint, i=channels).to(graph.dtype)
    return PatchMap(
        patches=rearrange(positions, "(s b) l j -> s (b l) j", b=joint).to(graph.dtype),
        signal=signal,
        receives=receives,
        unfold=unfold,
        entries=entries,
        joint=joint,
        channels=channels,
        weight=kinds.get("weight"),
        bias=kinds.get("bias"),
    )


def _receives(graph: Graph, node: Node, x: Tensor) -> dict[str, Tensor | None] | None:
    """Jacobians of the layer's input with respect to the node's parents; None if it depends on parameters itself."""
    leaves, _ = ancestry(x)
    if any(leaf is parameter for leaf in leaves for parameter in graph.parameters.values()):
        return None
    parents = [graph[name] for name in node.parents]
    if len(parents) == 1 and x.shape[:1] == parents[0].shape[:1]:
        (parent,) = parents
        if is_same(x, parent.value):
            return {parent.name: None}
        if is_activation(x, parent.value):
            (slope,) = torch.autograd.grad(x, [parent.value], torch.ones_like(x), retain_graph=True)
            return {parent.name: slope.reshape(graph.samples, -1).to(graph.dtype)}
    return dict(jacobians_of(graph, f"the input of node {node.name!r}", x, parents)) if parents else {}


def _linear_unfold(features: int, moves: Tensor) -> Tensor:
    return rearrange(moves, "s (l j) k -> s l j k", j=features)


def _conv_unfold(index: Tensor, joint: int, moves: Tensor) -> Tensor:
    entries = moves.shape[1] // joint
    offsets = entries * torch.arange(joint, device=index.device).view(-1, 1, 1)
    rows = torch.where(index > 0, index + offsets, 0)  # (b, l, j)
    patches = nn.functional.pad(moves, (0, 0, 1, 0)).index_select(1, rows.flatten())
    return rearrange(patches, "s (l j) k -> s l j k", j=index.shape[1])


def _patch_index(module: nn.Conv2d, shape: torch.Size) -> Tensor:
    """The input entry, counted from 1, that every patch has at every place, ``(L, m')``; 0 where it is padding."""
    image = torch.arange(1, shape.numel() + 1, dtype=torch.float64).view(1, *shape)
    return patches_of(module, image, one=False)[0, 0].long()
