"""The curvature of any PyTorch network, block by block.

Names are loaded when they are first used (PEP 562), so that ``import diagnostics`` costs next to nothing beyond torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnostics.alignment import curvature_exponents
    from diagnostics.alignment_recorder import ExponentRecorder
    from diagnostics.alignment_tables import ExponentTable
    from diagnostics.block_spectra import group_spectra
    from diagnostics.blocks import BlockMatrix, HessianBlocks
    from diagnostics.bounds import resonance_bounds
    from diagnostics.capture import capture
    from diagnostics.channel import ChannelWidth, channel_width
    from diagnostics.compare import Comparison, compare
    from diagnostics.conservation import ConservationMonitor
    from diagnostics.determinism import NonDeterministicError
    from diagnostics.diagnose import diagnose
    from diagnostics.discarded import discarded_share
    from diagnostics.drift import drift_exponent
    from diagnostics.errors import (
        CaptureError,
        DiagnosticsError,
        MemoryBudgetError,
        SectionFailedWarning,
        StaleGraphError,
    )
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
    from diagnostics.imbalance import predict_imbalance
    from diagnostics.interaction import interaction_radius
    from diagnostics.linear_operator import LinearOperator
    from diagnostics.metrics import metrics
    from diagnostics.monitor import Measurement, Monitor
    from diagnostics.null_cone import NullCone, null_cone
    from diagnostics.null_vectors import null_vectors
    from diagnostics.operators import CurvatureProducts, GaussNewtonOperator, HessianOperator, TensorOperator
    from diagnostics.parameter_metrics import estimate_parameter_metrics
    from diagnostics.parametric import ParameterBlocks, parameter_blocks, parameter_hessian
    from diagnostics.paths import path_resonance
    from diagnostics.placement import recommend_skips
    from diagnostics.recursion import hessian_blocks
    from diagnostics.report import Report
    from diagnostics.reporting.interrupted import DiagnosisInterrupted
    from diagnostics.routing import RoutedCurvature, route
    from diagnostics.sharpness import SharpnessTracker
    from diagnostics.sources import curvature_sources
    from diagnostics.spectrum import escape_direction
    from diagnostics.streaming import mean_blocks
    from diagnostics.tables import DistanceTable, MetricTable
    from diagnostics.verdicts import Verdict

__all__ = [
    "BlockMatrix",
    "CaptureError",
    "ChannelWidth",
    "Comparison",
    "ConservationMonitor",
    "CurvatureProducts",
    "DiagnosisInterrupted",
    "DiagnosticsError",
    "DistanceTable",
    "Estimate",
    "ExponentRecorder",
    "ExponentTable",
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
    "NullCone",
    "ParameterBlocks",
    "Report",
    "RoutedCurvature",
    "SectionFailedWarning",
    "SharpnessTracker",
    "SpectralDensity",
    "SpectralNorm",
    "StaleGraphError",
    "TensorOperator",
    "Verdict",
    "capture",
    "channel_width",
    "compare",
    "curvature_exponents",
    "curvature_sources",
    "diagnose",
    "discarded_share",
    "drift_exponent",
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
    "null_cone",
    "null_vectors",
    "parameter_blocks",
    "parameter_hessian",
    "path_resonance",
    "predict_imbalance",
    "recommend_skips",
    "resonance_bounds",
    "route",
    "spectral_density",
    "spectral_norm",
]

_HOME = {
    "curvature_exponents": "diagnostics.alignment",
    "ExponentRecorder": "diagnostics.alignment_recorder",
    "ExponentTable": "diagnostics.alignment_tables",
    "group_spectra": "diagnostics.block_spectra",
    "BlockMatrix": "diagnostics.blocks",
    "HessianBlocks": "diagnostics.blocks",
    "resonance_bounds": "diagnostics.bounds",
    "capture": "diagnostics.capture",
    "compare": "diagnostics.compare",
    "Comparison": "diagnostics.compare",
    "ConservationMonitor": "diagnostics.conservation",
    "NonDeterministicError": "diagnostics.determinism",
    "diagnose": "diagnostics.diagnose",
    "discarded_share": "diagnostics.discarded",
    "drift_exponent": "diagnostics.drift",
    "CaptureError": "diagnostics.errors",
    "DiagnosisInterrupted": "diagnostics.reporting.interrupted",
    "DiagnosticsError": "diagnostics.errors",
    "MemoryBudgetError": "diagnostics.errors",
    "SectionFailedWarning": "diagnostics.errors",
    "StaleGraphError": "diagnostics.errors",
    "estimate_metrics": "diagnostics.estimated_metrics",
    "Estimate": "diagnostics.estimators",
    "ExtremeEigenpairs": "diagnostics.estimators",
    "SpectralDensity": "diagnostics.estimators",
    "SpectralNorm": "diagnostics.estimators",
    "estimate_diagonal": "diagnostics.estimators",
    "estimate_frobenius_norm": "diagnostics.estimators",
    "estimate_trace": "diagnostics.estimators",
    "extreme_eigenpairs": "diagnostics.estimators",
    "spectral_density": "diagnostics.estimators",
    "spectral_norm": "diagnostics.estimators",
    "FisherOperator": "diagnostics.fisher",
    "Graph": "diagnostics.graph",
    "Node": "diagnostics.graph",
    "predict_imbalance": "diagnostics.imbalance",
    "interaction_radius": "diagnostics.interaction",
    "LinearOperator": "diagnostics.linear_operator",
    "metrics": "diagnostics.metrics",
    "Measurement": "diagnostics.monitor",
    "Monitor": "diagnostics.monitor",
    "ChannelWidth": "diagnostics.channel",
    "channel_width": "diagnostics.channel",
    "NullCone": "diagnostics.null_cone",
    "null_cone": "diagnostics.null_cone",
    "null_vectors": "diagnostics.null_vectors",
    "CurvatureProducts": "diagnostics.operators",
    "GaussNewtonOperator": "diagnostics.operators",
    "HessianOperator": "diagnostics.operators",
    "TensorOperator": "diagnostics.operators",
    "estimate_parameter_metrics": "diagnostics.parameter_metrics",
    "ParameterBlocks": "diagnostics.parametric",
    "parameter_blocks": "diagnostics.parametric",
    "parameter_hessian": "diagnostics.parametric",
    "path_resonance": "diagnostics.paths",
    "recommend_skips": "diagnostics.placement",
    "hessian_blocks": "diagnostics.recursion",
    "Report": "diagnostics.report",
    "RoutedCurvature": "diagnostics.routing",
    "route": "diagnostics.routing",
    "SharpnessTracker": "diagnostics.sharpness",
    "curvature_sources": "diagnostics.sources",
    "escape_direction": "diagnostics.spectrum",
    "mean_blocks": "diagnostics.streaming",
    "DistanceTable": "diagnostics.tables",
    "MetricTable": "diagnostics.tables",
    "Verdict": "diagnostics.verdicts",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``diagnostics.capture`` the function, although importing the submodule of that name sets the attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
