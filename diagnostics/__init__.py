"""The curvature of any PyTorch network, block by block."""

from diagnostics.blocks import BlockMatrix, HessianBlocks
from diagnostics.capture import capture
from diagnostics.errors import CaptureError, DiagnosticsError, MemoryBudgetError, StaleGraphError
from diagnostics.graph import Graph, Node
from diagnostics.metrics import metrics
from diagnostics.recursion import hessian_blocks
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
    "StaleGraphError",
    "capture",
    "hessian_blocks",
    "metrics",
]
