"""SGD, AdamW and Muon of torch.optim; Shampoo, SOAP and PSGD of other packages. No weight decay anywhere."""

from __future__ import annotations

import torch
from torch import nn

from examples.shared.task import Task
from examples.studies.ablation.contender import GradientStep, NotApplicable, Stepper, split_parameters, trained


def sgd(task: Task, *, lr: float = 0.01, momentum: float = 0.9, schedule: str = "constant") -> Stepper:
    """Nesterov's momentum."""
    optimizer = torch.optim.SGD(trained(task.model), lr=lr, momentum=momentum, nesterov=momentum > 0)
    return GradientStep(task, optimizer, schedule=schedule)


def adamw(task: Task, *, lr: float = 1e-3, schedule: str = "constant") -> Stepper:
    return GradientStep(task, torch.optim.AdamW(trained(task.model), lr=lr, weight_decay=0.0), schedule=schedule)


def muon(task: Task, *, lr: float = 1e-3, schedule: str = "constant") -> Stepper:
    """Muon for hidden matrices, AdamW for the rest, at one learning rate (``"match_rms_adamw"``).

    Hidden are matrices that are neither of an embedding nor of the first or last module with parameters, as the
    method's author advises.
    """
    owners = [module for module in task.model.modules() if any(True for _ in module.parameters(recurse=False))]

    def hidden(module: nn.Module, name: str, p: nn.Parameter) -> bool:
        outer = module is owners[0] or module is owners[-1] or isinstance(module, nn.Embedding)
        return p.ndim == 2 and not outer

    matrices, rest = split_parameters(task.model, hidden)
    if not matrices:
        raise NotApplicable("the network has no hidden matrices")
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=lr, weight_decay=0.0))
    return GradientStep(task, *optimizers, schedule=schedule)


def adahessian(task: Task, *, lr: float = 0.15, schedule: str = "constant") -> Stepper:
    """One product with the Hessian a step."""
    from torch_optimizer import Adahessian

    # Its random vectors come from the global generator unless it is given a seed.
    return GradientStep(task, Adahessian(trained(task.model), lr=lr), create_graph=True, schedule=schedule)


def shampoo(task: Task, *, lr: float = 0.1, update_freq: int = 1, schedule: str = "constant") -> Stepper:
    """With its roots renewed at every step: renewed less often, it diverges from its first, nearly empty factors."""
    from torch_optimizer import Shampoo

    return GradientStep(task, Shampoo(trained(task.model), lr=lr, update_freq=update_freq), schedule=schedule)


def soap(task: Task, *, lr: float = 3e-3, precondition_frequency: int = 10, schedule: str = "constant") -> Stepper:
    from pytorch_optimizer import SOAP

    parameters = trained(task.model)
    optimizer = SOAP(parameters, lr=lr, weight_decay=0.0, precondition_frequency=precondition_frequency)
    return GradientStep(task, optimizer, schedule=schedule)


def psgd(task: Task, *, lr: float = 1e-3, schedule: str = "constant") -> Stepper:
    """PSGD with Kronecker factors."""
    from pytorch_optimizer import Kron

    parameters = trained(task.model)
    optimizer = Kron(parameters, lr=lr, weight_decay=0.0, precondition_dtype=parameters[0].dtype)
    return GradientStep(task, optimizer, schedule=schedule)
