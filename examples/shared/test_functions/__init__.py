"""Standard unconstrained test functions."""

from examples.shared.test_functions.functions import PROBLEMS, Minimum, Problem

__all__ = ["PROBLEMS", "Minimum", "Problem"]
