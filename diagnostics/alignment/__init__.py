"""Curvature exponents: how curvature grows with the singular values of a gradient."""
