"""Exact square-root factors of every layer's curvature, of one batch."""
