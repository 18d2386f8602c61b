"""Second-order optimizers for PyTorch networks, each a :class:`torch.optim.Optimizer`."""

from hessopt.banded import BandedNewton
from hessopt.closure import LeastSquares
from hessopt.newton_cg import NewtonCG
from hessopt.saddle import SaddleEscape
from hessopt.stationarity import Stationarity

__all__ = ["BandedNewton", "LeastSquares", "NewtonCG", "SaddleEscape", "Stationarity"]
