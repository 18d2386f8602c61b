"""The registry of contenders. A new one is a function ``build(task, **settings)`` and an entry in ``_ALL``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

import hessopt
from examples.shared.task import Task
from examples.studies.ablation.baselines.gradient import (
    adahessian,
    adamw,
    prodigy,
    psgd,
    schedule_free,
    sgd,
    shampoo,
    soap,
)
from examples.studies.ablation.baselines.kfac import kfac
from examples.studies.ablation.baselines.muon_family import mousse, muon, newton_muon, normuon
from examples.studies.ablation.baselines.natural_gradient import NaturalCoordinates
from examples.studies.ablation.baselines.quasi_newton import adam_then_lbfgs, lbfgs, scipy_lbfgsb, scipy_trust_ncg
from examples.studies.ablation.baselines.self_scaled import ssbroyden
from examples.studies.ablation.contender import (
    ClosureStep,
    Contender,
    GradientStep,
    NotApplicable,
    RowsStep,
    Settings,
    Stepper,
    need_full_batch,
    trained,
)

Options = TypeVar("Options")


def newton_cg(task: Task, **settings: Any) -> Stepper:
    if settings.pop("method", None) == "levenberg-marquardt":
        settings["method"] = hessopt.LevenbergMarquardt()
    return ClosureStep(task, hessopt.NewtonCG(task.model, **settings))


def banded_newton(task: Task, **settings: Any) -> Stepper:
    return ClosureStep(task, hessopt.BandedNewton(task.model, **_searched(settings)))


def _searched(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with a damping, if there is one, as that of the search."""
    damping = settings.pop("damping", None)
    return settings if damping is None else {"search": hessopt.Damped(damping), **settings}


def banded_search(task: Task, *, damping: float | None = None, **settings: Any) -> Stepper:
    """With the line search: for full batches of residuals."""
    need_full_batch(task)
    return ClosureStep(task, hessopt.BandedNewton(task.model, search=hessopt.LineSearch(damping), **settings))


def banded_rows(task: Task, **settings: Any) -> Stepper:
    """On random rows, with the strata of the problem; fields of :class:`hessopt.Rows` are settings as well."""
    if task.residual_rows is None:
        raise NotApplicable("its residuals cannot be evaluated row by row")
    rows = with_own(hessopt.Rows(task.strata), settings)
    return RowsStep(task, hessopt.BandedNewton(task.model, rows=rows, **_searched(settings)))


def declared_loss(declared: Sequence[Any]) -> hessopt.NamedLoss | nn.Module:
    """A task's loss: a module, or a name with perhaps a reduction and the dimension of the classes."""
    return declared[0] if isinstance(declared[0], nn.Module) else hessopt.NamedLoss(*declared)


def with_own(options: Options, settings: dict[str, Any]) -> Options:
    """Options with those of the settings that are fields of theirs, which are taken out of the settings."""
    names = [field.name for field in dataclasses.fields(options) if field.name in settings]  # type: ignore[arg-type]
    return dataclasses.replace(options, **{name: settings.pop(name) for name in names})  # type: ignore[type-var]


def banded_kronecker(
    task: Task, *, schedule: str = "constant", bandwidth: Any = "auto", damping_unit: Any = "loss", **settings: Any
) -> Stepper:
    """For mini-batches. Where the loss can be declared, by name or as a module, it needs no closure."""
    averages = with_own(hessopt.KroneckerAveraging(), settings)
    optimizer = hessopt.KroneckerNewton(
        task.model,
        bandwidth=bandwidth,
        loss=None if task.declared is None else declared_loss(task.declared),
        damping=hessopt.KroneckerDamping(settings.pop("damping", None), damping_unit),
        averages=averages,
        **settings,
    )
    if task.declared is not None:
        return GradientStep(task, optimizer, schedule=schedule)
    return ClosureStep(task, optimizer, schedule)


def spectral_kronecker(
    task: Task,
    *,
    schedule: str = "constant",
    average: float = 8,
    known: bool = True,
    natural: bool = False,
    **settings: Any,
) -> Stepper:
    """What is measured is its average of the iterates, if ``average`` is not 0.

    Args:
        task: The task.
        schedule: Of ``lr``.
        average: Its power.
        known: Whether the loss is declared.
        natural: Whether to go along the natural gradient.
        settings: Fields of the options' classes, and arguments; ``clip`` is 0 for none.
    """

    if settings.get("step_lengths") != "fixed":
        settings["step_lengths"] = with_own(hessopt.CurvatureLengths(), settings)
    default = NaturalCoordinates() if natural else hessopt.KroneckerCoordinates()
    averages = with_own(default.averages, settings)
    coordinates = with_own(dataclasses.replace(default, averages=averages), settings)
    usual = hessopt.Momentum()
    momentum = hessopt.Momentum(settings.pop("momentum", usual.decay), settings.pop("clip", usual.clip) or None)
    loss = None if task.declared is None else declared_loss(task.declared)
    optimizer = hessopt.SpectralNewton(
        task.model,
        loss if known else None,
        coordinates=coordinates,
        momentum=momentum,
        average=average or None,
        **settings,
    )
    if loss is None and known:
        return ClosureStep(task, optimizer, schedule)
    return GradientStep(task, optimizer, schedule=schedule)


