"""Hessian blocks by double back-propagation through additive injections: nothing here knows the block recursion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import diagnostics
from diagnostics import BlockMatrix

Blocks = dict[tuple[str, str], Tensor]


@dataclass
class Oracle:
    """Joint blocks ``(B, d_v, B, d_w)`` by pairs of node names: of L, and the Gauss-Newton part by J^T (d²ℓ) J.

    Of :func:`joint_double_backprop` they are matrices.
    """

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
    wanted = [*names, *([output] if output is not None else [])]
    flat, shapes = _differentiate(model, inputs, loss_fn, wanted)
    sizes = {v: (shapes[v][0], shapes[v][1:].numel()) for v in wanted}
    return Oracle(*({(v, w): block.reshape(*sizes[v], *sizes[w]) for (v, w), block in p.items()} for p in flat))


def joint_double_backprop(
    model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], names: Sequence[str]
) -> Oracle:
    """Blocks ``(numel_v, numel_w)`` between tensors of any shape, joint over the samples.

    ``"m[0]"`` is one tensor of a module that returns several; a name that is no module's is the model's output.
    """
    flat, _ = _differentiate(model, inputs, loss_fn, names)
    return Oracle(*flat)


def _differentiate(
    model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], wanted: Sequence[str]
) -> tuple[tuple[Blocks, Blocks], dict[str, torch.Size]]:
    """Total and Gauss-Newton blocks ``(numel_v, numel_w)`` between the ``wanted`` tensors, and their shapes."""
    injections: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    stems = {name.split("[")[0].split("@")[0] for name in wanted}
    modules = {name: module for name, module in model.named_modules() if name in stems}

    def inject(label: str, value: Any) -> Any:
        leaves, spec = tree_flatten(value)
        floating = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        for i in floating:
            name = label if len(floating) == 1 else f"{label}[{i}]"
            injections[name] = torch.zeros_like(leaves[i], requires_grad=True)
            leaves[i] = leaves[i] + injections[name]
        return tree_unflatten(leaves, spec)

    def hook_for(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, value: Any) -> Any:
            call = calls.get(name, 0)
            calls[name] = call + 1
            return inject(f"{name}@{call}" if call else name, value)

        return hook

    handles = [m.register_forward_hook(hook_for(n)) for n, m in modules.items()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    for handle in handles:
        handle.remove()
    for output in stems - modules.keys():
        z = inject(output, z)
    sources = [injections[name] for name in wanted]

    leaves, spec = tree_flatten(z)
    outputs = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    flat = torch.cat([t.reshape(-1) for t in outputs])  # before the loss, which may work in place
    state = torch.get_rng_state()
    gradients = torch.autograd.grad(loss_fn(z), sources, create_graph=True, allow_unused=True)
    total = {}
    for v, e, gradient in zip(wanted, sources, gradients, strict=True):
        rows = _rows(gradient, e.numel(), sources)
        total |= {(v, w): row for w, row in zip(wanted, rows, strict=True)}

    free = flat.detach().requires_grad_()
    pieces = iter(free.split([t.numel() for t in outputs]))
    leaves = [next(pieces).view_as(t).clone() if any(t is o for o in outputs) else t for t in leaves]
    torch.set_rng_state(state)  # a loss with noise draws the same again
    (slope,) = torch.autograd.grad(loss_fn(tree_unflatten(leaves, spec)), [free], create_graph=True)
    (curvature,) = _rows(slope, len(free), [free])
    jacobians = dict(zip(wanted, _rows(flat, len(free), sources), strict=True))
    gn = {(v, w): jacobians[v].T @ curvature @ jacobians[w] for v in wanted for w in wanted}
    return (total, gn), {name: e.shape for name, e in zip(wanted, sources, strict=True)}


def _rows(value: Tensor | None, count: int, sources: Sequence[Tensor]) -> list[Tensor]:
    """The Jacobian of ``value``, which has ``count`` entries, by each source, ``(count, d)``, entry by entry."""
    rows = [torch.zeros(count, e.numel(), dtype=e.dtype) for e in sources]
    if value is not None and value.requires_grad:
        for i, entry in enumerate(value.reshape(-1)):
            grads = torch.autograd.grad(entry, sources, retain_graph=True, allow_unused=True)
            for row, grad in zip(rows, grads, strict=True):
                if grad is not None:
                    row[i] = grad.reshape(-1)
    return rows


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, and ‖actual‖ where nothing is expected."""
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)


def joint_error(blocks: BlockMatrix, expected: Blocks) -> float:
    """Largest ‖actual − expected‖ of all pairs, relative to the pair's norm but for blocks near zero.

    ``expected`` is joint; blocks of independent samples are put on its diagonal.
    """
    floor = 1e-3 * max(block.norm().item() for block in expected.values())
    return max(
        ((torch.block_diag(*blocks[pair]) - block).norm() / (block.norm() + floor)).item()
        for pair, block in expected.items()
    )


def check_against_double_backprop(
    model: nn.Module, inputs: Any, loss_fn: Callable[[Any], Tensor], nodes: Any = None, tolerance: float = 1e-12
) -> diagnostics.Graph:
    """Capture and compare all blocks, total and Gauss-Newton; both runs draw the same random numbers."""
    state = torch.get_rng_state()
    graph = diagnostics.capture(model, inputs, loss_fn, nodes)
    assert torch.equal(torch.get_rng_state(), state)
    blocks = diagnostics.hessian_blocks(graph)
    oracle = joint_double_backprop(model, inputs, loss_fn, [node.name for node in graph.nodes])
    torch.set_rng_state(state)
    assert joint_error(blocks.total, oracle.total) < tolerance
    assert joint_error(blocks.gn, oracle.gn) < tolerance
    return graph
