"""Errors raised by this package: each message names the cause and the way out."""

from __future__ import annotations


class HessoptError(RuntimeError):
    """Base class of the errors of this package."""


class ClosureError(HessoptError):
    """The closure does not provide what the optimizer needs."""


class ModelError(HessoptError):
    """The network is not of the kind that the optimizer can treat."""


class NotConvexError(HessoptError):
    """The loss is not convex in the network's output, so its Gauss-Newton matrix is not positive semidefinite."""


class SolveError(HessoptError):
    """The damped curvature is not positive definite in working precision: the damping is too small for it."""
