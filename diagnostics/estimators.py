"""Estimators for any :class:`diagnostics.linear_operator.LinearOperator`: what is known of A from products ``A @ V``.

All take an explicit ``generator`` (None: a new one with seed 0) and leave the global random state alone, multiply
several probes together, stop at a relative tolerance or a largest number of products, and say what they used.
"""

from __future__ import annotations

from diagnostics.diagonal import estimate_diagonal
from diagnostics.estimates import Estimate
from diagnostics.lanczos import ExtremeEigenpairs, extreme_eigenpairs
from diagnostics.norms import estimate_frobenius_norm
from diagnostics.spectral_density import SpectralDensity, spectral_density
from diagnostics.spectral_norm import SpectralNorm, spectral_norm
from diagnostics.trace import estimate_trace

__all__ = [
    "Estimate",
    "ExtremeEigenpairs",
    "SpectralDensity",
    "SpectralNorm",
    "estimate_diagonal",
    "estimate_frobenius_norm",
    "estimate_trace",
    "extreme_eigenpairs",
    "spectral_density",
    "spectral_norm",
]
