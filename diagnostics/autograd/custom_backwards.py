"""Backward passes written outside PyTorch, held against differences: what they keep off the tape has no curvature.

The backward of a :class:`torch.autograd.Function` may use numbers that its forward pass computed and kept (the
gradient of a fused cross-entropy, the standard deviation of a fused normalisation). Autograd takes such numbers for
constants, so that second derivatives lack a part of themselves, in silence, and no tape can tell them from constants.
So where there are such functions, the network is run again with its parameters moved a little.

For one function, with its output's cotangent s held fixed, let ``g(θ)`` be the cotangents that it returns. Along a
direction v the tape says ``dg = (∂g/∂θ) v``, and so do the differences ``(g(θ + h v) − g(θ − h v)) / 2h``. An entry is
trusted where those of h and of h/2 agree: not at a kink, which at most one of them crosses or both by different
amounts, nor under rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diagnostics.autograd.tape import Function, passes_through, walk
from diagnostics.errors import DiagnosticsError

Run = Callable[[Sequence[Tensor]], tuple[Sequence[Tensor], Tensor]]
"""A run of model and loss with these parameters: the tensors of the model's output, and the loss."""


def custom_backwards(ends: Sequence[Tensor]) -> list[Function]:
    """The functions of the tapes of ``ends`` whose backward is not PyTorch's own, in the order of discovery."""
    found: dict[Function, None] = {}
    for end in ends:
        for function in walk(end.grad_fn):
            own = isinstance(function, torch.autograd.function.BackwardCFunction) or "CppNode" in function.name()
            if own:
                found[function] = None
    return list(found)


def check_custom_backwards(run: Run, parameters: Sequence[Tensor]) -> None:
    """Refuse custom backward passes whose derivative on the tape is not the one by differences; costs five runs.

    A network whose own first derivative is not the one by differences either (a straight-through estimator) has
    surrogate derivatives, and is let pass: what its second derivatives should be, only its author knows.

    Args:
        run: Called with tensors like ``parameters``, with autograd on; deterministic.
        parameters: θ.

    Raises:
        DiagnosticsError: a part of the second derivative is off the tape. Names the function.
    """
    if not any(p.is_floating_point() for p in parameters):
        return
    here = [p.detach().clone().requires_grad_(p.is_floating_point()) for p in parameters]
    direction = _direction(here)
    moving = [i for i, p in enumerate(here) if p.requires_grad]
    base = _Local.of(run(here))
    along = [direction[i] for i in moving]
    outputs_move = _jvp(base.outputs, [here[i] for i in moving], along)
    slopes_move = _jvp(base.slopes, [here[i] for i in moving], along)
    step = _STEP[torch.float64 if all(here[i].dtype == torch.float64 for i in moving) else torch.float32]
    coarse, fine = (_differences(run, here, direction, h) for h in (step, step / 2))
    if coarse is None or fine is None or not base.layout == coarse.layout == fine.layout:
        return  # control flow that depends on values: there is no derivative to compare with
    if _mismatch(coarse.outputs, fine.outputs, outputs_move):
        return
    for k, slopes in enumerate(slopes_move):
        if _mismatch([coarse.slopes[k]], [fine.slopes[k]], [slopes]):
            raise DiagnosticsError(
                f"the loss cannot be differentiated twice: the backward of {base.names_of_slopes[k]} is right, but its "
                "derivative is not the one by differences. It may use numbers that its forward pass computed and kept "
                "(a fused loss or normalisation?), which autograd takes for constants: compute them in backward from "
                "saved inputs and outputs, in differentiable operations, or use the unfused operation."
            )


