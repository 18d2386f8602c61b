"""What a node whose local derivatives are known in closed form tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from typing_extensions import Self

from diagnostics.graph.graph import Node


class ClosedForm(Protocol):
    """A node f of one parent p with an element-wise σ before or behind a linear map; samples do not mix."""

    @classmethod
    def recognise(cls, node: Node, parents: Sequence[Node]) -> Self | None:
        """The closed form, if the node's tape is exactly that; otherwise None."""

    def slope(self, output: Tensor) -> Tensor | None:
        """σ′ at every entry, ``(B, k)``, on the tape that ends in ``output``, the node; None for the identity."""

    def jacobian(self, slope: Tensor | None, samples: int) -> Tensor:
        """D = ∂f/∂p, ``(B, d_f, d_p)``."""

    def back(self, slope: Tensor | None, signal: Tensor) -> Tensor:
        """Dᵀ δ, like the parent, for δ like the node."""

    def curvature(self, slope: Tensor | None, signal: Tensor) -> Tensor | None:
        """K = Σ_i δ_i ∂²f_i/∂p², ``(B, d_p, d_p)``; None where it is zero."""
