"""Hessian blocks by double back-propagation through additive injections: nothing here knows the block recursion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Blocks = dict[tuple[str, str], Tensor]


@dataclass
class Oracle:
    """Joint blocks ``(B, d_v, B, d_w)`` by pairs of node names: of L, and the Gauss-Newton part by J^T (d²ℓ) J."""

    total: Blocks
    gn: Blocks

    def per_sample(self, part: str) -> Blocks:
        """Blocks ``(B, d_v, d_w)``; fails if samples are coupled, so that a test cannot use it by mistake."""
        blocks = {}
        for pair, joint in getattr(self, part).items():
            own = torch.einsum("bvbw->bvw", joint)
            assert torch.equal(joint, torch.einsum("bvw,bc->bvcw", own, torch.eye(len(own), dtype=own.dtype)))
            blocks[pair] = own
        return blocks


def double_backprop(
    model: nn.Module, inputs: Any, loss_fn: Callable[[Tensor], Tensor], names: Sequence[str], output: str | None = None
) -> Oracle:
    """Blocks between the outputs of the named modules (``"fc@1"``: second call) and, as ``output``, the model's own."""
    injections: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    wanted = {name.split("@")[0] for name in names}

    def hook_for(name: str) -> Callable[..., Tensor]:
        def inject(_module: nn.Module, _inputs: Any, value: Tensor) -> Tensor:
            call = calls.get(name, 0)
            calls[name] = call + 1
            label = f"{name}@{call}" if call else name
            injections[label] = torch.zeros_like(value, requires_grad=True)
            return value + injections[label]

        return inject

    handles = [m.register_forward_hook(hook_for(n)) for n, m in model.named_modules() if n in wanted]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    for handle in handles:
        handle.remove()
    if output is not None:
        injections[output] = torch.zeros_like(z, requires_grad=True)
        z = z + injections[output]
    sources = [injections[name] for name in [*names, *([output] if output else [])]]
    labels = [*names, *([output] if output else [])]

    gradients = torch.autograd.grad(loss_fn(z), sources, create_graph=True, allow_unused=True)
    total = {}
    for v, e, gradient in zip(labels, sources, gradients, strict=True):
        rows = _rows(gradient, e, sources)
        total |= {(v, w): row for w, row in zip(labels, rows, strict=True)}

    free = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(free), [free], create_graph=True)
    curvature = _rows(slope, free, [free])[0].reshape(free.numel(), free.numel())
    jacobians = {name: row.reshape(z.numel(), -1) for name, row in zip(labels, _rows(z, free, sources), strict=True)}
    shapes = {name: (e.shape[0], e[0].numel()) for name, e in zip(labels, sources, strict=True)}
    gn = {
        (v, w): (jacobians[v].T @ curvature @ jacobians[w]).reshape(*shapes[v], *shapes[w])
        for v in labels
        for w in labels
    }
    return Oracle(total, gn)


def _rows(value: Tensor | None, like: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """The Jacobian of ``value`` (shaped like ``like``) by each source, ``(B, d, B', d')``, entry by entry."""

    def empty(e: Tensor) -> Tensor:
        return torch.zeros(like.numel(), *e.shape, dtype=e.dtype)

    rows = [empty(e) for e in sources]
    if value is not None and value.requires_grad:
        for i, entry in enumerate(value.reshape(-1)):
            grads = torch.autograd.grad(entry, sources, retain_graph=True, allow_unused=True)
            for row, grad in zip(rows, grads, strict=True):
                if grad is not None:
                    row[i] = grad
    return [
        row.reshape(like.shape[0], like[0].numel(), e.shape[0], e[0].numel())
        for row, e in zip(rows, sources, strict=True)
    ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, and ‖actual‖ where nothing is expected."""
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)
