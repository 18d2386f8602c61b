"""Our optimizers as entries of ``torch.testing._internal.common_optimizers``, and what its checks need of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.testing._internal import common_optimizers as theirs
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput

from hessopt.averages.options import KroneckerAveraging, NamedLoss
from hessopt.banded.newton import BandedNewton
from hessopt.kronecker.bandwidth import KroneckerBandwidth
from hessopt.kronecker.newton import KroneckerNewton
from hessopt.newton_cg.optimizer import NewtonCG
from hessopt.search.rules import Fixed, LevenbergMarquardt, LineSearch
from hessopt.spectral.optimizer import SpectralNewton
from hessopt.spectral.options import KroneckerCoordinates, OnlineExponent, PowerLaw
from hessopt.spectral.transfer import NewtonSchulz
from hessopt.wrappers.null_boost import NullBoost
from hessopt.wrappers.null_project import NullProject
from hessopt.wrappers.saddle import SaddleEscape

Closure = Callable[[], Tensor]


def newton_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [
        OptimizerInput(None, {}, "default"),
        OptimizerInput(None, {"lr": 0.5}, "non-default lr"),
        OptimizerInput(None, {"lr": torch.tensor(0.5)}, "tensor lr"),
        OptimizerInput(None, {"weight_decay": 0.1}, "weight_decay"),
        OptimizerInput(None, {"weight_decay": 0.1, "maximize": True}, "maximize, weight_decay"),
    ]


def newton_cg_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [
        *newton_inputs(device),
        OptimizerInput(None, {"curvature": "hessian"}, "hessian"),
        OptimizerInput(None, {"method": LevenbergMarquardt()}, "levenberg-marquardt"),
        OptimizerInput(None, {"preconditioner": "diagonal", "warm_start": True}, "diagonal, warm start"),
    ]


def newton_cg_module_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [*newton_cg_inputs(device), OptimizerInput(None, {"curvature": "ggn"}, "ggn")]


def banded_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [
        *newton_inputs(device),
        OptimizerInput(None, {"bandwidth": "full"}, "full"),
        OptimizerInput(None, {"search": Fixed(1.0)}, "fixed damping"),
        OptimizerInput(None, {"search": LineSearch()}, "line search"),
    ]


def kronecker_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [
        *newton_inputs(device),
        OptimizerInput(None, {"bandwidth": "full"}, "full"),
        OptimizerInput(None, {"bandwidth": KroneckerBandwidth(2)}, "auto"),
    ]


def spectral_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [
        *newton_inputs(device),
        OptimizerInput(None, {"momentum": 0.0, "average": None}, "without momentum and average"),
        OptimizerInput(None, {"step_lengths": "fixed"}, "fixed lengths"),
        OptimizerInput(None, {"accumulate": 2}, "accumulate"),
    ]


def power_law_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [
        *newton_inputs(device),
        OptimizerInput(None, {"coordinates": PowerLaw(1.0, 0.0)}, "exact Muon"),
        OptimizerInput(
            None, {"coordinates": PowerLaw(1.0, newton_schulz=NewtonSchulz(), nesterov=False)}, "Newton-Schulz"
        ),
        OptimizerInput(None, {"coordinates": PowerLaw({"conv": 0.5, "linear": 1.5}, 1.0, "published")}, "by type"),
        OptimizerInput(None, {"coordinates": PowerLaw("online", online=OnlineExponent(every=4))}, "online"),
    ]


def _own_errors(*wrong: tuple[dict[str, Any], str]) -> Callable[[Any, Any], list[ErrorOptimizerInput]]:
    def inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
        own = [
            ErrorOptimizerInput(OptimizerInput(None, kwargs, regex), error_type=ValueError, error_regex=regex)
            for kwargs, regex in wrong
        ]
        return [*theirs.get_error_inputs_for_all_optims(device, dtype), *own]

    return inputs


BAD_RATE = [({"lr": -1.0}, "lr must be"), ({"weight_decay": -0.1}, "weight_decay must be")]
newton_cg_errors = _own_errors(
    *BAD_RATE,
    ({"curvature": "fisher"}, "curvature must be"),
    ({"forcing": 1.0}, "forcing must lie in"),
    ({"max_products": 0}, "max_products must be an integer"),
)
banded_errors = _own_errors(*BAD_RATE, ({"bandwidth": -1}, "integer of at least 0"), ({"space": "dense"}, "space must"))
kronecker_errors = _own_errors(
    *BAD_RATE,
    ({"bandwidth": -1}, "integer of at least 0"),
    ({"damping": 0.0}, "damping must"),
    ({"trust": 0.0}, "trust must be positive"),
)

spectral_errors = _own_errors(
    *BAD_RATE,
    ({"momentum": 1.0}, "momentum must lie in"),
    ({"average": 0.0}, "average must be positive"),
    ({"accumulate": 0}, "accumulate must be an integer"),
    ({"step_lengths": "long"}, "step_lengths must be"),
)
power_law_errors = _own_errors(
    *BAD_RATE,
    ({"coordinates": PowerLaw(delta=-0.1)}, "delta must be"),
    ({"momentum": 1.0}, "momentum must lie in"),
    ({"coordinates": PowerLaw(form="free")}, "form must be"),  # type: ignore[arg-type]
)


@dataclass(frozen=True)
class Subject:
    """An optimizer under test.

    Attributes:
        info: The entry.
        build: ``(params, net, **kwargs) ↦`` the optimizer.
        needs_linear: Takes fully connected networks only.
        concave: Maximizes only what is concave.
    """

    info: OptimizerInfo
    build: Callable[..., Optimizer]
    needs_linear: bool = False
    concave: bool = False

    def inputs(self, device: torch.device) -> Iterator[OptimizerInput]:
        """Fresh ones, as a learning rate that is a tensor is changed in place by schedulers."""
        yield from self.info.optim_inputs_func(device=device.type)

    def sign(self, kwargs: dict[str, Any]) -> int:
        """Of the convex losses of torch's checks."""
        return -1 if self.concave and kwargs.get("maximize") else 1