def spectral_newton(task: Task, *, schedule: str = "constant", **settings: Any) -> Stepper:
    """By the power law: matrices by the spectral map, the rest by AdamW."""
    law = with_own(hessopt.PowerLaw(), settings)
    adamw = hessopt.AdamWPart(ratio=settings.pop("adamw_ratio", 1.0))
    optimizer = hessopt.SpectralNewton(task.model, coordinates=law, adamw=adamw, **settings)
    if all(group["name"] != "spectral" for group in optimizer.param_groups):
        raise NotApplicable("the network has no hidden matrices")
    return ClosureStep(task, optimizer, schedule)


def escape_adamw(task: Task, *, lr: float = 1e-3, **settings: Any) -> Stepper:
    base = torch.optim.AdamW(trained(task.model), lr=lr, weight_decay=0.0)
    return ClosureStep(task, hessopt.SaddleEscape(base, model=task.model, **settings))


def escape_sgd(task: Task, *, lr: float = 0.01, momentum: float = 0.9, **settings: Any) -> Stepper:
    base = torch.optim.SGD(trained(task.model), lr=lr, momentum=momentum, nesterov=True)
    return ClosureStep(task, hessopt.SaddleEscape(base, model=task.model, **settings))


def rates(*values: float) -> list[Settings]:
    """Learning rates with a cosine schedule over the budget, then the same constant."""
    scheduled: list[Settings] = [{"lr": lr, "schedule": "cosine"} for lr in values]
    return [*scheduled, *({"lr": lr} for lr in values)]


def each(**values: Sequence[Any]) -> list[Settings]:
    """Settings of one kind each."""
    return [{name: value} for name, options in values.items() for value in options]


_KFAC = [(0.01, 1e-2), (0.1, 1.0), (0.001, 1e-3), (0.01, 1e-1), (0.03, 3e-2), (0.1, 1e-1)]
_ADAM_LBFGS = [(1e-3, 0.2), (1e-2, 0.2), (1e-3, 0.5), (1e-2, 0.5), (3e-3, 0.1), (3e-3, 0.3)]

