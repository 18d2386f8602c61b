"""The 35 unconstrained test functions of Moré, Garbow and Hillstrom (1981), some of them in two dimensions.

J. J. Moré, B. S. Garbow, K. E. Hillstrom, "Testing Unconstrained Optimization Software", ACM Transactions on
Mathematical Software 7 (1981), 17-41: starting points and minima are those of its section 3, by its numbers, unless
:attr:`Minimum.source` says otherwise. All are sums of squares ``f = Σ r²``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import residuals as r

PAPER = "Moré, Garbow and Hillstrom (1981)"


@dataclass(frozen=True)
class Minimum:
    """A published minimum.

    Attributes:
        value: Of f, to six digits.
        point: Where, if it is published as exact numbers; for a whole set of minimizers, one of them.
        source: Who published it.
        saddle: It is none, but a strict saddle point.
    """

    value: float
    point: tuple[float, ...] | None = None
    source: str = PAPER
    saddle: bool = False


@dataclass(frozen=True)
class Problem:
    """A function to minimize.

    Attributes:
        name: With the dimension, where there are several.
        number: In the paper.
        residuals: ``x ↦ r``, ``(n,)`` to ``(m,)``.
        start: The paper's x₀.
        minima: All that are published; the lowest first.
    """

    name: str
    number: int
    residuals: Callable[[Tensor], Tensor] = field(repr=False)
    start: tuple[float, ...] = field(repr=False)
    minima: tuple[Minimum, ...] = field(repr=False)

    @property
    def dimension(self) -> int:
        return len(self.start)

    def x0(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.tensor(self.start, dtype=torch.float64, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """``f(x) = Σ r²``."""
        return self.residuals(x).square().sum()


def _zero_at(point: Sequence[float]) -> tuple[Minimum, ...]:
    return (Minimum(0.0, tuple(point)),)


def _values(*values: float) -> tuple[Minimum, ...]:
    return tuple(Minimum(value) for value in values)


def _grid(n: int) -> list[float]:
    return [j / (n + 1) for j in range(1, n + 1)]


def _equation_start(n: int) -> tuple[float, ...]:
    return tuple(t * (t - 1) for t in _grid(n))


def _linear(n: int, m: int) -> list[Problem]:
    ones = (1.0,) * n
    rank_1 = m * (m - 1) / (2 * (2 * m + 1))
    zeros = (m * m + 3 * m - 6) / (2 * (2 * m - 3))
    at, inner = 3 / (2 * m + 1), 3 / (2 * m - 3)  # Σ j x_j of every minimizer
    return [
        Problem("linear, full rank", 32, partial(r.linear_full_rank, m=m), ones, (Minimum(m - n, (-1.0,) * n),)),
        Problem("linear, rank 1", 33, partial(r.linear_rank_1, m=m), ones, (Minimum(rank_1, (at, *(0.0,) * (n - 1))),)),
        Problem(
            "linear, rank 1, zeros",
            34,
            partial(r.linear_rank_1_zeros, m=m),
            ones,
            (Minimum(zeros, (0.0, inner / 2, *(0.0,) * (n - 2))),),
        ),
    ]


PROBLEMS: tuple[Problem, ...] = (
    Problem("Rosenbrock", 1, r.rosenbrock, (-1.2, 1.0), _zero_at((1.0, 1.0))),
    Problem("Freudenstein-Roth", 2, r.freudenstein_roth, (0.5, -2.0), (Minimum(0.0, (5.0, 4.0)), Minimum(48.9842))),
    Problem("Powell badly scaled", 3, r.powell_badly_scaled, (0.0, 1.0), _values(0.0)),
    Problem("Brown badly scaled", 4, r.brown_badly_scaled, (1.0, 1.0), _zero_at((1e6, 2e-6))),
    Problem("Beale", 5, r.beale, (1.0, 1.0), _zero_at((3.0, 0.5))),
    Problem("Jennrich-Sampson", 6, r.jennrich_sampson, (0.3, 0.4), _values(124.362)),
    Problem("helical valley", 7, r.helical_valley, (-1.0, 0.0, 0.0), _zero_at((1.0, 0.0, 0.0))),
    Problem("Bard", 8, r.bard, (1.0, 1.0, 1.0), _values(8.21487e-3, 17.4286)),
    Problem("Gaussian", 9, r.gaussian, (0.4, 1.0, 0.0), _values(1.12793e-8)),
    Problem("Meyer", 10, r.meyer, (0.02, 4000.0, 250.0), _values(87.9458)),
    Problem("Gulf", 11, r.gulf, (5.0, 2.5, 0.15), _zero_at((50.0, 25.0, 1.5))),
    Problem(
        "Box",
        12,
        r.box,
        (0.0, 10.0, 20.0),
        (*_zero_at((1.0, 10.0, 1.0)), *_zero_at((10.0, 1.0, -1.0)), *_zero_at((3.0, 3.0, 0.0))),
    ),
    Problem("Powell singular", 13, r.powell_singular, (3.0, -1.0, 0.0, 1.0), _zero_at((0.0,) * 4)),
    Problem("Wood", 14, r.wood, (-3.0, -1.0, -3.0, -1.0), _zero_at((1.0,) * 4)),
    Problem("Kowalik-Osborne", 15, r.kowalik_osborne, (0.25, 0.39, 0.415, 0.39), _values(3.07505e-4, 1.02734e-3)),
    Problem("Brown-Dennis", 16, r.brown_dennis, (25.0, 5.0, -5.0, -1.0), _values(85822.2)),
    Problem("Osborne 1", 17, r.osborne_1, (0.5, 1.5, -1.0, 0.01, 0.02), _values(5.46489e-5)),
    Problem(
        "Biggs EXP6",
        18,
        r.biggs_exp6,
        (1.0, 2.0, 1.0, 1.0, 1.0, 1.0),
        # The start has the symmetry x₁ = x₅, x₃ = x₆, which exact steps keep, and in that subspace it is a minimum.
        (Minimum(0.0, (1.0, 10.0, 1.0, 5.0, 4.0, 3.0), "Biggs (1971)"), Minimum(5.65565e-3, saddle=True)),
    ),
    Problem(
        "Osborne 2",
        19,
        r.osborne_2,
        (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5),
        _values(4.01377e-2),
    ),
    Problem("Watson, n = 6", 20, r.watson, (0.0,) * 6, _values(2.28767e-3)),
    Problem("Watson, n = 9", 20, r.watson, (0.0,) * 9, _values(1.39976e-6)),
    Problem("Watson, n = 12", 20, r.watson, (0.0,) * 12, _values(4.72238e-10)),
    Problem("Rosenbrock, n = 100", 21, r.rosenbrock, (-1.2, 1.0) * 50, _zero_at((1.0,) * 100)),
    Problem("Powell singular, n = 100", 22, r.powell_singular, (3.0, -1.0, 0.0, 1.0) * 25, _zero_at((0.0,) * 100)),
    Problem("penalty I, n = 4", 23, r.penalty_1, (1.0, 2.0, 3.0, 4.0), _values(2.24997e-5)),
    Problem("penalty I, n = 10", 23, r.penalty_1, tuple(float(j) for j in range(1, 11)), _values(7.08765e-5)),
    Problem("penalty II, n = 4", 24, r.penalty_2, (0.5,) * 4, _values(9.37629e-6)),
    Problem("penalty II, n = 10", 24, r.penalty_2, (0.5,) * 10, _values(2.93660e-4)),
    Problem(
        "variably dimensioned",
        25,
        r.variably_dimensioned,
        tuple(1 - j / 10 for j in range(1, 11)),
        _zero_at((1.0,) * 10),
    ),
    Problem("trigonometric", 26, r.trigonometric, (0.1,) * 10, (*_zero_at((0.0,) * 10), *_values(2.79506e-5))),
    Problem(
        "Brown almost-linear",
        27,
        r.brown_almost_linear,
        (0.5,) * 10,
        (*_zero_at((1.0,) * 10), Minimum(1.0, (*(0.0,) * 9, 11.0))),
    ),
    Problem("discrete boundary value", 28, r.discrete_boundary_value, _equation_start(50), _values(0.0)),
    Problem("discrete integral equation", 29, r.discrete_integral_equation, _equation_start(50), _values(0.0)),
    Problem("Broyden tridiagonal", 30, r.broyden_tridiagonal, (-1.0,) * 100, _values(0.0)),
    Problem("Broyden banded", 31, r.broyden_banded, (-1.0,) * 100, _values(0.0)),
    *_linear(10, 20),
    Problem("Chebyquad, n = 7", 35, r.chebyquad, tuple(_grid(7)), _values(0.0)),
    Problem("Chebyquad, n = 8", 35, r.chebyquad, tuple(_grid(8)), _values(3.51687e-3)),
    Problem("Chebyquad, n = 10", 35, r.chebyquad, tuple(_grid(10)), _values(6.50395e-3)),
)
