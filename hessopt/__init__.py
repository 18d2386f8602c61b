"""Second-order optimizers for PyTorch networks, each a :class:`torch.optim.Optimizer`."""

from hessopt.banded import BandedNewton
from hessopt.closure import LeastSquares

__all__ = ["BandedNewton", "LeastSquares"]
