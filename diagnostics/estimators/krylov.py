"""The Krylov space of a symmetric matrix: a basis that grows by one product a step, and restarts when it is full."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from diagnostics.estimators.probes import Products
from diagnostics.estimators.symmetric_eigen import eigh

Reorthogonalise: TypeAlias = Literal["full", "selective"]
Completeness: TypeAlias = Literal["complete", "continue", "fresh"]
Limits: TypeAlias = tuple[float, float]

_FIRST_ROWS = 32
_EXHAUSTED = 100
"""A coupling β of so many eps · ‖A‖ may be rounding: then the next vector, made of it, is as good as random."""
_SPACES = 4
"""Spaces in a row, exhausted without anything farther out, after which an eigenvalue of rounding size is let go."""
CHANCE = 0.01
"""Chance that a random start has less of an eigenvector than is assumed of it."""
_MISSED = 0.1
"""Share of an eigenvalue by which nothing may lie beyond it in the first space."""


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

    Args:
        start: The first vector, of length 1; None: random.
        noise: The share of it that is random.

    Attributes:
        capacity: The largest number of basis vectors.
        size: Their number j.
        exhausted: Whether the last product lies in their span, but for rounding: the next vector is a random one.
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
        noise: float = 1.0,
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
        # it grows by copies, for which there must be room; otherwise it is allocated as a whole
        rows = self.capacity if 2 * self.capacity * vector_bytes > memory_limit else min(_FIRST_ROWS, self.capacity)
        self._basis = torch.empty(rows, n, dtype=op.dtype, device=op.device)
        self._locked = self._basis[:0]  # converged Ritz vectors, of selective reorthogonalisation
        self._projected = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        # of the space that grows, not of one exhausted before
        self._live = torch.zeros(self.capacity, dtype=torch.bool)
        self._scale = 0.0  # a lower bound on the spectral norm
        self._spaces, self.exhausted, self._barren = 1, False, 0
        self.neglected = 0.0
        self.size = 0
        self._next: Tensor = self._random() if start is None else start
        self._noise = noise
        self._seed = torch.zeros(self.capacity, dtype=torch.float64)  # the start of the space that grows, in the basis
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
        if self.exhausted:
            self._live[:j] = False
            self._spaces += 1
            self._noise = 0.5
        self._basis[j] = vector
        self._projected[j, :j] = self._projected[:j, j] = self._coupling
        self._live[j] = True
        if self.exhausted or j == 0:
            self._seed.zero_()[j] = 1
        self.size = j + 1
        image = self._products.forward(vector)
        measured = [torch.dot(vector, image), torch.linalg.vector_norm(image)]
        image = self._orthogonalise(image, measured[0])
        measured.append(torch.linalg.vector_norm(image))
        diagonal, length, beta = torch.stack(measured).tolist()  # the device is waited for once
        self._projected[j, j] = diagonal
        self._scale = max(self._scale, length)
        self._coupling = torch.zeros(self.size, dtype=torch.float64)
        self.exhausted = beta <= _EXHAUSTED * self._eps * self._scale
        self._barren = self._barren + 1 if self.exhausted else 0
        if beta > self.size * self._eps * self._scale:
            self._coupling[j] = beta
            self._next = image / beta
        elif self.size < len(image):
            self.neglected += beta
            self._next = self._random(image / beta if beta > 0 else None)  # what the coupling shows may be no rounding
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

    def check(self, outermost: Limits, wanted: Limits, tolerance: float, least: float, verify: bool) -> Completeness:
        """Whether an eigenvalue outside of the wanted ones may have been missed, and what to do about it.

        The space that grows from one start is asked for its :meth:`frontier`. An exhausted space holds one copy of each
        eigenvalue that its start contains; the random start of the next one contains all that are left. The first
        space is believed where it goes on, unless ``verify`` asks for another.

        Args:
            outermost: The values of the first pair at either end, between which the first space must have stayed.
            wanted: Those of the last pair that is wanted; infinite at an end that is not asked for.
            tolerance: How much farther out an eigenvalue may lie, in shares of these values; in the first space at
                least a tenth, so that nothing but a whole eigenvalue is looked for.
            least: How much farther out it may lie in any case.
            verify: See above.
        """
        first = self._spaces == 1
        if first and self.exhausted:
            return "continue"
        inside = True
        for sign, limit in zip((1, -1), outermost if first else wanted, strict=True):
            if limit == -sign * float("inf"):
                continue
            value, distance = self.frontier(sign)
            farther = max((max(tolerance, _MISSED) if first else tolerance) * abs(limit), least)
            if self._barren < _SPACES and sign * (limit - value) + distance > farther and distance > farther:
                return "continue"
            inside &= sign * (limit - value) <= farther
        if inside:
            return "fresh" if first and verify else "complete"
        return "continue" if self.exhausted else "fresh"

    def frontier(self, sign: int) -> tuple[float, float]:
        """The smallest (sign 1) or largest (−1) Ritz value θ of the space that grows, and how far beyond λ may lie.

        The Ritz vector is x = p(A)u of the start u, p a polynomial whose roots are the other Ritz values θ_i, and
        ``p(θ) = 1/uᵀx``. So an eigenvector e of an eigenvalue λ at a distance d beyond θ is in x to the extent
        ``eᵀx = p(λ) eᵀu``, which grows with d, and ``d |eᵀx| ≤ ‖A x − θ x‖ = r``. Of a random u, ``|eᵀu|`` is with
        probability 1 − CHANCE at least ``c = CHANCE √(π/2n)``; then

            d ∏_i (1 + d/|θ_i − θ|) ≤ r uᵀx / c.

        Without restarts this is exact; with them roots are left out, which makes d larger, and x is taken for an
        eigenvector in ``p(θ)``. It holds for an eigenvalue that the start can see, not for a second copy of one.
        """
        live = self._live[: self.size].nonzero().squeeze(1)
        values, coefficients = eigh(sign * self._projected[live][:, live])
        residual = (self._coupling[live] @ coefficients[:, 0]).abs()
        overlap = (self._seed[live] @ coefficients[:, 0]).abs()
        least = CHANCE * self._noise * (torch.pi / 2 / self._basis.shape[1]) ** 0.5
        bound = (residual * overlap / least).item()
        gaps = values[1:] - values[0]
        gaps = gaps[gaps > _EXHAUSTED * self._eps * self._scale]
        low, high = 0.0, bound
        for _ in range(60 if bound > 0 else 0):
            middle = (low + high) / 2
            if math.log(middle or sys.float_info.min) + (middle / gaps).log1p().sum().item() > math.log(bound):
                high = middle
            else:
                low = middle
        return sign * values[0].item(), high

    def restart(self, ritz: Ritz, kept: Tensor) -> None:
        """Replace the basis by Ritz vectors; the next vector couples to each by its signed residual."""
        coefficients = ritz.coefficients[:, kept]
        number = len(kept)
        self._coupling = self._coupling @ coefficients
        # in slices of columns, so that it needs no second basis
        rotation = coefficients.mT.to(self._basis)
        for columns in self._basis[: self.size].split(min(2**20, -(-self._basis.shape[1] // 16)), dim=1):
            columns[:number] = rotation @ columns
        self._projected.zero_()
        self._projected[:number, :number] = torch.diag(ritz.values[kept])
        live = self._live[: self.size]
        self._live[:number] = coefficients[live].square().sum(0) > 0.5
        self._live[number:] = False
        seed = self._seed[: self.size] @ coefficients
        self._seed.zero_()[:number] = seed
        self.size = number

    def begin_again(self, ritz: Ritz, kept: Tensor) -> None:
        """Keep converged Ritz vectors only, and begin a new space at a random vector orthogonal to them."""
        self.restart(ritz, kept)
        self.neglected += self._coupling.norm().item()
        self._coupling = torch.zeros_like(self._coupling)
        self.exhausted = True
        self._next = self._random()
        if self._selective:
            self._locked = self._basis[: self.size].clone()

    def _orthogonalise(self, image: Tensor, diagonal: Tensor) -> Tensor:
        j = self.size
        if not self._selective:
            return _project_out(self._basis[:j], image)
        image = image - self._basis[j - 1] * diagonal
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

    def _random(self, toward: Tensor | None = None) -> Tensor:
        """A random unit vector orthogonal to the basis; half of it along the unit vector ``toward``, if given."""
        vector = self._products.draw(1, "gaussian", self._generator).squeeze(1)
        if toward is not None:
            vector = vector / torch.linalg.vector_norm(vector) + toward
        vector = _project_out(self._basis[: self.size], vector)
        unit: Tensor = vector / torch.linalg.vector_norm(vector)
        return unit


def _project_out(rows: Tensor, vector: Tensor) -> Tensor:
    """The part of a vector that is orthogonal to orthonormal rows; twice is enough (Parlett 1998, §6.9)."""
    for _ in range(2):
        vector = vector - rows.mT @ (rows @ vector)
    return vector
