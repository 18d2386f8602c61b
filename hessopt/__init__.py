"""Second-order optimizers for PyTorch networks, each a :class:`torch.optim.Optimizer`."""

from diagnostics.ranks import separate_networks
from hessopt import memories
from hessopt.banded import BandedNewton
from hessopt.closure import LeastSquares
from hessopt.mini_batch import MiniBatch
from hessopt.newton_cg import NewtonCG
from hessopt.null_boost import NullBoost
from hessopt.null_project import NullProject
from hessopt.saddle import SaddleEscape
from hessopt.spectral_newton import SpectralNewton
from hessopt.stationarity import Stationarity

__all__ = [
    "BandedNewton",
    "LeastSquares",
    "MiniBatch",
    "NewtonCG",
    "NullBoost",
    "NullProject",
    "SaddleEscape",
    "SpectralNewton",
    "Stationarity",
    "memories",
    "separate_networks",
]
