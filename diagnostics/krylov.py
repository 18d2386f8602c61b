"""The Krylov space of a symmetric matrix: a basis that grows by one product a step, and restarts when it is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from diagnostics.probes import Products
from diagnostics.symmetric_eigen import eigh

Reorthogonalise: TypeAlias = Literal["full", "selective"]
Completeness: TypeAlias = Literal["complete", "continue", "fresh"]

_FIRST_ROWS = 32
_EXHAUSTED = 100
"""A coupling β of so many eps · ‖A‖ may be rounding: then the next vector, made of it, is as good as random."""


@dataclass(frozen=True)
class Ritz:
    """Eigenpairs of the projected matrix T, in float64 on the CPU.

    Attributes:
        values: Ascending, ``(j,)``.
        coefficients: Eigenvectors of T as columns, ``(j, j)``.
        residuals: ``‖A x − θ x‖`` of the Ritz vectors x, ``(j,)``.
    """

    values: Tensor
    coefficients: Tensor
    residuals: Tensor


class Krylov:
    """``A Vᵀ = Vᵀ T + v_{j+1} cᵀ``, with basis vectors in the rows of V, ``(j, n)``.

    c = β e_j, and T tridiagonal; after a restart T has an arrow of earlier Ritz values and their couplings in front.

    Attributes:
        capacity: The largest number of basis vectors.
        size: Their number j.
        neglected: Size of the couplings that were dropped; residuals may be larger by as much.
    """

    def __init__(
        self,
        products: Products,
        *,
        wanted: int,
        steps: int,
        reorthogonalise: Reorthogonalise,
        memory_limit: int,
        generator: torch.Generator,
        start: Tensor | None,
    ) -> None:
        op = products.op
        n = op.shape[0]
        vector_bytes = n * torch.empty((), dtype=op.dtype).element_size()
        least = min(n, steps, wanted + 4)
        needed = min(n, steps) if reorthogonalise == "selective" else least
        self.capacity = min(n, steps, memory_limit // vector_bytes - 1)  # the next vector is held besides
        if self.capacity < needed:
            way_out = 'reorthogonalise="full", which restarts, or ' if reorthogonalise == "selective" else ""
            raise MemoryBudgetError(
                f"a basis of {needed} vectors takes {(needed + 1) * vector_bytes / 2**30:.2g} GiB, more than the limit "
                f"of {memory_limit / 2**30:.2g} GiB: use {way_out}a larger memory_limit, or ask for fewer pairs."
            )
        self._products, self._generator = products, generator
        self._selective = reorthogonalise == "selective"
        self._eps = torch.finfo(op.dtype).eps
        self._basis = torch.empty(min(_FIRST_ROWS, self.capacity), n, dtype=op.dtype, device=op.device)
        self._locked = self._basis[:0]  # converged Ritz vectors, of selective reorthogonalisation
        self._projected = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        self._live = torch.zeros(
            self.capacity, dtype=torch.bool
        )  # of the space that grows, not of one exhausted before
        self._scale = 0.0  # a lower bound on the spectral norm
        self._spaces, self._exhausted = 1, False
        self.neglected = 0.0
        self.size = 0
        self._next: Tensor = self._random() if start is None else start
        self._coupling = torch.zeros(0, dtype=torch.float64)  # c, of the vectors that are there

    @property
    def full(self) -> bool:
        """Whether a restart is needed before the next step."""
        return self.size == self.capacity

    def step(self) -> None:
        """Add the next vector to the basis, multiply it, and find the one after it."""
        j = self.size
        if j == len(self._basis):
            grown = self._basis.new_empty(min(2 * j, self.capacity), self._basis.shape[1])
            grown[:j] = self._basis
            self._basis = grown
        vector = self._next
        if self._exhausted:
            self._live[:j] = False
            self._spaces += 1
        self._basis[j] = vector
        self._projected[j, :j] = self._projected[:j, j] = self._coupling
        self._live[j] = True
        self.size = j + 1
        image = self._products.forward(vector)
        diagonal = torch.dot(vector, image).item()
        self._projected[j, j] = diagonal
        length = torch.linalg.vector_norm(image).item()
        self._scale = max(self._scale, length)
        image = self._orthogonalise(image)
        beta = torch.linalg.vector_norm(image).item()
        self._coupling = torch.zeros(self.size, dtype=torch.float64)
        self._exhausted = beta <= _EXHAUSTED * self._eps * self._scale
        if beta > self.size * self._eps * self._scale:
            self._coupling[j] = beta
            self._next = image / beta
        elif self.size < len(image):
            self.neglected += beta
            self._next = self._random()
        if self._selective and self._lock():
            self._next = _project_out(self._locked, self._next)
            self._next /= torch.linalg.vector_norm(self._next)

    def ritz(self) -> Ritz:
        """Eigenpairs of T."""
        values, coefficients = eigh(self._projected[: self.size, : self.size])
        return Ritz(values, coefficients, (self._coupling @ coefficients).abs())

    def vectors(self, ritz: Ritz, chosen: Tensor) -> Tensor:
        """Unit Ritz vectors as columns, ``(n, k)``."""
        coefficients = ritz.coefficients[:, chosen].to(self._basis)
        vectors = self._basis[: self.size].mT @ coefficients
        unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=0)
        return unit

    def check(
        self,
        ritz: Ritz,
        limits: tuple[float, float],
        outermost: Callable[[Tensor], Tensor],
        tolerance: float,
        verify: bool,
    ) -> Completeness:
        """Whether an eigenvalue outside of ``limits`` may have been missed, and what to do about it.

        An exhausted space holds one copy of each eigenvalue that its start contains. The random start of the next space
        contains all that are left, so its own outermost Ritz pairs must have converged, and between the limits. The
        first space is believed where it goes on, unless ``verify`` asks for another.

        Args:
            ritz: Eigenpairs of T, of which the wanted ones have converged.
            limits: The values between which nothing is wanted.
            outermost: Of ascending values, the indices of the first that would be wanted.
            tolerance: Residual of a converged pair.
            verify: See above.
        """
        if self._spaces == 1 and not self._exhausted:
            return "fresh" if verify else "complete"
        if self._spaces == 1:
            return "continue"
        weight = ritz.coefficients[self._live[: self.size]].square().sum(0)
        candidates = (weight > 0.1).nonzero().squeeze(1)
        candidates = candidates[outermost(ritz.values[candidates])]
        if not len(candidates) or ritz.residuals[candidates].amax().item() > tolerance:
            return "continue"
        rounding = self._eps * self._scale * self.size
        values = ritz.values[candidates]
        if limits[0] - rounding <= values.amin().item() and values.amax().item() <= limits[1] + rounding:
            return "complete"
        return "continue" if self._exhausted else "fresh"

    def restart(self, ritz: Ritz, kept: Tensor) -> None:
        """Replace the basis by Ritz vectors; the next vector couples to each by its signed residual."""
        coefficients = ritz.coefficients[:, kept]
        number = len(kept)
        self._coupling = self._coupling @ coefficients
        # in slices of columns, so that it needs no second basis
        rotation = coefficients.mT.to(self._basis)
        for columns in self._basis[: self.size].split(2**20, dim=1):
            columns[:number] = rotation @ columns
        self._projected.zero_()
        self._projected[:number, :number] = torch.diag(ritz.values[kept])
        live = self._live[: self.size]
        self._live[:number] = coefficients[live].square().sum(0) > 0.5
        self._live[number:] = False
        self.size = number

    def begin_again(self, ritz: Ritz, kept: Tensor) -> None:
        """Keep converged Ritz vectors only, and begin a new space at a random vector orthogonal to them."""
        self.restart(ritz, kept)
        self.neglected += self._coupling.norm().item()
        self._coupling = torch.zeros_like(self._coupling)
        self._exhausted = True
        self._next = self._random()
        if self._selective:
            self._locked = self._basis[: self.size].clone()

    def _orthogonalise(self, image: Tensor) -> Tensor:
        j = self.size
        if not self._selective:
            return _project_out(self._basis[:j], image)
        image = image - self._basis[j - 1] * self._projected[j - 1, j - 1].item()
        if j > 1:
            image = image - self._basis[j - 2] * self._projected[j - 1, j - 2].item()
        image = image - self._basis[j - 1] * torch.dot(self._basis[j - 1], image)
        return _project_out(self._locked, image)

    def _lock(self) -> bool:
        """Whether more Ritz vectors have converged to √eps; they are then computed anew, all of them."""
        ritz = self.ritz()
        good = (ritz.residuals <= self._eps**0.5 * self._scale).nonzero().squeeze(1)
        if len(good) <= len(self._locked):
            return False
        self._locked = self.vectors(ritz, good).mT.contiguous()
        return True

    def _random(self) -> Tensor:
        """A random unit vector orthogonal to the basis."""
        vector = self._products.draw(1, "gaussian", self._generator).squeeze(1)
        vector = _project_out(self._basis[: self.size], vector)
        unit: Tensor = vector / torch.linalg.vector_norm(vector)
        return unit


def _project_out(rows: Tensor, vector: Tensor) -> Tensor:
    """The part of a vector that is orthogonal to orthonormal rows; twice is enough (Parlett 1998, §6.9)."""
    for _ in range(2):
        vector = vector - rows.mT @ (rows @ vector)
    return vector
