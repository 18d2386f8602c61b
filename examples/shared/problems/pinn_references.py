"""Solutions to measure errors against: of the pendulum and Burgers' equation by formulas, of Allen-Cahn's by modes."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ellipj, roots_hermite
from torch import Tensor

VISCOSITY = 0.01 / math.pi
DIFFUSIVITY = 1e-4


def pendulum(t: NDArray[np.float64], amplitude: float) -> NDArray[np.float64]:
    """``u'' + sin u = 0``, ``u(0) = amplitude``, ``u'(0) = 0``: ``2 asin(k cd(t; k²))``, ``k = sin(amplitude/2)``."""
    k = math.sin(amplitude / 2)
    _, cn, dn, _ = ellipj(t, k**2)
    angle: NDArray[np.float64] = 2 * np.arcsin(k * cn / dn)
    return angle


def burgers(points: Tensor, nodes: int = 160, viscosity: float = VISCOSITY) -> Tensor:
    """``u_t + u u_x = ν u_xx`` on [-1, 1] from ``-sin πx`` by the Cole-Hopf transformation.

    ``u = -∫ sin π(x-η) f(x-η) e^(-η²/4νt) dη / ∫ f(x-η) e^(-η²/4νt) dη`` with ``f(y) = exp(-cos(πy) / 2πν)``, by
    Gauss-Hermite quadrature in ``η = 2 √(νt) z``. It can be differentiated, where t > 0.

    Args:
        points: ``(N, 2)``, columns x and t, float64.
        nodes: Of the quadrature.
        viscosity: ν. Default: 0.01/π.

    Returns:
        u, ``(N, 1)``.

    Source:
        Basdevant et al. 1986, Computers & Fluids 14.
    """
    z, weights = (torch.from_numpy(part).to(points.device) for part in roots_hermite(nodes))
    x, t = points[:, :1], points[:, 1:]
    y = x - 2 * (viscosity * t).sqrt() * z
    exponent = -torch.cos(math.pi * y) / (2 * math.pi * viscosity) + weights.log()
    share = torch.softmax(exponent, dim=1)
    return -(torch.sin(math.pi * y) * share).sum(dim=1, keepdim=True)


@lru_cache(maxsize=4)
def allen_cahn(
    modes: int = 2048, steps: int = 1000, times: int = 51
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """``u_t = 1e-4 u_xx + 5 (u - u³)``, 2-periodic, from ``x² cos πx``, for t in [0, 1].

    Fourier modes in x (aliased products, since the solution is resolved) and the exponential Runge-Kutta method of
    fourth order in t.

    Args:
        modes: Points in x.
        steps: Steps in t, a multiple of ``times - 1``.
        times: How many times are kept, both ends included.

    Returns:
        x ``(modes,)`` from -1, t ``(times,)`` and u ``(times, modes)``.

    Source:
        Cox and Matthews 2002, J. Comput. Phys. 176; coefficients by contour integrals: Kassam and Trefethen 2005,
        SIAM J. Sci. Comput. 26.
    """
    if steps % (times - 1):
        raise ValueError(f"{steps} steps are not a multiple of {times - 1}.")
    x = -1 + 2 * np.arange(modes) / modes
    h = 1 / steps
    # 5 u is stiff beside the diffusion of no mode, but it costs nothing to have it exact.
    linear = 5 - DIFFUSIVITY * (math.pi * np.arange(modes // 2 + 1)) ** 2
    full, half = np.exp(h * linear), np.exp(h * linear / 2)
    contour = np.exp(1j * math.pi * (np.arange(1, 33) - 0.5) / 32)
    z = h * linear[:, None] + contour

    def mean(values: NDArray[Any]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = h * values.mean(axis=1).real
        return result

    q = mean((np.exp(z / 2) - 1) / z)
    first = mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3)
    middle = mean((2 + z + np.exp(z) * (-2 + z)) / z**3)
    last = mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3)

    def reaction(v: NDArray[Any]) -> NDArray[Any]:
        return np.fft.rfft(-5 * np.fft.irfft(v, modes) ** 3)

    # The start has a kink where it is continued: its modes from a finer grid, on which their aliases are small.
    fine = -1 + 2 * np.arange(16 * modes) / (16 * modes)
    v = np.fft.rfft(fine**2 * np.cos(math.pi * fine))[: modes // 2 + 1] / 16
    kept = [x**2 * np.cos(math.pi * x)]
    for step in range(1, steps + 1):
        n = reaction(v)
        a = half * v + q * n
        na = reaction(a)
        nb = reaction(half * v + q * na)
        nc = reaction(half * a + q * (2 * nb - n))
        v = full * v + first * n + 2 * middle * (na + nb) + last * nc
        if step % (steps // (times - 1)) == 0:
            kept.append(np.fft.irfft(v, modes))
    return x, np.linspace(0, 1, times), np.stack(kept)
