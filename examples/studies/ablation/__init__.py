"""Optimizers side by side on real problems."""
