"""Residuals of the test functions once more, in NumPy and index by index as the paper writes them.

They take complex numbers, for derivatives by complex steps, and share nothing with
``examples/shared/test_functions``. ``x[j]`` of the paper is ``x(j)`` here, from 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Vector = Any
exp, sin, cos, log, sqrt, pi = np.exp, np.sin, np.cos, np.log, np.sqrt, np.pi

BARD = "14 18 22 25 29 32 35 39 37 58 73 96 134 210 439"  # 1e-2
KOWALIK_Y = "1957 1947 1735 1600 844 627 456 342 323 235 246"  # 1e-4
OSBORNE_1 = (
    "844 908 932 936 925 908 881 850 818 784 751 718 685 658 628 603 580 558 538 522 506 490 478 467 457 448 438 431 "
    "424 420 414 411 406"
)  # 1e-3
OSBORNE_2 = (
    "1366 1191 1112 1013 991 885 831 847 786 725 746 679 608 655 616 606 602 626 651 724 649 649 694 644 624 661 612 "
    "558 533 495 500 423 395 375 372 391 396 405 428 429 523 562 607 653 672 708 633 668 645 632 591 559 597 625 739 "
    "710 729 720 636 581 428 292 162 98 54"
)  # 1e-3
GAUSSIAN = "9 44 175 540 1295 2420 3521 3989 3521 2420 1295 540 175 44 9"  # 1e-4
MEYER = "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872"


def _read(text: str, unit: float = 1.0) -> list[float]:
    return [int(word) * unit for word in text.split()]


def reference(number: int, x: Vector) -> Vector:
    """The residuals of function ``number`` at x, ``(m,)``."""

    def at(j: int) -> Any:
        return x[j - 1]

    return np.array(FORMULAS[number](at, len(x)))


def gradient(number: int, x: Vector) -> Vector:
    """∂/∂x of the sum of squares, by complex steps: exact to rounding."""
    r, jacobian = reference(number, x), jacobian_of(number, x)
    return 2 * jacobian.T @ r


def jacobian_of(number: int, x: Vector) -> Vector:
    steps = 1e-30j * np.eye(len(x))
    return np.stack([reference(number, x + step).imag / 1e-30 for step in steps], axis=1)


def hessian_column(number: int, x: Vector, j: int) -> tuple[Vector, float]:
    """Column j of the second derivative, by a central difference of :func:`gradient`, and its rounding error."""
    h = 1e-5 * max(abs(x[j]), 1e-2)
    up, down = x.copy(), x.copy()
    up[j] += h
    down[j] -= h
    above, below = gradient(number, up), gradient(number, down)
    return (above - below) / (up[j] - down[j]), 1e-14 * abs(above).max() / h


def _rosenbrock(x: Any, n: int) -> list[Any]:
    out = [None] * n
    for i in range(1, n // 2 + 1):
        out[i - 1] = 10 * (x(2 * i) - x(2 * i - 1) ** 2)
        out[n // 2 + i - 1] = 1 - x(2 * i - 1)
    return out


def _helical(x: Any, n: int) -> list[Any]:
    theta = np.arctan(x(2) / x(1)) / (2 * pi)
    if np.real(x(1)) < 0:
        theta = theta + 0.5
    return [10 * (x(3) - 10 * theta), 10 * (sqrt(x(1) ** 2 + x(2) ** 2) - 1), x(3)]


def _bard(x: Any, n: int) -> list[Any]:
    y = _read(BARD, 1e-2)
    return [y[u - 1] - (x(1) + u / ((16 - u) * x(2) + min(u, 16 - u) * x(3))) for u in range(1, 16)]


def _gaussian(x: Any, n: int) -> list[Any]:
    y = _read(GAUSSIAN, 1e-4)
    return [x(1) * exp(-x(2) * ((8 - i) / 2 - x(3)) ** 2 / 2) - y[i - 1] for i in range(1, 16)]


def _gulf(x: Any, n: int) -> list[Any]:
    out = []
    for i in range(1, 100):
        t = i / 100
        y = 25 + (-50 * log(t)) ** (2 / 3)
        out.append(exp(-(((y - x(2)) ** 2) ** (x(3) / 2)) / x(1)) - t)
    return out


def _box(x: Any, n: int) -> list[Any]:
    ts = [0.1 * i for i in range(1, 21)]
    return [exp(-t * x(1)) - exp(-t * x(2)) - x(3) * (exp(-t) - exp(-10 * t)) for t in ts]


def _powell(x: Any, n: int) -> list[Any]:
    q = n // 4
    out = [None] * n
    for i in range(1, q + 1):
        a, b, c, d = (x(4 * i - k) for k in (3, 2, 1, 0))
        out[i - 1], out[q + i - 1] = a + 10 * b, sqrt(5) * (c - d)
        out[2 * q + i - 1], out[3 * q + i - 1] = (b - 2 * c) ** 2, sqrt(10) * (a - d) ** 2
    return out


def _wood(x: Any, n: int) -> list[Any]:
    return [
        10 * (x(2) - x(1) ** 2), 1 - x(1), 90**0.5 * (x(4) - x(3) ** 2), 1 - x(3),
        10**0.5 * (x(2) + x(4) - 2), 10**-0.5 * (x(2) - x(4)),
    ]  # fmt: skip


def _kowalik(x: Any, n: int) -> list[Any]:
    us = [4, 2, 1, 1 / 2, 1 / 4, 0.167, 1 / 8, 1 / 10, 0.0833, 0.0714, 1 / 16]
    return [
        y - x(1) * (u * u + u * x(2)) / (u * u + u * x(3) + x(4))
        for y, u in zip(_read(KOWALIK_Y, 1e-4), us, strict=True)
    ]


def _brown_dennis(x: Any, n: int) -> list[Any]:
    ts = [i / 5 for i in range(1, 21)]
    return [(x(1) + t * x(2) - exp(t)) ** 2 + (x(3) + x(4) * sin(t) - cos(t)) ** 2 for t in ts]


def _osborne_1(x: Any, n: int) -> list[Any]:
    y = _read(OSBORNE_1, 1e-3)
    return [y[i] - (x(1) + x(2) * exp(-10 * i * x(4)) + x(3) * exp(-10 * i * x(5))) for i in range(33)]


def _biggs(x: Any, n: int) -> list[Any]:
    out = []
    for t in (0.1 * i for i in range(1, 14)):
        y = exp(-t) - 5 * exp(-10 * t) + 3 * exp(-4 * t)
        out.append(x(3) * exp(-t * x(1)) - x(4) * exp(-t * x(2)) + x(6) * exp(-t * x(5)) - y)
    return out


def _osborne_2(x: Any, n: int) -> list[Any]:
    out = []
    for i, y in enumerate(_read(OSBORNE_2, 1e-3)):
        t = i / 10
        model = x(1) * exp(-t * x(5))
        for k in (2, 3, 4):
            model = model + x(k) * exp(-((t - x(k + 7)) ** 2) * x(k + 4))
        out.append(y - model)
    return out


def _watson(x: Any, n: int) -> list[Any]:
    out = []
    for i in range(1, 30):
        t = i / 29
        slope = sum((j - 1) * x(j) * t ** (j - 2) for j in range(2, n + 1))
        out.append(slope - sum(x(j) * t ** (j - 1) for j in range(1, n + 1)) ** 2 - 1)
    return [*out, x(1), x(2) - x(1) ** 2 - 1]


def _penalty_1(x: Any, n: int) -> list[Any]:
    return [*(1e-5**0.5 * (x(i) - 1) for i in range(1, n + 1)), sum(x(j) ** 2 for j in range(1, n + 1)) - 1 / 4]


def _penalty_2(x: Any, n: int) -> list[Any]:
    out = [x(1) - 0.2]
    for i in range(2, n + 1):
        y = exp(i / 10) + exp((i - 1) / 10)
        out.append(1e-5**0.5 * (exp(x(i) / 10) + exp(x(i - 1) / 10) - y))
    flat = [1e-5**0.5 * (exp(x(i - n + 1) / 10) - exp(-1 / 10)) for i in range(n + 1, 2 * n)]
    return [*out, *flat, sum((n - j + 1) * x(j) ** 2 for j in range(1, n + 1)) - 1]


def _variably_dimensioned(x: Any, n: int) -> list[Any]:
    tilt = sum(j * (x(j) - 1) for j in range(1, n + 1))
    return [*(x(i) - 1 for i in range(1, n + 1)), tilt, tilt**2]


def _trigonometric(x: Any, n: int) -> list[Any]:
    total = sum(cos(x(j)) for j in range(1, n + 1))
    return [n - total + i * (1 - cos(x(i))) - sin(x(i)) for i in range(1, n + 1)]


def _brown_almost_linear(x: Any, n: int) -> list[Any]:
    total, product = sum(x(j) for j in range(1, n + 1)), 1
    for j in range(1, n + 1):
        product = product * x(j)
    return [*(x(i) + total - (n + 1) for i in range(1, n)), product - 1]


def _boundary_value(x: Any, n: int) -> list[Any]:
    h = 1 / (n + 1)

    def inside(i: int) -> Any:
        return x(i) if 1 <= i <= n else 0

    return [2 * x(i) - inside(i - 1) - inside(i + 1) + h**2 * (x(i) + i * h + 1) ** 3 / 2 for i in range(1, n + 1)]


def _integral_equation(x: Any, n: int) -> list[Any]:
    h = 1 / (n + 1)
    out = []
    for i in range(1, n + 1):
        t = i * h
        before = sum(j * h * (x(j) + j * h + 1) ** 3 for j in range(1, i + 1))
        after = sum((1 - j * h) * (x(j) + j * h + 1) ** 3 for j in range(i + 1, n + 1))
        out.append(x(i) + h * ((1 - t) * before + t * after) / 2)
    return out


def _broyden_tridiagonal(x: Any, n: int) -> list[Any]:
    def inside(i: int) -> Any:
        return x(i) if 1 <= i <= n else 0

    return [(3 - 2 * x(i)) * x(i) - inside(i - 1) - 2 * inside(i + 1) + 1 for i in range(1, n + 1)]


def _broyden_banded(x: Any, n: int) -> list[Any]:
    out = []
    for i in range(1, n + 1):
        band = [j for j in range(max(1, i - 5), min(n, i + 1) + 1) if j != i]
        out.append(x(i) * (2 + 5 * x(i) ** 2) + 1 - sum(x(j) * (1 + x(j)) for j in band))
    return out


def _linear_rank_1_zeros(x: Any, n: int) -> list[Any]:
    inner = sum(j * x(j) for j in range(2, n))
    return [-1 + 0 * inner, *((i - 1) * inner - 1 for i in range(2, 20)), -1 + 0 * inner]


def _chebyquad(x: Any, n: int) -> list[Any]:
    out = []
    for i in range(1, n + 1):
        values = [np.polynomial.chebyshev.chebval(2 * x(j) - 1, [0] * i + [1]) for j in range(1, n + 1)]
        out.append(sum(values) / n - (0 if i % 2 else -1 / (i**2 - 1)))
    return out


FORMULAS: dict[int, Callable[[Any, int], list[Any]]] = {
    1: _rosenbrock,
    2: lambda x, n: [-13 + x(1) + ((5 - x(2)) * x(2) - 2) * x(2), -29 + x(1) + ((x(2) + 1) * x(2) - 14) * x(2)],
    3: lambda x, n: [10**4 * x(1) * x(2) - 1, exp(-x(1)) + exp(-x(2)) - 1.0001],
    4: lambda x, n: [x(1) - 10**6, x(2) - 2e-6, x(1) * x(2) - 2],
    5: lambda x, n: [y - x(1) * (1 - x(2) ** i) for i, y in ((1, 1.5), (2, 2.25), (3, 2.625))],
    6: lambda x, n: [2 + 2 * i - (exp(i * x(1)) + exp(i * x(2))) for i in range(1, 11)],
    7: _helical,
    8: _bard,
    9: _gaussian,
    10: lambda x, n: [x(1) * exp(x(2) / (45 + 5 * i + x(3))) - y for i, y in enumerate(_read(MEYER), 1)],
    11: _gulf,
    12: _box,
    13: _powell,
    14: _wood,
    15: _kowalik,
    16: _brown_dennis,
    17: _osborne_1,
    18: _biggs,
    19: _osborne_2,
    20: _watson,
    21: _rosenbrock,
    22: _powell,
    23: _penalty_1,
    24: _penalty_2,
    25: _variably_dimensioned,
    26: _trigonometric,
    27: _brown_almost_linear,
    28: _boundary_value,
    29: _integral_equation,
    30: _broyden_tridiagonal,
    31: _broyden_banded,
    32: lambda x, n: [(x(i) if i <= n else 0) - 2 / 20 * sum(x(j) for j in range(1, n + 1)) - 1 for i in range(1, 21)],
    33: lambda x, n: [i * sum(j * x(j) for j in range(1, n + 1)) - 1 for i in range(1, 21)],
    34: _linear_rank_1_zeros,
    35: _chebyquad,
}


def start(number: int, n: int) -> list[float]:
    """The paper's x₀."""
    if number in (13, 22):
        return [3, -1, 0, 1] * (n // 4)
    if number in (1, 21):
        return [-1.2, 1] * (n // 2)
    if number in (28, 29):
        return [j / (n + 1) * (j / (n + 1) - 1) for j in range(1, n + 1)]
    by_index: dict[int, Callable[[int], float]] = {
        20: lambda j: 0, 23: lambda j: j, 24: lambda j: 0.5, 25: lambda j: 1 - j / n, 26: lambda j: 1 / n,
        27: lambda j: 0.5, 30: lambda j: -1, 31: lambda j: -1, 32: lambda j: 1, 33: lambda j: 1, 34: lambda j: 1,
        35: lambda j: j / (n + 1),
    }  # fmt: skip
    return [by_index[number](j) for j in range(1, n + 1)] if number in by_index else STARTS[number]


STARTS: dict[int, list[float]] = {
    2: [0.5, -2], 3: [0, 1], 4: [1, 1], 5: [1, 1], 6: [0.3, 0.4], 7: [-1, 0, 0], 8: [1, 1, 1], 9: [0.4, 1, 0],
    10: [0.02, 4000, 250], 11: [5, 2.5, 0.15], 12: [0, 10, 20], 14: [-3, -1, -3, -1], 15: [0.25, 0.39, 0.415, 0.39],
    16: [25, 5, -5, -1], 17: [0.5, 1.5, -1, 0.01, 0.02], 18: [1, 2, 1, 1, 1, 1],
    19: [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5],
}  # fmt: skip
