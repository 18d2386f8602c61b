"""Residuals ``r(x)`` of the test functions ``f = Σ r²`` of Moré, Garbow and Hillstrom (1981), in their order.

Each takes ``(n,)`` and returns ``(m,)``; those that the paper defines for any m take it as an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sqrt

import torch
from torch import Tensor

from . import measurements


def _column(values: Sequence[float], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)


def _count(m: int, x: Tensor, first: int = 1) -> Tensor:
    """``first, first + 1, …``, m of them."""
    return torch.arange(first, first + m, dtype=x.dtype, device=x.device)


def rosenbrock(x: Tensor) -> Tensor:
    """Numbers 1 and 21: n/2 independent pairs."""
    odd, even = x[0::2], x[1::2]
    return torch.cat([10 * (even - odd**2), 1 - odd])


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([a - 13 + ((5 - b) * b - 2) * b, a - 29 + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([a - 1e6, b - 2e-6, a * b - 2])


def beale(x: Tensor) -> Tensor:
    y = _column((1.5, 2.25, 2.625), x)
    return y - x[0] * (1 - x[1] ** _count(3, x))


def jennrich_sampson(x: Tensor, m: int = 10) -> Tensor:
    i = _count(m, x)
    return 2 + 2 * i - torch.exp(i * x[0]) - torch.exp(i * x[1])


def helical_valley(x: Tensor) -> Tensor:
    a, b, c = x
    turns = torch.atan(b / a) / (2 * pi) + 0.5 * (a < 0)
    return torch.stack([10 * (c - 10 * turns), 10 * (torch.sqrt(a**2 + b**2) - 1), c])


def bard(x: Tensor) -> Tensor:
    y = _column(measurements.BARD, x)
    u = _count(len(y), x)
    v = 16 - u
    return y - x[0] - u / (v * x[1] + torch.minimum(u, v) * x[2])


def gaussian(x: Tensor) -> Tensor:
    y = _column(measurements.GAUSSIAN, x)
    t = (8 - _count(len(y), x)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


def meyer(x: Tensor) -> Tensor:
    y = _column(measurements.MEYER, x)
    t = 45 + 5 * _count(len(y), x)
    return x[0] * torch.exp(x[1] / (t + x[2])) - y


def gulf(x: Tensor, m: int = 99) -> Tensor:
    """With ``|y - x₂|`` in place of the paper's ``|y m i x₂|``, a misprint."""
    t = _count(m, x) / 100
    y = 25 + (-50 * torch.log(t)) ** (2 / 3)
    return torch.exp(-((y - x[1]).abs() ** x[2]) / x[0]) - t


def box(x: Tensor, m: int = 20) -> Tensor:
    t = _count(m, x) / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def powell_singular(x: Tensor) -> Tensor:
    """Numbers 13 and 22: n/4 independent quadruples."""
    a, b, c, d = x.view(-1, 4).mT
    return torch.cat([a + 10 * b, sqrt(5) * (c - d), (b - 2 * c) ** 2, sqrt(10) * (a - d) ** 2])


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    return torch.stack(
        [10 * (b - a**2), 1 - a, sqrt(90) * (d - c**2), 1 - c, sqrt(10) * (b + d - 2), (b - d) / sqrt(10)]
    )


def kowalik_osborne(x: Tensor) -> Tensor:
    y, u = _column(measurements.KOWALIK_OSBORNE_Y, x), _column(measurements.KOWALIK_OSBORNE_U, x)
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor, m: int = 20) -> Tensor:
    t = _count(m, x) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


def osborne_1(x: Tensor) -> Tensor:
    y = _column(measurements.OSBORNE_1, x)
    t = 10 * _count(len(y), x, first=0)
    return y - x[0] - x[1] * torch.exp(-t * x[3]) - x[2] * torch.exp(-t * x[4])


def biggs_exp6(x: Tensor, m: int = 13) -> Tensor:
    t = _count(m, x) / 10
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


