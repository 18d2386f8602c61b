"""PyTorch as we need it: its tape, its trees of tensors, kernels that differentiate twice, what is refused."""
