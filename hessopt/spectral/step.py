"""What SpectralNewton does to single parameters, and what it says of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hessopt.checks import check_choice
from hessopt.network.arguments import check_group
from hessopt.network.saved_state import Group
from hessopt.spectral.groups import check_exponents
from hessopt.spectral.transfer import NewtonSchulz

State = dict[str, Any]


@dataclass(frozen=True)
class SpectralStep:
    """What one step of :class:`hessopt.SpectralNewton` did.

    Attributes:
        loss: Before the step; NaN where no closure was given.
        gradient_norm: ‖∇f‖ over the parameters that were moved.
        measured: Number of layers whose exponent was measured.
        fallbacks: Number of those whose fit was too bad, so that α is 1.
    """

    loss: float
    gradient_norm: float
    measured: int
    fallbacks: int


def momentum_direction(group: Group, state: State, g: Tensor) -> Tensor:
    """The gradient with momentum as a matrix, in float32 at least; counts the step."""
    if "momentum_buffer" not in state:
        state["step"] = torch.tensor(0.0)
        state["momentum_buffer"] = torch.zeros_like(g)
    state["step"] += 1
    mu, buffer = group["momentum"], state["momentum_buffer"]
    buffer.lerp_(g, 1 - mu)
    direction: Tensor = g.lerp(buffer, mu) if group["nesterov"] else buffer
    return direction.flatten(1).to(torch.promote_types(g.dtype, torch.float32))


def apply_matrix_step(group: Group, p: Tensor, step: Tensor) -> None:
    """``W ← (1 − γλ) W − γ ΔW``."""
    lr = float(group["lr"])
    p.mul_(1 - lr * group["weight_decay"])
    p.add_(step.view_as(p).to(p.dtype), alpha=-lr)


def apply_adamw_step(group: Group, state: State, p: Tensor, g: Tensor) -> None:
    """The step of :class:`torch.optim.AdamW`, at ``adamw_ratio`` times the rate of a group that is not all AdamW's."""
    if "exp_avg" not in state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
    ratio = 1.0 if group["method"] == "adamw" else group["adamw_ratio"]
    beta1, beta2 = group["betas"]
    adamw(
        [p], [g], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], foreach=False, amsgrad=False,
        beta1=beta1, beta2=beta2, lr=float(group["lr"]) * ratio, weight_decay=group["weight_decay"],
        eps=group["eps"], maximize=False,
    )  # fmt: skip


def check_spectral_group(group: Group, newton_schulz: NewtonSchulz | None) -> None:
    """Raise ValueError for an option that is out of range."""
    check_group("SpectralNewton", group, None, ("delta", "adamw_ratio", "eps"))
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise ValueError(f"betas must lie in [0, 1), got {beta}.")
    check_choice("form", group["form"], ("scale_free", "published"))
    check_choice("method", group["method"], ("auto", "spectral", "adamw"))
    check_exponents(group["alpha"])
    exponents = group["alpha"].values() if isinstance(group["alpha"], Mapping) else [group["alpha"]]
    if newton_schulz is not None and 1 not in exponents:
        raise ValueError("newton_schulz gives the polar factor, of alpha = 1; no layer has that exponent.")
    for p in group["params"]:
        if p.dtype == torch.float16:
            raise ValueError(
                "SpectralNewton has no float16 parameters: AdamW's eps and the squares of small gradients are zero in "
                "that precision, and steps infinite. Keep the parameters in float32 and run the network under "
                "torch.autocast(dtype=torch.float16) with a GradScaler, or take bfloat16."
            )
