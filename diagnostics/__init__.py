"""The curvature of any PyTorch network, block by block."""

from diagnostics.block_spectra import group_spectra
from diagnostics.blocks import BlockMatrix, HessianBlocks
from diagnostics.bounds import resonance_bounds
from diagnostics.capture import capture
from diagnostics.determinism import NonDeterministicError
from diagnostics.discarded import discarded_share
from diagnostics.errors import CaptureError, DiagnosticsError, MemoryBudgetError, StaleGraphError
from diagnostics.estimated_metrics import estimate_metrics
from diagnostics.estimators import (
    Estimate,
    ExtremeEigenpairs,
    SpectralDensity,
    SpectralNorm,
    estimate_diagonal,
    estimate_frobenius_norm,
    estimate_trace,
    extreme_eigenpairs,
    spectral_density,
    spectral_norm,
)
from diagnostics.fisher import FisherOperator
from diagnostics.graph import Graph, Node
from diagnostics.interaction import interaction_radius
from diagnostics.linear_operator import LinearOperator
from diagnostics.metrics import metrics
from diagnostics.monitor import Measurement, Monitor
from diagnostics.operators import CurvatureProducts, GaussNewtonOperator, HessianOperator, TensorOperator
from diagnostics.parameter_metrics import estimate_parameter_metrics
from diagnostics.parametric import ParameterBlocks, parameter_blocks, parameter_hessian
from diagnostics.paths import path_resonance
from diagnostics.placement import recommend_skips
from diagnostics.recursion import hessian_blocks
from diagnostics.routing import RoutedCurvature, route
from diagnostics.sources import curvature_sources
from diagnostics.spectrum import escape_direction
from diagnostics.streaming import mean_blocks
from diagnostics.tables import DistanceTable, MetricTable

__all__ = [
    "BlockMatrix",
    "CaptureError",
    "CurvatureProducts",
    "DiagnosticsError",
    "DistanceTable",
    "Estimate",
    "ExtremeEigenpairs",
    "FisherOperator",
    "GaussNewtonOperator",
    "Graph",
    "HessianBlocks",
    "HessianOperator",
    "LinearOperator",
    "Measurement",
    "MemoryBudgetError",
    "MetricTable",
    "Monitor",
    "Node",
    "NonDeterministicError",
    "ParameterBlocks",
    "RoutedCurvature",
    "SpectralDensity",
    "SpectralNorm",
    "StaleGraphError",
    "TensorOperator",
    "capture",
    "curvature_sources",
    "discarded_share",
    "escape_direction",
    "estimate_diagonal",
    "estimate_frobenius_norm",
    "estimate_metrics",
    "estimate_parameter_metrics",
    "estimate_trace",
    "extreme_eigenpairs",
    "group_spectra",
    "hessian_blocks",
    "interaction_radius",
    "mean_blocks",
    "metrics",
    "parameter_blocks",
    "parameter_hessian",
    "path_resonance",
    "recommend_skips",
    "resonance_bounds",
    "route",
    "spectral_density",
    "spectral_norm",
]
