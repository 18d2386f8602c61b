"""Linear and convolutional layers as functions of their parameters: patches times weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from diagnostics.parametric.maps import ParameterMap, TotalJacobian


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
