"""Products with the curvature of one evaluation of the closure, on the tape that it left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from diagnostics.autograd.second_order import check_on_tape, refuse_sparse, second_order_errors
from diagnostics.autograd.tape import batched_vjp
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

    All products go over kept tapes: that of the gradient (``H v``: one pass), and that of ``Jᵀ s`` with s cut off from
    z, made when first needed, which is linear in s: its derivative in direction v is ``J v`` by s and ``T v`` by θ.
    Vectors are ``(P,)`` or, several together, ``(k, P)``.

    Args:
        loss: ℓ, on its tape.
        parameters: θ; each requires grad. Those that the loss does not depend on have zero rows.
        output: z, on the tape of ℓ, where ``T`` and the Gauss-Newton matrix are wanted.
        verify: Check that gradients are computed on the tape (else their curvature would be zero in silence).

    Attributes:
        dtype: Of the vectors: that of the parameters, at least float32.
        products: Number of products by kind, a :meth:`split` being one of "ggn" and one of "tensor".
        work: Gradient-equivalents of the products and of the gradients beyond the first, see :data:`COST`.
    """

    def __init__(
        self, loss: Tensor, parameters: Sequence[Tensor], output: Tensor | None = None, *, verify: bool = False
    ) -> None:
        self._loss = loss
        self._parameters = list(parameters)
        self._output = output
        self._verify = verify
        self._sizes = [p.numel() for p in self._parameters]
        self._names = [f"{i}, of shape {tuple(p.shape)}" for i, p in enumerate(self._parameters)]
        self.dtype = reduce(torch.promote_types, (p.dtype for p in self._parameters), torch.float32)
        self.products = {"hessian": 0, "ggn": 0, "tensor": 0}
        self.work = 0.0
        self._gradients = 0

    def gradient(self, kind: str = "hessian") -> Tensor:
        """∂ℓ/∂θ, ``(P,)``, from the tape that products of that kind use."""
        tape = self._joint if kind == "hessian" else self._split[0]
        return self._flat(list(tape)).detach()

    def hessian(self, v: Tensor) -> Tensor:
        """``H v``."""
        self._count(v, "hessian")
        return self._flat(self._vjp(self._joint, self._parameters, self._parts(v), v.ndim > 1), v)

    def ggn(self, v: Tensor) -> Tensor:
        """``Jᵀ ∇²ℓ J v``."""
        self._count(v, "ggn")
        gradients, signal, _ = self._split
        (moved,) = self._vjp(gradients, [signal], self._parts(v), v.ndim > 1)
        return self._through_loss(moved, v)

    def tensor(self, v: Tensor) -> Tensor:
        """``T v``."""
        self._count(v, "tensor")
        return self._flat(self._vjp(self._split[0], self._parameters, self._parts(v), v.ndim > 1), v)

    def split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """``T v`` and ``Jᵀ ∇²ℓ J v``, the first and ``J v`` in one pass."""
        self._count(v, "split")
        gradients, signal, _ = self._split
        *parts, moved = self._vjp(gradients, [*self._parameters, signal], self._parts(v), v.ndim > 1)
        return self._flat(parts, v), self._through_loss(moved, v)

    @cached_property
    def _joint(self) -> tuple[Tensor | None, ...]:
        """The gradient through network and loss together."""
        self._new_gradient()
        with second_order_errors():
            if self._verify:
                # On a tape of its own: the kept one should not pay for the seed at every product.
                seed = torch.ones_like(self._loss).requires_grad_()
                seeded = torch.autograd.grad(self._loss, self._parameters, seed, create_graph=True, allow_unused=True)
                check_on_tape(seeded, [seed], self._names)
            found = torch.autograd.grad(self._loss, self._parameters, create_graph=True, allow_unused=True)
        refuse_sparse(found, self._names)
        if self._verify and any(part is None for part in found):
            refuse_reentrant(self._loss)
        return found

    @cached_property
    def _split(self) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor]:
        """``Jᵀ s`` on a tape with s, s as its leaf, and s as a function of z."""
        if self._output is None:
            raise ClosureError("the Gauss-Newton matrix needs the network's output.")
        self._new_gradient()
        with second_order_errors():
            if self._verify:
                seed = torch.ones_like(self._loss).requires_grad_()
                seeded = torch.autograd.grad(self._loss, [self._output], seed, create_graph=True)
                check_on_tape(seeded, [seed], ["the output"])
            (slope,) = torch.autograd.grad(self._loss, [self._output], create_graph=True)
            signal = slope.detach().clone().requires_grad_()
            found = torch.autograd.grad(
                [self._output], self._parameters, [signal], create_graph=True, allow_unused=True
            )
        refuse_sparse(found, self._names)
        if self._verify:
            if any(part is None for part in found):
                refuse_reentrant(self._output)
            check_on_tape(found, [signal], self._names)
        return found, signal, slope

    def _through_loss(self, moved: Tensor, v: Tensor) -> Tensor:
        """``Jᵀ ∇²ℓ u``."""
        _, _, slope = self._split
        assert self._output is not None
        (bent,) = self._vjp([slope], [self._output], [moved], v.ndim > 1)
        return self._flat(self._vjp([self._output], self._parameters, [bent], v.ndim > 1), v)

    def _vjp(
        self,
        outputs: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        batched: bool,
    ) -> list[Tensor]:
        """Vector-Jacobian products; zeros where there is no dependence."""
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        with second_order_errors():
            if pairs and batched:
                found = batched_vjp([o for o, _ in pairs], inputs, [c for _, c in pairs])
            elif pairs:
                found = torch.autograd.grad(
                    [o for o, _ in pairs], inputs, [c for _, c in pairs], retain_graph=True, allow_unused=True
                )
        lead = (len(cotangents[0]),) if batched else ()
        return [t.new_zeros((*lead, *t.shape)) if f is None else f for t, f in zip(inputs, found, strict=True)]

    def _parts(self, v: Tensor) -> list[Tensor]:
        return [
            part.reshape(v.shape[:-1] + p.shape).to(p.dtype)
            for part, p in zip(v.split(self._sizes, dim=-1), self._parameters, strict=True)
        ]

    def _flat(self, parts: Sequence[Tensor | None], like: Tensor | None = None) -> Tensor:
        lead = () if like is None else like.shape[:-1]
        return torch.cat(
            [
                p.new_zeros(*lead, p.numel(), dtype=self.dtype)
                if part is None
                else part.reshape(*lead, p.numel()).to(self.dtype)
                for part, p in zip(parts, self._parameters, strict=True)
            ],
            dim=-1,
        )

    def _count(self, v: Tensor, kind: str) -> None:
        count = 1 if v.ndim == 1 else len(v)
        self.work += count * COST[kind]
        for name in ("ggn", "tensor") if kind == "split" else (kind,):
            self.products[name] += count

    def _new_gradient(self) -> None:
        self.work += COST["second gradient"] if self._gradients else 0.0
        self._gradients += 1


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
