"""Gradient matrices divided by a power law of curvature."""
