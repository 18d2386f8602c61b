"""Optimizers of other packages, each as a function that builds it on a task."""
