"""Matrices known by products alone, :class:`diagnostics.LinearOperator`, and what a few products tell of them.

All take an explicit ``generator`` (None: a new one with seed 0) and leave the global random state alone, multiply
several probes together, stop at a relative tolerance or a largest number of products, and say what they used.
"""

from __future__ import annotations

from diagnostics.estimators.diagonal import estimate_diagonal
from diagnostics.estimators.lanczos import ExtremeEigenpairs, extreme_eigenpairs
from diagnostics.estimators.norms import estimate_frobenius_norm
from diagnostics.estimators.spectral_density import SpectralDensity, spectral_density
from diagnostics.estimators.spectral_norm import SpectralNorm, spectral_norm
from diagnostics.estimators.trace import estimate_trace
from diagnostics.results.estimate import Estimate

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
