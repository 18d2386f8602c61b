"""The curvature of any PyTorch network, block by block."""

from diagnostics.blocks import BlockMatrix, HessianBlocks
from diagnostics.bounds import resonance_bounds
from diagnostics.capture import capture
from diagnostics.errors import CaptureError, DiagnosticsError, MemoryBudgetError, StaleGraphError
from diagnostics.graph import Graph, Node
from diagnostics.interaction import interaction_radius
from diagnostics.metrics import metrics
from diagnostics.parametric import ParameterBlocks, parameter_blocks, parameter_hessian
from diagnostics.paths import path_resonance
from diagnostics.placement import recommend_skips
from diagnostics.recursion import hessian_blocks
from diagnostics.sources import curvature_sources
from diagnostics.spectrum import escape_direction
from diagnostics.streaming import mean_blocks
from diagnostics.tables import DistanceTable, MetricTable

__all__ = [
    "BlockMatrix",
    "CaptureError",
    "DiagnosticsError",
    "DistanceTable",
    "Graph",
    "HessianBlocks",
    "MemoryBudgetError",
    "MetricTable",
    "Node",
    "ParameterBlocks",
    "StaleGraphError",
    "capture",
    "curvature_sources",
    "escape_direction",
    "hessian_blocks",
    "interaction_radius",
    "mean_blocks",
    "metrics",
    "parameter_blocks",
    "parameter_hessian",
    "path_resonance",
    "recommend_skips",
    "resonance_bounds",
]
