"""Second-order optimizers for PyTorch networks, each a :class:`torch.optim.Optimizer`."""

from diagnostics.ranks.group import separate_networks
from hessopt import memories
from hessopt.averages.options import KroneckerAveraging, NamedLoss
from hessopt.banded.bandwidth import AutoBandwidth
from hessopt.banded.damped_step import DampedStep
from hessopt.banded.newton import BandedNewton
from hessopt.banded.rows import Rows
from hessopt.closure.protocol import LeastSquares
from hessopt.kronecker.band import KroneckerBand
from hessopt.kronecker.bandwidth import KroneckerBandwidth
from hessopt.kronecker.newton import KroneckerNewton
from hessopt.newton_cg.optimizer import NewtonCG
from hessopt.newton_cg.record import NewtonStep
from hessopt.search.rules import Damped, Fixed, KroneckerDamping, LevenbergMarquardt, LineSearch, TrustRadius
from hessopt.spectral.groups import left_to_adamw
from hessopt.spectral.kronecker import KroneckerSpectralNewton as _Kronecker  # noqa: F401 - a kind of SpectralNewton
from hessopt.spectral.optimizer import SpectralNewton
from hessopt.spectral.options import (
    AdamWPart,
    CurvatureLengths,
    KroneckerCoordinates,
    Momentum,
    OnlineExponent,
    PowerLaw,
)
from hessopt.spectral.power_law import PowerLawSpectralNewton as _PowerLaw  # noqa: F401 - a kind of SpectralNewton
from hessopt.spectral.step import SpectralStep
from hessopt.spectral.transfer import NewtonSchulz, spectral_map
from hessopt.wrappers.escape import CurvatureCheck
from hessopt.wrappers.null_boost import NullBoost
from hessopt.wrappers.null_project import NullProject
from hessopt.wrappers.saddle import SaddleEscape
from hessopt.wrappers.stationarity import Stationarity

__all__ = [
    "AdamWPart",
    "AutoBandwidth",
    "BandedNewton",
    "CurvatureCheck",
    "CurvatureLengths",
    "Damped",
    "DampedStep",
    "Fixed",
    "KroneckerAveraging",
    "KroneckerBand",
    "KroneckerBandwidth",
    "KroneckerCoordinates",
    "KroneckerDamping",
    "KroneckerNewton",
    "LeastSquares",
    "LevenbergMarquardt",
    "LineSearch",
    "Momentum",
    "NamedLoss",
    "NewtonCG",
    "NewtonSchulz",
    "NewtonStep",
    "NullBoost",
    "NullProject",
    "OnlineExponent",
    "PowerLaw",
    "Rows",
    "SaddleEscape",
    "SpectralNewton",
    "SpectralStep",
    "Stationarity",
    "TrustRadius",
    "left_to_adamw",
    "memories",
    "separate_networks",
    "spectral_map",
]
