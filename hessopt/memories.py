"""Experimental: what to remember of a task, for :class:`hessopt.wrappers.null_project.NullProject`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diagnostics.autograd.kernels import RandomState
from diagnostics.autograd.patches import input_rows
from diagnostics.autograd.substitution import run_model
from diagnostics.autograd.tape import batched_vjp
from diagnostics.estimators.lanczos import extreme_eigenpairs
from diagnostics.operators.curvature import HessianOperator
from diagnostics.operators.null_cones import null_cone
from hessopt.closure.loss_hessian import random_basis
from hessopt.errors import ModelError
from hessopt.network.processes import refuse_spread
from hessopt.wrappers.memory import LayerMemory, Memory, SubspaceMemory, new_directions

M = TypeVar("M", bound=Memory)


def null_memory(op: HessianOperator, k: int = 60, *, generator: torch.Generator | None = None) -> SubspaceMemory:
    """Updates stay in the isotropic span of null vectors of the old tasks' Hessian, so ``dᵀHd = 0``; all else is lost.

    Args:
        op: The Hessian on data of the tasks so far: the published method keeps their data for this.
        k: Lanczos steps from the gradient, see :func:`diagnostics.null_cone`; at most k/2 directions stay.
        generator: See there.

    Source: "Neural Null Cones", v6 (NCCL), with the isotropic half of its basis.
    """
    cone = null_cone(op, k, generator=generator)
    return SubspaceMemory(cone.basis, *_described(op), keep=True)


def hessian_top_memory(
    op: HessianOperator, k: int = 60, previous: Memory | None = None, *, max_products: int = 200
) -> SubspaceMemory:
    """Updates lose their part along the k eigenvectors of largest ``|λ|``: the directions that change the loss fastest.

    Args:
        op: The Hessian on data of the task.
        k: Directions of this task.
        previous: The memory of earlier tasks, which is extended.
        max_products: Of the Lanczos iterations; loosely converged vectors will do.
    """
    k = min(k, op.shape[0])
    pairs = extreme_eigenpairs(op, k, "magnitude", rtol=1e-2, max_products=max(max_products, k))
    return _extended(previous, pairs.vectors, *_described(op))


def ogd_memory(
    model: nn.Module, inputs: Any, targets: Tensor | None = None, previous: Memory | None = None
) -> SubspaceMemory:
    """Orthogonal gradient descent: updates lose their part along gradients of the network's outputs.

    Args:
        model: The network, with outputs ``(B, classes)``.
        inputs: One batch; memory grows by a vector a sample (by one an output without targets).
        targets: Classes, ``(B,)``: only the output of the true class is remembered (the variant OGD-GTL). None: all.
        previous: The memory of earlier tasks, which is extended.

    Source: Farajtabar, Azizan, Mott, Li, "Orthogonal gradient descent for continual learning" (2020).
    """
    named = _trained(model)
    with RandomState(named.values()).kept(), torch.enable_grad():
        z = run_model(model, inputs, {name: b.clone() for name, b in model.named_buffers()})
        z = z.gather(1, targets.unsqueeze(1)).squeeze(1) if targets is not None else z.reshape(-1)
        seeds = torch.eye(len(z), dtype=z.dtype, device=z.device)
        found = batched_vjp([z], list(named.values()), [seeds])
    rows = [
        p.new_zeros(len(z), p.numel()) if f is None else f.detach().reshape(len(z), -1)
        for p, f in zip(named.values(), found, strict=True)
    ]
    return _extended(previous, torch.cat(rows, 1).mT, list(named), [p.shape for p in named.values()])


def random_memory(model: nn.Module, k: int = 60, previous: Memory | None = None, *, seed: int = 0) -> SubspaceMemory:
    """The control: updates lose their part in a random subspace of k dimensions."""
    named = _trained(model)
    like = next(iter(named.values())).detach()
    size = sum(p.numel() for p in named.values())
    basis = random_basis(size, min(k, size), like, torch.Generator().manual_seed(seed))
    return _extended(previous, basis, list(named), [p.shape for p in named.values()])


def gpm_memory(
    model: nn.Module, inputs: Any, threshold: float | Sequence[float] = 0.97, previous: Memory | None = None
) -> LayerMemory:
    """Gradient projection memory: updates leave every layer's response to the task's typical inputs as it is.

    For each layer, R ``(d_in, n)`` are the inputs it sees (patches, for a convolution; with a 1 below each where it has
    a bias). Of their part outside the memory M, the first singular vectors are added until
    ``‖M MᵀR‖² + ‖R̂_k‖² ≥ threshold · ‖R‖²``.

    Args:
        model: Its trainable parameters must all be those of ``Linear`` and ungrouped ``Conv2d`` layers.
        inputs: One batch of samples of the task.
        threshold: One for all layers, or one each, in the order in which the layers are called.
        previous: The memory of earlier tasks, which is extended.

    Raises:
        ModelError: other layers have trainable parameters: freeze them (``requires_grad_(False)``) after the first
            task, or let their parameters go untrained.
        ValueError: a threshold is not in (0, 1], or their number is not that of the layers.

    Source: Saha, Garg, Roy, "Gradient projection memory for continual learning" (2021); biases are our addition, as
    inputs that are always 1.
    """
    named = _trained(model)
    position = {id(p): i for i, p in enumerate(named.values())}
    layers = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and id(module.weight) in position
    }
    covered = {id(p) for module in layers for p in module.parameters(recurse=False)}
    missing = [name for name, p in named.items() if id(p) not in covered]
    wrong = [n for m, n in layers.items() if isinstance(m, nn.Conv2d) and (m.groups > 1 or m.padding_mode != "zeros")]
    if missing or wrong:
        raise ModelError(
            f"gpm_memory protects Linear and plain Conv2d layers, but {', '.join(map(repr, (missing or wrong)[:5]))} "
            "is none of them: freeze it with requires_grad_(False), or use another memory."
        )
    seen: dict[nn.Module, list[Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda module, args: seen.setdefault(module, []).append(args[0].detach()))
        for m in layers
    ]
    try:
        with RandomState(named.values()).kept(), torch.no_grad():
            run_model(model, inputs, {name: b.clone() for name, b in model.named_buffers()})
    finally:
        for handle in handles:
            handle.remove()
    thresholds = [threshold] * len(seen) if isinstance(threshold, float | int) else list(threshold)
    if len(thresholds) != len(seen) or not all(0 < t <= 1 for t in thresholds):
        raise ValueError(f"threshold is a share in (0, 1], one for each of {len(seen)} layers, got {threshold!r}.")
    if previous is not None and not (isinstance(previous, LayerMemory) and previous.names == tuple(named)):
        raise ValueError("previous must be a memory that gpm_memory made for the same parameters.")
    bases = {} if previous is None else dict(previous.bases)
    for share, (module, found) in zip(thresholds, seen.items(), strict=True):
        bias = -1 if getattr(module, "bias", None) is None else position.get(id(module.bias), -1)
        r = torch.cat([input_rows(module, x) for x in found])
        r = torch.cat([r, r.new_ones(len(r), 1)], 1) if bias >= 0 else r
        key = position[id(module.weight)], bias
        old = bases.get(key, r.new_zeros(r.shape[1], 0)).to(r)
        bases[key] = torch.cat([old, _most_of(r.mT, old, float(share))], 1)
    return LayerMemory(bases, list(named), [p.shape for p in named.values()])


def _most_of(r: Tensor, old: Tensor, threshold: float) -> Tensor:
    """What to add to ``old`` so that the span holds the share ``threshold`` of ``‖R‖²``."""
    total = float(r.square().sum())
    rest = r - old @ (old.mT @ r)
    known = total - float(rest.square().sum())
    if known >= threshold * total or not total:
        return old[:, :0]
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    held = known + s.double().square().cumsum(0).cpu()
    count = min(int((held < threshold * total).sum()) + 1, len(s))
    return new_directions(old, u[:, :count])


def _extended(
    previous: Memory | None, vectors: Tensor, names: Sequence[str], shapes: Sequence[Sequence[int]]
) -> SubspaceMemory:
    if previous is None:
        return SubspaceMemory(vectors, names, shapes)
    if not isinstance(previous, SubspaceMemory) or previous.keep or previous.names != tuple(names):
        raise ValueError("previous must be a memory of directions to remove, of the same parameters.")
    return previous.extended(vectors)


def _described(op: HessianOperator) -> tuple[list[str], list[torch.Size]]:
    return list(op.space.parameters), [p.shape for p in op.space.parameters.values()]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    refuse_spread("a memory", model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ModelError("no parameter of the model requires grad, so there is nothing to protect.")
    return named
