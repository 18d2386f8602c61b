"""How far to go: damping, radius, step length, gain per cost. Scalars only, no tensors of parameters."""