def _info(name: str, inputs: Any, errors: Any, **kwargs: Any) -> OptimizerInfo:
    named = type(name, (Optimizer,), {})  # the entry's name; checks construct with `build`
    return OptimizerInfo(
        named,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        supported_impls=(),
        not_og_supported_flags=("maximize", "foreach", "differentiable", "capturable"),
        supports_complex=False,
        step_requires_closure=True,
        **kwargs,
    )


def _newton_cg(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return NewtonCG(params, **kwargs)


def _newton_cg_module(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return NewtonCG(params, model=net, **kwargs)


def _banded(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return BandedNewton(params, model=net, **kwargs)


def _kronecker(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    # Exact columns: random ones are drawn on the device, so that runs on two devices would differ.
    averages = KroneckerAveraging(columns="exact", factor_every=2, inverse_every=4)
    return KroneckerNewton(params, model=net, curvature="ggn", averages=averages, **kwargs)


def _kronecker_empirical(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return KroneckerNewton(params, model=net, curvature="empirical", **kwargs)


# As for _kronecker: exact columns, and updates that are due within the few steps of the checks.
COORDINATES = KroneckerCoordinates(averages=KroneckerAveraging(0.95, columns="exact", factor_every=2, inverse_every=4))


def _spectral(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return SpectralNewton(params, model=net, coordinates=COORDINATES, **kwargs)


def _spectral_declared(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return SpectralNewton(params, NamedLoss("mse", "sum"), model=net, coordinates=COORDINATES, **kwargs)


def _power_law(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return SpectralNewton(params, **{"coordinates": PowerLaw(), **kwargs})


def _power_law_module(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return SpectralNewton(params, model=net, **{"coordinates": PowerLaw(), **kwargs})


def _saddle_sgd(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return SaddleEscape(SGD(params, **kwargs), model=net)


def _saddle_adam(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return SaddleEscape(Adam(params, **kwargs))


def _boost_sgd(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return NullBoost(SGD(params, **kwargs), model=net, every=3, krylov=6)


def _boost_adam(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    return NullBoost(Adam(params, **kwargs), mode="random_krylov", every=3, krylov=6)


def _project_adam(params: Any, net: nn.Module, **kwargs: Any) -> Optimizer:
    base = Adam(params, **kwargs)
    like = base.param_groups[0]["params"][0]
    size = sum(p.numel() for group in base.param_groups for p in group["params"])
    basis = torch.randn(size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return NullProject(base, None if like.is_complex() else basis.to(like))


def _eager(inputs: Callable[..., list[OptimizerInput]]) -> Callable[..., list[OptimizerInput]]:
    """Without those that only CUDA graphs can have."""
    return lambda device, dtype=None: [i for i in inputs("cpu", dtype) if not i.kwargs.get("capturable")]


SUBJECTS = {
    subject.info.name: subject
    for subject in (
        Subject(_info("NewtonCG", newton_cg_inputs, newton_cg_errors), _newton_cg),
        Subject(_info("NewtonCG(model=)", newton_cg_module_inputs, newton_cg_errors), _newton_cg_module),
        Subject(_info("BandedNewton", banded_inputs, banded_errors), _banded, needs_linear=True, concave=True),
        Subject(
            _info("KroneckerNewton", kronecker_inputs, kronecker_errors),
            _kronecker,
            needs_linear=True,
            concave=True,
        ),
        Subject(
            _info("KroneckerNewton(empirical)", kronecker_inputs, kronecker_errors),
            _kronecker_empirical,
            needs_linear=True,
            concave=True,
        ),
        Subject(_info("SpectralNewton", spectral_inputs, spectral_errors), _spectral, needs_linear=True, concave=True),
        Subject(
            _info("SpectralNewton(declared)", spectral_inputs, spectral_errors),
            _spectral_declared,
            needs_linear=True,
            concave=True,
        ),
        Subject(_info("SpectralNewton(power law)", power_law_inputs, power_law_errors), _power_law),
        Subject(_info("SpectralNewton(power law, model=)", power_law_inputs, power_law_errors), _power_law_module),
        Subject(
            _info("SaddleEscape(SGD)", _eager(theirs.optim_inputs_func_sgd), theirs.optim_error_inputs_func_sgd),
            _saddle_sgd,
        ),
        Subject(
            _info("SaddleEscape(Adam)", _eager(theirs.optim_inputs_func_adam), theirs.optim_error_inputs_func_adam),
            _saddle_adam,
        ),
        Subject(
            _info("NullBoost(SGD)", _eager(theirs.optim_inputs_func_sgd), theirs.optim_error_inputs_func_sgd),
            _boost_sgd,
        ),
        Subject(
            _info("NullBoost(Adam)", _eager(theirs.optim_inputs_func_adam), theirs.optim_error_inputs_func_adam),
            _boost_adam,
        ),
        Subject(
            _info("NullProject(Adam)", _eager(theirs.optim_inputs_func_adam), theirs.optim_error_inputs_func_adam),
            _project_adam,
        ),
    )
}


class Task:
    """A network, an input, and the closure of most of torch's checks: ``± Σ (W x + b)²``."""

    def __init__(
        self, device: torch.device, *, contiguous: bool = True, dtype: torch.dtype = torch.float32, sign: int = 1
    ) -> None:
        self.net = nn.Linear(5, 10, device=device, dtype=dtype)
        shapes = ((10, 5), (10,))
        for name, shape in zip(("weight", "bias"), shapes, strict=True):
            values = torch.randn(shape, device=device, dtype=dtype)
            if not contiguous:
                values = torch.randn(*shape, 2, device=device, dtype=dtype)[..., 0]
            setattr(self.net, name, nn.Parameter(values))
        self.x = torch.randn(1, 5, device=device, dtype=dtype)
        self.sign = sign

    def clone(self) -> Task:
        return copy.deepcopy(self)

    def parameters(self) -> list[Tensor]:
        return [self.net.weight, self.net.bias]

    def loss(self) -> Tensor:
        return self.sign * self.net(self.x).pow(2).sum()

    def closure(self, optimizer: Optimizer) -> Closure:
        def run() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return run


def named(params: Iterable[Tensor], are_named: bool) -> list[Any]:
    return [(f"name{i}", p) if are_named else p for i, p in enumerate(params)]
