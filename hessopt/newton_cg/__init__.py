"""Truncated Newton steps."""
