"""Spectral steps of several processes, each of which computes a part."""
