"""SGD and AdamW of torch.optim; Shampoo, SOAP, PSGD, Schedule-Free and Prodigy of other packages.

Weight decay is that of the method's own argument, and none unless a study sets it.
"""

from __future__ import annotations

import torch

from examples.shared.task import Task
from examples.studies.ablation.contender import GradientStep, Stepper, trained


def sgd(
    task: Task, *, lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 0.0, schedule: str = "constant"
) -> Stepper:
    """Nesterov's momentum."""
    optimizer = torch.optim.SGD(
        trained(task.model), lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
    )
    return GradientStep(task, optimizer, schedule=schedule)


def adamw(task: Task, *, lr: float = 1e-3, weight_decay: float = 0.0, schedule: str = "constant") -> Stepper:
    optimizer = torch.optim.AdamW(trained(task.model), lr=lr, weight_decay=weight_decay)
    return GradientStep(task, optimizer, schedule=schedule)


def adahessian(task: Task, *, lr: float = 0.15, schedule: str = "constant") -> Stepper:
    """One product with the Hessian a step."""
    from torch_optimizer import Adahessian

    # Its random vectors come from the global generator unless it is given a seed.
    return GradientStep(task, Adahessian(trained(task.model), lr=lr), create_graph=True, schedule=schedule)


def shampoo(task: Task, *, lr: float = 0.1, update_freq: int = 1, schedule: str = "constant") -> Stepper:
    """With its roots renewed at every step: renewed less often, it diverges from its first, nearly empty factors."""
    from torch_optimizer import Shampoo

    return GradientStep(task, Shampoo(trained(task.model), lr=lr, update_freq=update_freq), schedule=schedule)


def soap(
    task: Task,
    *,
    lr: float = 3e-3,
    precondition_frequency: int = 10,
    weight_decay: float = 0.0,
    schedule: str = "constant",
) -> Stepper:
    from pytorch_optimizer import SOAP

    optimizer = SOAP(
        trained(task.model), lr=lr, weight_decay=weight_decay, precondition_frequency=precondition_frequency
    )
    return GradientStep(task, optimizer, schedule=schedule)


def psgd(task: Task, *, lr: float = 1e-3, schedule: str = "constant") -> Stepper:
    """PSGD with Kronecker factors."""
    from pytorch_optimizer import Kron

    parameters = trained(task.model)
    optimizer = Kron(parameters, lr=lr, weight_decay=0.0, precondition_dtype=parameters[0].dtype)
    return GradientStep(task, optimizer, schedule=schedule)


def schedule_free(
    task: Task, *, lr: float = 2.5e-3, beta: float = 0.9, weight_decay: float = 0.0, schedule: str = "constant"
) -> Stepper:
    """Schedule-Free AdamW: what is measured is its average of the iterates."""
    from pytorch_optimizer import ScheduleFreeAdamW

    optimizer = ScheduleFreeAdamW(trained(task.model), lr=lr, betas=(beta, 0.999), weight_decay=weight_decay)
    optimizer.train()
    return GradientStep(task, optimizer, schedule=schedule)


def prodigy(task: Task, *, d_coef: float = 1.0, schedule: str = "constant") -> Stepper:
    """Prodigy, which estimates its learning rate; ``d_coef`` is a factor on the estimate."""
    from pytorch_optimizer import Prodigy

    optimizer = Prodigy(trained(task.model), d_coef=d_coef, bias_correction=True)
    return GradientStep(task, optimizer, schedule=schedule)