def osborne_2(x: Tensor) -> Tensor:
    y = _column(measurements.OSBORNE_2, x)
    t = _count(len(y), x, first=0) / 10
    bells = x[1:4] * torch.exp(-((t[:, None] - x[8:11]) ** 2) * x[5:8])
    return y - x[0] * torch.exp(-t * x[4]) - bells.sum(1)


def watson(x: Tensor) -> Tensor:
    n = len(x)
    t = (_count(29, x) / 29)[:, None]
    powers = t ** _count(n, x, first=0)
    slope = (_count(n - 1, x) * x[1:] * powers[:, :-1]).sum(1)
    return torch.cat([slope - (powers @ x) ** 2 - 1, x[:1], x[1:2] - x[:1] ** 2 - 1])


def penalty_1(x: Tensor) -> Tensor:
    return torch.cat([sqrt(1e-5) * (x - 1), ((x**2).sum() - 0.25).view(1)])


def penalty_2(x: Tensor) -> Tensor:
    n, grown = len(x), torch.exp(x / 10)
    e = torch.exp(_count(n, x) / 10)
    curve = grown[1:] + grown[:-1] - (e[1:] + e[:-1])
    flat = grown[1:] - torch.exp(_column((-0.1,), x))
    ball = (_count(n, x).flip(0) * x**2).sum() - 1
    return torch.cat([x[:1] - 0.2, sqrt(1e-5) * curve, sqrt(1e-5) * flat, ball.view(1)])


def variably_dimensioned(x: Tensor) -> Tensor:
    tilt = (_count(len(x), x) * (x - 1)).sum().view(1)
    return torch.cat([x - 1, tilt, tilt**2])


def trigonometric(x: Tensor) -> Tensor:
    n = len(x)
    return n - torch.cos(x).sum() + _count(n, x) * (1 - torch.cos(x)) - torch.sin(x)


def brown_almost_linear(x: Tensor) -> Tensor:
    return torch.cat([(x + x.sum() - (len(x) + 1))[:-1], (x.prod() - 1).view(1)])


def _cubic(x: Tensor) -> tuple[float, Tensor, Tensor]:
    """h, t and ``(x + t + 1)³`` of the two discretized problems."""
    h = 1 / (len(x) + 1)
    t = h * _count(len(x), x)
    return h, t, (x + t + 1) ** 3


def discrete_boundary_value(x: Tensor) -> Tensor:
    h, _, cubic = _cubic(x)
    padded = torch.nn.functional.pad(x, (1, 1))
    return 2 * x - padded[:-2] - padded[2:] + h**2 * cubic / 2


def discrete_integral_equation(x: Tensor) -> Tensor:
    h, t, cubic = _cubic(x)
    kernel = torch.minimum(t[:, None], t) * (1 - torch.maximum(t[:, None], t))
    return x + h * (kernel @ cubic) / 2


def broyden_tridiagonal(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (1, 1))
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def broyden_banded(x: Tensor) -> Tensor:
    """Each couples to five before it and one after it."""
    n = len(x)
    band = torch.ones(n, n, dtype=x.dtype, device=x.device).tril(1).triu(-5).fill_diagonal_(0)
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


def linear_full_rank(x: Tensor, m: int = 20) -> Tensor:
    mean = 2 * x.sum() / m
    return torch.cat([x - mean - 1, (-mean - 1).expand(m - len(x))])


def linear_rank_1(x: Tensor, m: int = 20) -> Tensor:
    return _count(m, x) * (_count(len(x), x) * x).sum() - 1


def linear_rank_1_zeros(x: Tensor, m: int = 20) -> Tensor:
    """First and last rows and columns are zero."""
    inner = (_count(len(x), x) * x)[1:-1].sum()
    rows = _count(m, x, first=0)
    return torch.cat([rows[:-1], rows[:1]]) * inner - 1


def chebyquad(x: Tensor) -> Tensor:
    n, y = len(x), 2 * x - 1
    polynomials = [torch.ones_like(y), y]
    for _ in range(n - 1):
        polynomials.append(2 * y * polynomials[-1] - polynomials[-2])
    integrals = [0.0 if i % 2 else -1 / (i * i - 1) for i in range(1, n + 1)]
    return torch.stack(polynomials[1:]).mean(1) - _column(integrals, x)
