"""Trains the networks of several seeds together: one batched product a layer instead of one for each seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm

from examples.studies.paper.images import Data


@dataclass(frozen=True)
class Schedule:
    """The paper's training: cosine decay by epoch, gradients clipped to norm 1 for each network."""

    epochs: int = 50
    lr: float = 0.01
    weight_decay: float = 1e-4
    batch: int = 128
    adam: bool = False


def train(
    networks: Sequence[nn.Module],
    data: Sequence[Data],
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    seeds: Sequence[int],
    name: str = "",
) -> dict[str, list[nn.Module]]:
    """Networks at ``init``, ``mid`` (half of the epochs) and ``final``, in the order of the seeds.

    The networks must have the same structure and no buffers that training changes. Each sees its own data in its own
    order. Without epochs only ``init`` is returned.
    """
    found = {"init": [copy.deepcopy(network).eval() for network in networks]}
    if not schedule.epochs:
        return found
    for network in networks:
        network.train()
    base = copy.deepcopy(networks[0]).to("meta")
    parameters, buffers = stack_module_state(list(networks))
    # matrices are trained transposed, which is how their gradients come out of the products
    values = [_turned(p.detach()).contiguous().requires_grad_() for p in parameters.values()]

    def state() -> dict[str, Tensor]:
        return {name: _turned(value) for name, value in zip(parameters, values, strict=True)}

    def losses(state: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return vmap(lambda p, a, b: loss(functional_call(base, p, (a,)), b))(state, x, y).sum()

    optimizer = _optimizer(values, schedule)
    if buffers:
        raise ValueError(f"networks with buffers ({', '.join(buffers)}) cannot be trained together.")
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    count = len(data[0].x)
    for epoch in tqdm(range(schedule.epochs), desc=name, disable=None, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * (1 + math.cos(math.pi * epoch / schedule.epochs)) / 2
        permutations = [torch.randperm(count, generator=order) for order in orders]
        for start in range(0, count, schedule.batch):
            rows = [permutation[start : start + schedule.batch] for permutation in permutations]
            x, y = _gathered([d.x for d in data], rows), _gathered([d.y for d in data], rows)
            gradients = torch.autograd.grad(losses(state(), x, y), values)
            norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
            scale = (1 / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp(max=1)
            if scale.min() < 1:
                gradients = tuple(g * scale.view(-1, *[1] * (g.ndim - 1)) for g in gradients)
            for p, g in zip(values, gradients, strict=True):
                p.grad = g.contiguous()  # the fused step takes no other layout
            optimizer.step()
        if epoch + 1 == schedule.epochs // 2:
            found["mid"] = _unstack(networks, state())
    found["final"] = _unstack(networks, state())
    return found


def train_alone(
    network: nn.Module,
    data: Data,
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    seed: int,
    name: str = "",
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> dict[str, nn.Module]:
    """As :func:`train`, one network alone: for networks with buffers (batch-norm, spectral norm)."""
    found = {"init": copy.deepcopy(network).eval()}
    if not schedule.epochs:
        return found
    values = [p for p in network.parameters() if p.requires_grad]
    optimizer = _optimizer(values, schedule)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=schedule.epochs)
    order = torch.Generator().manual_seed(seed)
    network.train()
    for epoch in tqdm(range(schedule.epochs), desc=name, disable=None, leave=False):
        for rows in torch.randperm(len(data.x), generator=order).split(schedule.batch):
            x = data.x[rows] if augment is None else augment(data.x[rows], order)
            optimizer.zero_grad()
            loss(network(x), data.y[rows]).backward()
            nn.utils.clip_grad_norm_(values, 1.0)
            optimizer.step()
        decay.step()
        if epoch + 1 == schedule.epochs // 2:
            found["mid"] = copy.deepcopy(network).eval()
    found["final"] = copy.deepcopy(network).eval()
    return found


def _optimizer(values: Sequence[Tensor], schedule: Schedule) -> torch.optim.Optimizer:
    decay = schedule.weight_decay
    if schedule.adam:
        return torch.optim.Adam(values, lr=schedule.lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(values, lr=schedule.lr, momentum=0.9, weight_decay=decay, fused=True)


def _turned(stacked: Tensor) -> Tensor:
    return stacked.mT if stacked.ndim == 3 else stacked


def _gathered(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """``torch.stack([part[r] …])`` without the copy that stacking makes."""
    result = parts[0].new_empty(len(parts), len(rows[0]), *parts[0].shape[1:])
    for i, (part, r) in enumerate(zip(parts, rows, strict=True)):
        torch.index_select(part, 0, r, out=result[i])
    return result


def _unstack(networks: Sequence[nn.Module], parameters: Mapping[str, Tensor]) -> list[nn.Module]:
    taken = []
    for i, network in enumerate(networks):
        clone = copy.deepcopy(network)
        clone.load_state_dict({name: stacked[i].detach() for name, stacked in parameters.items()})
        taken.append(clone.eval())
    return taken
