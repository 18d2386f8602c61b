"""Second-order optimizers for PyTorch networks, each a :class:`torch.optim.Optimizer`."""

from diagnostics.ranks.group import separate_networks
from hessopt import memories
from hessopt.averages.options import MiniBatch
from hessopt.banded.newton import BandedNewton
from hessopt.closure.protocol import LeastSquares
from hessopt.newton_cg.optimizer import NewtonCG
from hessopt.spectral.optimizer import SpectralNewton
from hessopt.spectral.options import AdamWPart, OnlineExponent, PowerLaw
from hessopt.spectral.transfer import NewtonSchulz
from hessopt.wrappers.null_boost import NullBoost
from hessopt.wrappers.null_project import NullProject
from hessopt.wrappers.saddle import SaddleEscape
from hessopt.wrappers.stationarity import Stationarity

__all__ = [
    "AdamWPart",
    "BandedNewton",
    "LeastSquares",
    "MiniBatch",
    "NewtonCG",
    "NewtonSchulz",
    "NullBoost",
    "NullProject",
    "OnlineExponent",
    "PowerLaw",
    "SaddleEscape",
    "SpectralNewton",
    "Stationarity",
    "memories",
    "separate_networks",
]
