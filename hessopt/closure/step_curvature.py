"""Products with the curvature of one evaluation of the closure, on the tape that it left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from diagnostics.autograd.second_order import check_differentiable
from diagnostics.operators.curvature_tape import Columns, JointTape, SplitTape, Tape
from diagnostics.ranks.collectives import Ranks
from hessopt.closure.backward_calls import refuse_reentrant
from hessopt.closure.protocol import Evaluation, LeastSquares
from hessopt.errors import ClosureError

COST = {"gradient": 1.0, "hessian": 2.0, "ggn": 4 / 3, "tensor": 2.0, "split": 8 / 3, "second gradient": 2 / 3}
"""Work in gradient-equivalents, by counting the matrix products of a linear layer: a forward pass has one, a backward
pass two; ``J v`` two, ``Jᵀu`` two, and the derivative of a gradient's tape six. The pass that makes another gradient
on a tape that is there is two thirds of a gradient."""
TRIAL_COST = 1 / 3
"""Work of evaluating the loss alone."""


class StepCurvature:
    """Gradient and curvature products of one evaluation, in flat vectors over the parameters.

    With the network's output z, its Jacobian J and the signal ``s = ∂ℓ/∂z``,

        H = Jᵀ ∇²ℓ J + T,    T = Σ_i s_i ∇²z_i.

    All products go over kept tapes, made when first needed: a
    :class:`~diagnostics.operators.curvature_tape.JointTape` (``H v``: one pass), and a ``SplitTape``, cut at z, for
    the two parts. Vectors are ``(P,)`` or, several together, ``(k, P)``.

    Args:
        loss: ℓ, on its tape.
        parameters: θ; each requires grad. Those that the loss does not depend on have zero rows.
        output: z, on the tape of ℓ, where ``T`` and the Gauss-Newton matrix are wanted.
        verify: Check that gradients are computed on the tape (else their curvature would be zero in silence).
        ranks: The processes that train the network, all of which ask for the same. Gradient and products are then
            means over them.

    Attributes:
        dtype: Of the vectors: that of the parameters, at least float32.
        products: Number of products by kind, a :meth:`split` being one of "ggn" and one of "tensor".
        work: Gradient-equivalents of the products and of the gradients beyond the first, see :data:`COST`.
    """

    def __init__(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        output: Tensor | None = None,
        *,
        verify: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._loss = loss
        self._parameters = list(parameters)
        self._output = output
        self._verify = verify
        self._ranks = Ranks() if ranks is None else ranks
        self._sizes = [p.numel() for p in self._parameters]
        self._names = [f"{i}, of shape {tuple(p.shape)}" for i, p in enumerate(self._parameters)]
        self.dtype = reduce(torch.promote_types, (p.dtype for p in self._parameters), torch.float32)
        self.products = {"hessian": 0, "ggn": 0, "tensor": 0}
        self.work = 0.0
        self._gradients = 0

    def gradient(self, kind: str = "hessian") -> Tensor:
        """∂ℓ/∂θ, ``(P,)``, from the tape that products of that kind use."""
        tape = self._joint if kind == "hessian" else self._split
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(tape.gradients, self._parameters, strict=True)]
        (mean,) = self._means(self._flat(parts, ()).detach())
        return mean

    def hessian(self, v: Tensor) -> Tensor:
        """``H v``."""
        self._count(v, "hessian")
        (mean,) = self._means(self._flat(self._joint.hessian(self._columns(v)), v.shape[:-1]))
        return mean

    def ggn(self, v: Tensor) -> Tensor:
        """``Jᵀ ∇²ℓ J v``."""
        self._count(v, "ggn")
        (mean,) = self._means(self._flat(self._split.gauss_newton(self._columns(v)), v.shape[:-1]))
        return mean

    def tensor(self, v: Tensor) -> Tensor:
        """``T v``."""
        self._count(v, "tensor")
        (mean,) = self._means(self._flat(self._split.tensor(self._columns(v)), v.shape[:-1]))
        return mean

    def split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """``T v`` and ``Jᵀ ∇²ℓ J v``, the first and ``J v`` in one pass."""
        self._count(v, "split")
        columns = self._columns(v)
        tensor, moved = self._split.tensor_and_jvp(columns)
        gauss_newton = self._split.gauss_newton(columns, moved)
        tensor_part, gn_part = self._means(*(self._flat(part, v.shape[:-1]) for part in (tensor, gauss_newton)))
        return tensor_part, gn_part

    @cached_property
    def _joint(self) -> JointTape:
        """The gradient through network and loss together."""
        self._new_gradient()
        tape = JointTape(self._loss, self._parameters, self._names, verify=self._verify)
        self._check_reached(tape, self._loss)
        return tape

    @cached_property
    def _split(self) -> SplitTape:
        """The gradient cut at the output."""
        if self._output is None:
            raise ClosureError("the Gauss-Newton matrix needs the network's output.")
        self._new_gradient()
        if self._verify:
            check_differentiable(self._loss, [self._output], ["the output"])
        tape = SplitTape(self._loss, self._parameters, self._names, [self._output], verify=self._verify)
        self._check_reached(tape, self._output)
        return tape

    def _means(self, *own: Tensor) -> tuple[Tensor, ...]:
        self._ranks.mean_(own)
        return own

    def _check_reached(self, tape: Tape, end: Tensor) -> None:
        if self._verify and any(part is None for part in tape.gradients):
            refuse_reentrant(end)

    def _columns(self, v: Tensor) -> Columns:
        """The vectors in parts ``(k, *shape)``; k = 1 for one vector."""
        count = len(v) if v.ndim > 1 else 1
        parts = zip(v.split(self._sizes, dim=-1), self._parameters, strict=True)
        return [_as(part.reshape(count, *p.shape), p.dtype) for part, p in parts]

    def _flat(self, parts: Sequence[Tensor], lead: Sequence[int]) -> Tensor:
        """Parts ``(*lead, *shape)`` or ``(1, *shape)`` as vectors ``(*lead, P)``."""
        rows = [_as(part, self.dtype).reshape(*lead, size) for part, size in zip(parts, self._sizes, strict=True)]
        return torch.cat(rows, dim=-1)

    def _count(self, v: Tensor, kind: str) -> None:
        count = 1 if v.ndim == 1 else len(v)
        self.work += count * COST[kind]
        for name in ("ggn", "tensor") if kind == "split" else (kind,):
            self.products[name] += count

    def _new_gradient(self) -> None:
        self.work += COST["second gradient"] if self._gradients else 0.0
        self._gradients += 1


def _as(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part if part.dtype is dtype else part.to(dtype)  # a call for each part is felt in small networks


def output_of(evaluation: Evaluation, parameters: Sequence[Tensor], *, known: bool) -> Tensor:
    """The tensor that the loss of a closure is a function of, by the parameters.

    Args:
        evaluation: One run of the closure.
        parameters: θ.
        known: The optimizer knows the network, so the output may be the network's.

    Raises:
        ClosureError: there is no such tensor.
    """
    way_out = (
        "Let the closure return `(loss, output)`, with the tensor that the loss is computed from, or "
        "`hessopt.LeastSquares(residuals)`"
    )
    if not known and not isinstance(evaluation.result, tuple | LeastSquares):
        raise ClosureError(
            f"the optimizer was given no module, so the output is not known. {way_out}; or pass the module as model=."
        )
    output = evaluation.output
    if not output.requires_grad:
        raise ClosureError(f"the output is detached from the parameters. {way_out}.")
    around = bypassed(evaluation.loss, output, parameters)
    if around:
        shape = tuple(parameters[around[0]].shape)
        raise ClosureError(
            f"the loss depends on parameter {around[0]} (of shape {shape}) other than through the output. For a "
            f"penalty on the parameters use weight_decay=. {way_out}."
        )
    return output


def bypassed(loss: Tensor, output: Tensor, parameters: Sequence[Tensor]) -> list[int]:
    """Positions of the parameters that ``loss`` reaches other than through ``output``, by walking the tape."""
    position = {id(p): i for i, p in enumerate(parameters)}
    end = (output.grad_fn, output.output_nr)
    start = (loss.grad_fn, loss.output_nr)
    found: set[int] = set()
    seen = {start}
    stack = [] if start == end else [start]
    while stack:
        function, _ = stack.pop()
        if function is None:
            continue
        leaf = getattr(function, "variable", None)
        if leaf is not None and id(leaf) in position:
            found.add(position[id(leaf)])
        for edge in function.next_functions:
            if edge not in seen and edge != end:
                seen.add(edge)
                stack.append(edge)
    return sorted(found)