_ALL = [
    Contender("sgd", "SGD, Nesterov", sgd, rates(0.1, 0.01, 1.0, 0.03)),
    Contender("adamw", "AdamW", adamw, rates(1e-2, 1e-3, 3e-3, 3e-2)),
    Contender(
        "schedule_free",
        "Schedule-Free AdamW",
        schedule_free,
        [{"lr": lr, "beta": beta} for beta in (0.9, 0.98) for lr in (1e-2, 3e-3, 1e-3, 3e-2)],
        packages=("pytorch-optimizer",),
    ),
    Contender(
        "prodigy",
        "Prodigy",
        prodigy,
        [{"d_coef": d, "schedule": name} for name in ("cosine", "constant") for d in (1.0, 0.5, 2.0, 4.0)],
        packages=("pytorch-optimizer",),
    ),
    Contender("lbfgs", "LBFGS", lbfgs, each(history_size=[100, 20, 10, 50, 200, 5])),
    Contender("muon", "Muon + AdamW", muon, rates(1e-2, 1e-3, 3e-3, 3e-2)),
    Contender("normuon", "NorMuon + AdamW", normuon, rates(1e-2, 1e-3, 3e-3, 3e-2), packages=("pytorch-optimizer",)),
    Contender("mousse", "Mousse + AdamW", mousse, rates(1e-2, 1e-3, 3e-3, 3e-2)),
    Contender("newton_muon", "Newton-Muon + AdamW", newton_muon, rates(1e-2, 1e-3, 3e-3, 3e-2)),
    Contender("adahessian", "Adahessian", adahessian, rates(0.15, 0.015, 0.05), packages=("torch-optimizer",)),
    Contender("shampoo", "Shampoo", shampoo, rates(0.1, 1.0, 0.01), packages=("torch-optimizer",)),
    Contender("soap", "SOAP", soap, rates(3e-3, 1e-2, 1e-3, 3e-2), packages=("pytorch-optimizer",)),
    Contender("psgd", "PSGD (Kron)", psgd, rates(1e-2, 1e-3, 3e-2, 3e-3), packages=("pytorch-optimizer",)),
    Contender(
        "kfac",
        "K-FAC",
        kfac,
        [{"lr": lr, "damping": damping} for lr, damping in _KFAC],
        packages=("curvlinops-for-pytorch",),
    ),
    Contender(
        "adam_lbfgs",
        "Adam, then LBFGS",
        adam_then_lbfgs,
        [{"lr": lr, "adam_share": share} for lr, share in _ADAM_LBFGS],
    ),
    Contender(
        "ssbroyden",
        "SSBroyden",
        ssbroyden,
        [
            {},
            {"adam_share": 0.1},
            {"adam_share": 0.1, "lr": 1e-2},
            {"scaled_start": False},
            {"adam_share": 0.3},
            {"adam_share": 0.3, "lr": 1e-2},
        ],
        packages=("scipy",),
    ),
    Contender(
        "scipy_lbfgsb", "L-BFGS-B (scipy)", scipy_lbfgsb, each(maxcor=[10, 100, 30, 50, 5, 20]), packages=("scipy",)
    ),
    Contender(
        "scipy_trust_ncg",
        "trust-ncg (scipy)",
        scipy_trust_ncg,
        each(initial_trust_radius=[1.0, 0.1, 10.0, 0.01, 100.0, 0.3]),
        packages=("scipy",),
    ),
    Contender(
        "newton_cg",
        "NewtonCG",
        newton_cg,
        [
            {},
            {"preconditioner": "diagonal"},
            {"curvature": "ggn", "method": "levenberg-marquardt"},
            {"curvature": "ggn"},
            {"curvature": "hessian"},
            {"max_products": 50},
        ],
        ours=True,
    ),
    Contender(
        "banded_newton",
        "BandedNewton",
        banded_newton,
        [
            {},
            {"damping": 1.0},
            {"bandwidth": 0},
            {"bandwidth": 1},
            {"bandwidth": "full"},
            {"bandwidth": 2},
        ],
        ours=True,
    ),
    Contender(
        "banded_search",
        "BandedNewton, line search",
        banded_search,
        [{}, {"bandwidth": 0}, {"damping": 1e-6}, {"damping": 1e-3}, {"bandwidth": 1}, {"bandwidth": "full"}],
        ours=True,
    ),
    Contender(
        "banded_rows",
        "BandedNewton, random rows",
        banded_rows,
        [
            {},
            {"damping": 1.0},
            {"damping": 1e-4},
            {"momentum": 0.9},
            {"first": 200, "growth": 1.0},
            {"bandwidth": "full"},
        ],
        ours=True,
    ),
    Contender(
        "banded_kronecker",
        "KroneckerNewton",
        banded_kronecker,
        [
            {"trust": 2e-2},
            {"schedule": "cosine", "damping_unit": "layer", "trust": 2e-2},
            {"schedule": "cosine"},
            {},
            {"schedule": "cosine", "trust": 1e-3, "momentum": 0.9},
            {"schedule": "cosine", "bandwidth": "full"},
        ],
        ours=True,
    ),
    Contender(
        "spectral_kronecker",
        "SpectralNewton",
        spectral_kronecker,
        [
            {},
            {"lr": 0.5},
            {"lr": 2.0},
            {"weight_decay": 0.1},
            {"average": 0, "schedule": "cosine"},
            {"momentum": 0.95},
        ],
        ours=True,
    ),
    Contender(
        "spectral_newton",
        "SpectralNewton, power law",
        spectral_newton,
        [
            {"lr": 0.01, "adamw_ratio": 1.0, "schedule": "cosine"},
            {},
            {"lr": 0.003, "adamw_ratio": 1.0, "schedule": "cosine"},
            {"lr": 0.03, "adamw_ratio": 0.3, "schedule": "cosine"},
            {"lr": 0.01, "alpha": 1.0, "adamw_ratio": 1.0, "schedule": "cosine"},
            {"lr": 0.05, "adamw_ratio": 0.15, "schedule": "cosine"},
        ],
        ours=True,
    ),
    Contender(
        "escape_adamw", "SaddleEscape(AdamW)", escape_adamw, each(lr=[1e-2, 1e-3, 3e-3, 3e-4, 3e-2, 1e-4]), ours=True
    ),
    Contender("escape_sgd", "SaddleEscape(SGD)", escape_sgd, each(lr=[0.1, 0.01, 1.0, 0.03, 0.3, 3e-3]), ours=True),
]

CONTENDERS: dict[str, Contender] = {contender.name: contender for contender in _ALL}
"""By name; figures give colours in this order."""
