"""How the parameters of one node enter it: the structure that a parametric Hessian is contracted with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from diagnostics.autograd.tape import ancestry, batched_vjp, checked_symmetric, named_errors, slopes_of
from diagnostics.graph.affine_layer import is_activation, is_plain_layer, is_same
from diagnostics.graph.graph import Graph, Node
from diagnostics.graph.local import jacobians_of

TotalJacobian = Callable[[str], Tensor | None]
"""J[q←w] of a node q for one fixed w, ``(S, d_q, d_w)``; None where it is zero."""


class ParameterMap(ABC):
    """One node u as a function of its P trainable parameters θ, side by side.

    With D[u,θ] the per-sample Jacobian and K_u[θ,·] the local curvature, blocks of the parametric Hessian are sums over
    samples such as ``Σ_b D_b[u,θ]ᵀ H_b[u,w] D_b[w,θ']``. Subclasses know the structure of D and need not form it.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """P."""

    @abstractmethod
    def samples(self, part: slice) -> ParameterMap:
        """The map of some of the samples; its own curvature is not split."""

    @abstractmethod
    def push(self, block: Tensor) -> Tensor:
        """``D[u,θ]ᵀ M`` for M ``(S, d_u, k)``: ``(S, P, k)``."""

    @abstractmethod
    def bend(self, jacobian: TotalJacobian) -> Tensor | None:
        """``Σ_q K_u[θ,q] J[q←w]``, ``(S, P, d_w)``; None where it is zero."""

    @abstractmethod
    def contract(self, left: Tensor) -> Tensor:
        """``Σ_b M_b D_b[u,θ]`` for M ``(S, r, d_u)``: ``(r, P)``."""

    @abstractmethod
    def own_curvature(self) -> Tensor | None:
        """``K_u[θ,θ]``, summed over samples, ``(P, P)``; None where it is zero."""

    @abstractmethod
    def split(self, values: Tensor, dim: int) -> Iterator[tuple[str, Tensor]]:
        """The parts of dimension ``dim``, of length P, by parameter; each flat in that dimension."""


@dataclass(frozen=True)
class PatchMap(ParameterMap):
    """A linear or convolutional layer: ``f[l, i] = Σ_j W[i, j] X[l, j] + b[i]`` at positions l.

    A linear layer on ``(B, d)`` has one position and X is its input; a convolution has patches as rows of X. The bias
    is the weight of a constant input, the last column of X.

    Attributes:
        patches: X, ``(S, L, m)``, the constant included if there is a trained bias.
        signal: δ_u, ``(S, L, C)``; None if the node does not reach the loss.
        receives: ∂x/∂f_q of the layer's input x with respect to each parent, ``(S, d_x, d_q)``, or its diagonal,
            ``(S, d_x)``; None for the identity.
        unfold: Patches of perturbations of x, ``(S, d_x, k) -> (S, L, m', k)``, without the constant.
        entries: The node's entries in one sample, as an einops axis: ``"(b l i)"`` or ``"(b i l)"``.
        joint: Samples inside one joint sample: 1 unless they are coupled.
        channels: C.
        weight: Name of the weight, if it is trained.
        bias: Name of the bias, if it is trained.
    """

    patches: Tensor
    signal: Tensor | None
    receives: Mapping[str, Tensor | None]
    unfold: Callable[[Tensor], Tensor]
    entries: str
    joint: int
    channels: int
    weight: str | None
    bias: str | None

    @property
    def size(self) -> int:
        """P."""
        return self.channels * self.patches.shape[2]

    def samples(self, part: slice) -> PatchMap:
        """The map of some of the samples."""
        return replace(
            self,
            patches=self.patches[part],
            signal=None if self.signal is None else self.signal[part],
            receives={q: None if receives is None else receives[part] for q, receives in self.receives.items()},
        )

    def push(self, block: Tensor) -> Tensor:
        """``D[u,θ]ᵀ M``."""
        return self._outer(self.patches, "j", self._by_position(block), "i k")

    def moved(self, jacobian: TotalJacobian) -> Tensor | None:
        """J[x←w] of the layer's input x, ``(S, d_x, d_w)``; None where it is zero."""
        moves = [
            move if receives is None else receives @ move if receives.ndim == 3 else receives.unsqueeze(2) * move
            for q, receives in self.receives.items()
            if (move := jacobian(q)) is not None
        ]
        return None if not moves else moves[0] if len(moves) == 1 else torch.stack(moves).sum(0)

    def bend(self, jacobian: TotalJacobian) -> Tensor | None:
        """``Σ_q K_u[θ,q] J[q←w]``."""
        moved = None if self.signal is None or self.weight is None else self.moved(jacobian)
        if self.signal is None or moved is None:
            return None
        patches = self.unfold(moved)
        if self.bias is not None:
            patches = nn.functional.pad(patches, (0, 0, 0, 1))  # the constant input does not move
        return self._outer(self.signal, "i", patches, "j k")

    def contract(self, left: Tensor) -> Tensor:
        """``Σ_b M_b D_b[u,θ]``."""
        rows = rearrange(self._by_position(left.mT), "s l i r -> (r i) (s l)")
        product = rows @ rearrange(self.patches, "s l j -> (s l) j")
        return rearrange(product, "(r i) j -> r (i j)", i=self.channels)

    def own_curvature(self) -> Tensor | None:
        """``K_u[θ,θ]``."""
        return None  # linear in its parameters

    def split(self, values: Tensor, dim: int) -> Iterator[tuple[str, Tensor]]:
        """The parts of dimension ``dim`` by parameter."""
        inputs = self.patches.shape[2] - (self.bias is not None)
        grid = values.unflatten(dim, (self.channels, -1))
        if self.weight is not None:
            yield self.weight, grid.narrow(dim + 1, 0, inputs).flatten(dim, dim + 1)
        if self.bias is not None:
            yield self.bias, grid.select(dim + 1, inputs)

    def _by_position(self, block: Tensor) -> Tensor:
        sizes = {"b": self.joint, "i": self.channels}
        return rearrange(block, f"s {self.entries} k -> s (b l) i k", **sizes)

    @staticmethod
    def _outer(left: Tensor, left_axis: str, right: Tensor, right_axes: str) -> Tensor:
        """``Σ_l left[s, l, ·] right[s, l, ·, k]`` as ``(S, C·m, k)``."""
        if left.shape[1] == 1:  # one position: a product of two small tensors that einsum would copy first
            left, right = left[:, 0], right[:, 0]
            if left_axis == "i":
                product = left[:, :, None, None] * right[:, None]
            else:
                product = left[:, None, :, None] * right[:, :, None]
        else:
            product = einsum(left, right, f"s l {left_axis}, s l {right_axes} -> s i j k")
        return rearrange(product, "s i j k -> s (i j) k")


@dataclass(frozen=True)
class DenseMap(ParameterMap):
    """Any other node: its Jacobian and curvature with respect to the parameters, entry by entry.

    Attributes:
        sizes: Entries of each parameter, by name.
        jacobian: D[u,θ], ``(S, d_u, P)``.
        bends: K_u[θ,q] for each parent q, ``(S, P, d_q)``; absent where zero.
        curvature: K_u[θ,θ], ``(P, P)``.
    """

    sizes: Mapping[str, int]
    jacobian: Tensor
    bends: Mapping[str, Tensor]
    curvature: Tensor | None

    @property
    def size(self) -> int:
        """P."""
        return self.jacobian.shape[2]

    def samples(self, part: slice) -> DenseMap:
        """The map of some of the samples."""
        return replace(self, jacobian=self.jacobian[part], bends={q: bend[part] for q, bend in self.bends.items()})

    def push(self, block: Tensor) -> Tensor:
        """``D[u,θ]ᵀ M``."""
        return self.jacobian.mT @ block

    def bend(self, jacobian: TotalJacobian) -> Tensor | None:
        """``Σ_q K_u[θ,q] J[q←w]``."""
        terms = [bend @ move for q, bend in self.bends.items() if (move := jacobian(q)) is not None]
        return torch.stack(terms).sum(0) if terms else None

    def contract(self, left: Tensor) -> Tensor:
        """``Σ_b M_b D_b[u,θ]``."""
        return rearrange(left, "s r d -> r (s d)") @ rearrange(self.jacobian, "s d p -> (s d) p")

    def own_curvature(self) -> Tensor | None:
        """``K_u[θ,θ]``."""
        return self.curvature

    def split(self, values: Tensor, dim: int) -> Iterator[tuple[str, Tensor]]:
        """The parts of dimension ``dim`` by parameter."""
        return zip(self.sizes, values.split(list(self.sizes.values()), dim), strict=True)


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


def dense_map(
    graph: Graph,
    where: str,
    output: Tensor,
    parameters: Sequence[str],
    parents: Sequence[str],
    signal: Tensor | None,
) -> DenseMap:
    """The map of ``output`` (a node's tape, or the loss's) with respect to any parameters, by autograd.

    Costs one vector-Jacobian product for each entry of ``output`` and each entry of the parameters.
    """
    leaves = [graph.parameters[name] for name in parameters]
    sizes = {name: leaf.numel() for name, leaf in zip(parameters, leaves, strict=True)}
    with named_errors(where):
        rows = _rows(output, leaves)
    samples = graph.samples if output.numel() > 1 else 1
    jacobian = rearrange(torch.cat(rows, 1), "(s d) p -> s d p", s=samples).to(graph.dtype)
    if signal is None:
        return DenseMap(sizes, jacobian, {}, None)
    values = [graph[name].value for name in parents]
    slopes = slopes_of(where, output, leaves, signal.view_as(output))
    with named_errors(where):
        second = [
            _rows(slope, [*values, *leaves])
            if slope is not None and slope.requires_grad
            else [leaf.new_zeros(leaf.numel(), t.numel()) for t in (*values, *leaves)]
            for slope, leaf in zip(slopes, leaves, strict=True)
        ]
    stacked = [torch.cat(blocks).to(graph.dtype) for blocks in zip(*second, strict=True)]
    bends = {
        name: rearrange(block, "p (s q) -> s p q", s=graph.samples)
        for name, block in zip(parents, stacked[: len(parents)], strict=True)
        if block.any()
    }
    curvature = torch.cat(stacked[len(parents) :], 1)
    curvature = checked_symmetric(where, curvature, [slope for slope in slopes if slope is not None])
    return DenseMap(sizes, jacobian, bends, curvature if curvature.any() else None)


def _rows(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Jacobians ``(output entries, input entries)``, zeros where ``output`` does not depend on an input."""
    entries = output.numel()
    one_hot = torch.eye(entries, dtype=output.dtype, device=output.device).view(entries, *output.shape)
    products = batched_vjp([output], inputs, [one_hot])
    return [
        output.new_zeros(entries, t.numel()) if product is None else product.reshape(entries, t.numel())
        for t, product in zip(inputs, products, strict=True)
    ]


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
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    image = nn.functional.pad(image, module._reversed_padding_repeated_twice, mode)
    patches = nn.functional.unfold(image, module.kernel_size, module.dilation, stride=module.stride)
    return rearrange(patches, "1 j l -> l j").long()
