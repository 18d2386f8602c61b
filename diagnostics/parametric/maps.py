"""How the parameters of one node enter it: the structure that a parametric Hessian is contracted with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import Tensor

TotalJacobian: TypeAlias = Callable[[str], Tensor | None]
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
