"""Running Kronecker averages of the layers' curvature, gathered by hooks; no step is taken here."""