class _Local(NamedTuple):
    """Of one run: the model's outputs, and what each custom backward returns for a fixed cotangent."""

    names: list[str]
    outputs: list[Tensor]
    slopes: list[Tensor]
    names_of_slopes: list[str]

    @property
    def layout(self) -> tuple[list[str], list[torch.Size]]:
        return self.names, [t.shape for t in (*self.outputs, *self.slopes)]

    @classmethod
    def of(cls, result: tuple[Sequence[Tensor], Tensor]) -> _Local:
        outputs, loss = result
        functions = custom_backwards([loss, *outputs])
        slopes: list[Tensor] = []
        owners: list[str] = []
        for function in functions:
            edges = {(f, i): GradientEdge(f, i) for f, i in function.next_functions if f is not None}
            returned = [(i, part) for i, part in enumerate(function._input_metadata) if part is not None]
            ends = [GradientEdge(function, i) for i, _ in returned]
            seeds = [_pattern(part.shape, part.dtype, part.device).requires_grad_() for _, part in returned]
            found = torch.autograd.grad(ends, list(edges.values()), seeds, create_graph=True, allow_unused=True)
            # what is off the tape as a whole, and what has no second derivative, is refused where it is needed
            kept = [s for s in found if s is not None and s.requires_grad and not passes_through(s, "DelayedError")]
            slopes += kept
            owners += [function.name()] * len(kept)
        return cls([f.name() for f in functions], list(outputs), slopes, owners)


def _differences(run: Run, here: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> _Local | None:
    """Central differences; None where the two sides are not of the same functions and shapes."""

    def moved(by: float) -> _Local:
        pairs = zip(here, direction, strict=True)
        return _Local.of(run([(p.detach() + by * v).requires_grad_(p.requires_grad) for p, v in pairs]))

    ahead, behind = moved(step), moved(-step)
    if ahead.layout != behind.layout:
        return None

    def quotient(a: Tensor, b: Tensor) -> Tensor:
        return (a.detach() - b.detach()) / (2 * step)

    return _Local(
        ahead.names,
        [quotient(a, b) for a, b in zip(ahead.outputs, behind.outputs, strict=True)],
        [quotient(a, b) for a, b in zip(ahead.slopes, behind.slopes, strict=True)],
        ahead.names_of_slopes,
    )


def _mismatch(coarse: Sequence[Tensor], fine: Sequence[Tensor], tape: Sequence[Tensor]) -> bool:
    """Whether trusted differences are not what the tape says."""
    off = total = 0.0
    for a, b, t in zip(coarse, fine, tape, strict=True):
        trusted = (a - b).abs() <= _AGREE * b.abs()
        off += float(((b - t) * trusted).square().sum())
        total += float((b * trusted).square().sum())
    return off > _OFF**2 * total


def _jvp(ends: Sequence[Tensor], inputs: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
    """The derivative of each of ``ends`` along the direction: its vector-Jacobian product, by its cotangent."""
    result = [torch.zeros_like(end) for end in ends]
    dependent = [i for i, end in enumerate(ends) if end.requires_grad]
    if not dependent:
        return result
    signals = [torch.zeros_like(ends[i]).requires_grad_() for i in dependent]
    pulled = torch.autograd.grad([ends[i] for i in dependent], inputs, signals, create_graph=True, allow_unused=True)
    linear = [(g, v) for g, v in zip(pulled, direction, strict=True) if g is not None and g.requires_grad]
    if not linear:
        return result
    moved = torch.autograd.grad([g for g, _ in linear], signals, [v for _, v in linear], allow_unused=True)
    for i, part in zip(dependent, moved, strict=True):
        if part is not None:
            result[i] = part
    return result


def _direction(parameters: Sequence[Tensor]) -> list[Tensor]:
    """A fixed direction that moves each parameter by about its size, or that of the others where it is zero."""
    sizes = [float(p.detach().square().mean()) ** 0.5 if p.requires_grad and p.numel() else 0.0 for p in parameters]
    usual = max(sizes, default=0.0) or 1.0
    return [
        _pattern(p.shape, p.dtype, p.device, shift=i).mul_(size or 0.1 * usual)
        if p.requires_grad
        else torch.zeros_like(p)
        for i, (p, size) in enumerate(zip(parameters, sizes, strict=True))
    ]


def _pattern(shape: torch.Size, dtype: torch.dtype, device: torch.device, shift: int = 0) -> Tensor:
    """Numbers that have nothing in common with the data and need no random state: cos(1), cos(2) and so on."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(1, count + 1, dtype=torch.float64) + shift).to(device, dtype).reshape(shape)


_STEP = {torch.float64: 2.0**-20, torch.float32: 2.0**-8}
"""h, where a parameter moves by about h of its size: rounding and the third derivative leave three digits or more."""
_AGREE = 0.05
"""Differences of two steps that agree to this are trusted: those across a kink differ by a factor of two."""
_OFF = 0.1
"""What trusted differences and the tape may differ by, of the norm."""
