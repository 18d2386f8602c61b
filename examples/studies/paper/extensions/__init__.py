"""Experiments that the paper announces or lacks: other architectures, and the labels of the measured batch."""
