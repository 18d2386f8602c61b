"""Any function of parameters by its derivatives entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from diagnostics.autograd.tape import batched_vjp, checked_symmetric, named_errors, slopes_of
from diagnostics.graph.graph import Graph
from diagnostics.parametric.maps import ParameterMap, TotalJacobian


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
