"""Standard unconstrained test functions."""

from .test_functions import PROBLEMS, Minimum, Problem

__all__ = ["PROBLEMS", "Minimum", "Problem"]
