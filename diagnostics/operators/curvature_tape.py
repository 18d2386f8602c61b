"""The autograd tape of a batch's gradient, and the products with curvature that it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.autograd.second_order import check_differentiable, check_on_tape, refuse_sparse, second_order_errors
from diagnostics.autograd.tape import CHUNK_BYTES, batched_vjp
from diagnostics.autograd.trees import flatten
from diagnostics.errors import CaptureError
from diagnostics.operators.data import Batch
from diagnostics.operators.parameter_space import ParameterSpace
from diagnostics.operators.replay import Replay

if TYPE_CHECKING:
    from typing_extensions import Self

Columns = list[Tensor]
"""k vectors in parts of the shapes of some tensors: ``(k, *shape)`` for each."""


class Tape(ABC):
    """The gradient of a loss, on a tape of its own.

    Args:
        loss: ℓ, without dimensions, on its tape.
        parameters: θ; each requires grad.
        names: What to call them in errors.
        made_bytes: Bytes of the tensors that the forward pass made; decides with those of the parameters how many
            columns are taken together, see :meth:`vjps`.
        size: Samples in the batch.

    Attributes:
        loss: ℓ, without a tape.
        gradients: ∂ℓ/∂θ for each parameter, on the tape; None where there is none.
        column_bytes: What one column of a product touches.
    """

    gradients: Sequence[Tensor | None]

    def __init__(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        *,
        made_bytes: int = 0,
        size: int = 1,
    ) -> None:
        self.loss = loss.detach()
        self.size = size
        self._parameters = list(parameters)
        self._names = names
        self.column_bytes = made_bytes + sum(p.numel() * p.element_size() for p in self._parameters)

    @classmethod
    @abstractmethod
    def of_batch(cls, replay: Replay, batch: Batch, space: ParameterSpace) -> Self:
        """The tape of the loss of one batch, by the parameters of ``space``.

        Raises:
            CaptureError: the loss cannot be differentiated twice, or does not depend on the output.
        """

    @abstractmethod
    def gradient(self) -> Tensor:
        """∂ℓ/∂θ, ``(P,)``, without a tape."""

    def vjps(self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Columns:
        """Products of k cotangents with the Jacobian of ``outputs`` by ``inputs``; zeros where there is none.

        Columns are taken together, by ``torch.vmap``, where there are at least :data:`TOGETHER_COLUMNS` and what one
        of them touches (the tensors of the forward pass and the parameters) is at most :data:`TOGETHER_BYTES`;
        :data:`CHUNK_BYTES` of them at a time. Otherwise they are taken one after another over the same tape. For small
        tensors the time goes into calling operations; for large ones vectorising saves none of the work and leaves the
        caches (one CPU core, 16 columns, MLPs, convolutional networks and transformers: together is 1.2 to 3.2 times
        faster below 1.3 MiB, level at 1.6 MiB and 2 times slower at 14 MiB).
        """
        count = len(cotangents[0])
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad]
        if not pairs or count == 0:
            return [t.new_zeros(count, *t.shape) for t in inputs]
        ends, seeds = [o for o, _ in pairs], [c for _, c in pairs]
        with second_order_errors():
            if count >= TOGETHER_COLUMNS and self.column_bytes <= _together_bytes(ends[0].device):
                step = max(TOGETHER_COLUMNS, CHUNK_BYTES // max(self.column_bytes, 1))
                chunks = [
                    batched_vjp(ends, inputs, [seed[start : start + step] for seed in seeds])
                    for start in range(0, count, step)
                ]
                return [_joined(parts, t, count) for t, parts in zip(inputs, zip(*chunks, strict=True), strict=True)]
            return _one_by_one(ends, inputs, seeds)


class JointTape(Tape):
    """The gradient through network and loss together: one backward pass over it is a product with H.

    Args:
        loss, parameters, names, made_bytes, size: See :class:`Tape`.
        verify: Refuse gradients that are computed off the tape, whose curvature would be zero in silence.
    """

    def __init__(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        *,
        verify: bool = True,
        made_bytes: int = 0,
        size: int = 1,
    ) -> None:
        super().__init__(loss, parameters, names, made_bytes=made_bytes, size=size)
        with second_order_errors():
            if verify:
                check_differentiable(loss, self._parameters, self._names)
            self.gradients = torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True)
        refuse_sparse(self.gradients, self._names)

    @classmethod
    def of_batch(cls, replay: Replay, batch: Batch, space: ParameterSpace) -> Self:
        """The tape of one batch, verified if it is the first of ``replay``."""
        parameters = space.parameters
        with replay.recording(), second_order_errors():
            loss = replay.loss(replay.output(batch), batch)
            tape = cls(
                loss, list(parameters.values()), list(parameters),
                verify=not replay.verified, made_bytes=replay.made_bytes, size=batch.size,
            )  # fmt: skip
        replay.check_custom_backwards(batch, [loss])
        replay.verified = True
        return tape

    def gradient(self) -> Tensor:
        """∂ℓ/∂θ, ``(P,)``, without a tape."""
        return _flat(self.gradients, self._parameters)

    def hessian(self, v: Columns) -> Columns:
        """``H v``."""
        return self.vjps(self.gradients, self._parameters, v)


class SplitTape(Tape):
    """The gradient with the loss cut from the network at the output z, which takes H apart.

    With the signal s = ∂ℓ/∂z as an independent variable, the tape of ``Jᵀ s`` is linear in s: its derivative in
    direction v is ``J v`` by s (a vector-Jacobian product, differentiated once more by its cotangent, gives a
    Jacobian-vector product) and ``Σ_i s_i ∇²z_i v``, the tensor part, by θ, in one backward pass.

    Args:
        loss, parameters, names, made_bytes, size: See :class:`Tape`.
        outputs: z on the network's tape: the tensors of the model's output that need grad.
        cut: z as the loss sees it, where these are leaves of their own, so that the loss may depend on θ directly too.
            None: the loss is on the tape of ``outputs`` and depends on θ through them alone.
        verify: Refuse ``Jᵀ s`` that is computed off the tape.

    Attributes:
        outputs: See above.
        cut: z as the loss sees it.
        slopes: ∂ℓ/∂z on the loss's tape; None where the loss does not depend on that tensor.
        output_metric: A map of vectors like z, to stand in the place of ``∇²_z ℓ``.
        loss_at: ℓ of tensors like z, where the model and its batch are known; None otherwise.
        recording: The context in which that is to be run.

    Raises:
        CaptureError: the loss does not depend on the output, or a gradient is sparse.
        DiagnosticsError: an operation has no second derivative.
    """

    output_metric: Callable[[Columns], Columns] | None = None
    loss_at: Callable[[Sequence[Tensor]], Tensor] | None = None
    recording: Callable[[], AbstractContextManager[None]]

    def __init__(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        outputs: Sequence[Tensor],
        cut: Sequence[Tensor] | None = None,
        *,
        verify: bool = True,
        made_bytes: int = 0,
        size: int = 1,
    ) -> None:
        super().__init__(loss, parameters, names, made_bytes=made_bytes, size=size)
        self.outputs = list(outputs)
        self.cut = self.outputs if cut is None else list(cut)
        ends = [*self.cut, *(() if cut is None else self._parameters)]
        with second_order_errors():
            slopes = torch.autograd.grad(loss, ends, create_graph=True, allow_unused=True)
            if all(slope is None for slope in slopes):
                raise CaptureError("the loss does not depend on the model's output: loss_fn must use its argument z.")
            self.slopes = list(slopes[: len(self.cut)])
            self._direct = [None] * len(self._parameters) if cut is None else list(slopes[len(self.cut) :])
            refuse_sparse(self._direct, self._names)
            self._signals = [
                torch.zeros_like(t).requires_grad_() if s is None else s.detach().clone().requires_grad_()
                for s, t in zip(self.slopes, self.cut, strict=True)
            ]
            self.gradients = torch.autograd.grad(
                self.outputs, self._parameters, self._signals, create_graph=True, allow_unused=True
            )
        refuse_sparse(self.gradients, self._names)
        if verify:
            check_on_tape(self.gradients, self._signals, self._names)

    @classmethod
    def of_batch(cls, replay: Replay, batch: Batch, space: ParameterSpace) -> Self:
        """The tape of one batch; z are the floating-point tensors of the model's output that need grad."""
        parameters = space.parameters
        with replay.recording(), second_order_errors():
            z = replay.output(batch)
            leaves, rebuild = flatten(z)
            where = [
                i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad
            ]
            outputs = [leaves[i] for i in where]
            cut = [t.detach().requires_grad_() for t in outputs]

            def loss_at(values: Sequence[Tensor]) -> Tensor:
                parts = list(leaves)
                for i, value in zip(where, values, strict=True):
                    parts[i] = value.clone()  # the loss may work in place
                return replay.loss(rebuild(parts), batch)

            loss = loss_at(cut)
            tape = cls(
                loss, list(parameters.values()), list(parameters), outputs, cut,
                made_bytes=replay.made_bytes, size=batch.size,
            )  # fmt: skip
        replay.check_custom_backwards(batch, [loss, *outputs])
        tape.loss_at, tape.recording = loss_at, replay.recording
        return tape

    def gradient(self) -> Tensor:
        """∂ℓ/∂θ, ``(P,)``, without a tape."""
        return _flat(self.gradients, self._parameters) + _flat(self._direct, self._parameters)

    def jvp(self, v: Columns) -> Columns:
        """``J v``: how z moves with the parameters."""
        return self.vjps(self.gradients, self._signals, v)

    def pull_back(self, u: Columns) -> Columns:
        """``Jᵀ u``."""
        return self.vjps(self.outputs, self._parameters, u)

    def used_outputs(self) -> list[Tensor]:
        """Those tensors of z that the loss depends on."""
        return [z for z, slope in zip(self.outputs, self.slopes, strict=True) if slope is not None]

    def on_used(self, metric: Callable[[Columns], Columns]) -> Callable[[Columns], Columns]:
        """A map of vectors like :meth:`used_outputs`, as one of vectors like all of z; zero on the rest."""
        used = [slope is not None for slope in self.slopes]  # not self: a tape must die with its operator

        def padded(u: Columns) -> Columns:
            found = iter(metric([part for part, own in zip(u, used, strict=True) if own]))
            return [next(found) if own else torch.zeros_like(part) for part, own in zip(u, used, strict=True)]

        return padded

    def loss_curvature_at(self, point: Tensor, u: Tensor) -> Tensor:
        """``∇²_z ℓ u`` at another value of the one output that the loss uses, for vectors ``(k, *point.shape)``.

        Raises:
            ValueError: the tape is not one :meth:`of_batch`, so that the loss cannot be evaluated again.
        """
        if self.loss_at is None:
            raise ValueError("the loss at another output is known of a tape made by of_batch only.")
        free = [c if slope is None else point.detach() for c, slope in zip(self.cut, self.slopes, strict=True)]
        where = next(i for i, slope in enumerate(self.slopes) if slope is not None)
        free[where].requires_grad_()
        with self.recording(), second_order_errors():
            (slope,) = torch.autograd.grad(self.loss_at(free), [free[where]], create_graph=True)
            return self.vjps([slope], [free[where]], [u])[0]

    def output_hessian(self, u: Columns) -> Columns:
        """``∇²_z ℓ u``, parameters that the loss depends on directly held fixed."""
        return self.vjps(self.slopes, self.cut, u)

    def tensor(self, v: Columns) -> Columns:
        """``Σ_i s_i ∇²z_i v``, the part of H that the network's own curvature makes."""
        return self.vjps(self.gradients, self._parameters, v)

    def tensor_and_jvp(self, v: Columns) -> tuple[Columns, Columns]:
        """:meth:`tensor` and :meth:`jvp` of the same vectors, in one pass."""
        both = self.vjps(self.gradients, [*self._parameters, *self._signals], v)
        return both[: len(v)], both[len(v) :]

    def gauss_newton(self, v: Columns, moved: Columns | None = None) -> Columns:
        """``(J; I)ᵀ ∇²ℓ(z, θ) (J; I) v``; ``moved`` is J v where that is known."""
        moved = self.jvp(v) if moved is None else moved
        if all(slope is None for slope in self._direct):
            return self.pull_back(self.output_hessian(moved))
        ends = [*self.cut, *self._parameters]
        bent = self.vjps([*self.slopes, *self._direct], ends, [*moved, *v])
        through = self.pull_back(bent[: len(self.cut)])
        return [a + b for a, b in zip(through, bent[len(self.cut) :], strict=True)]


TOGETHER_COLUMNS = 4
"""Least number of columns that are taken together."""
TOGETHER_BYTES = {"cpu": 3 * 2**19, "cuda": 2**26}
"""What one column may touch where columns are taken together, by device type. (On CUDA a guess, not measured.)"""


def _together_bytes(device: torch.device) -> int:
    return TOGETHER_BYTES.get(device.type, TOGETHER_BYTES["cpu"])


def _joined(parts: Sequence[Tensor | None], like: Tensor, count: int) -> Tensor:
    known = [part for part in parts if part is not None]
    if not known:
        return like.new_zeros(count, *like.shape)
    return known[0] if len(known) == 1 else torch.cat(known)


def _one_by_one(outputs: list[Tensor], inputs: Sequence[Tensor], cotangents: list[Tensor]) -> Columns:
    count = len(cotangents[0])
    found: Columns = []
    for column in range(count):
        seeds = [c.select(0, column) for c in cotangents]
        grads = torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]
        if count == 1:
            return [part.unsqueeze(0) for part in parts]
        found = found or [part.new_empty(count, *part.shape) for part in parts]
        for rows, part in zip(found, parts, strict=True):
            rows[column] = part
    return found


def _flat(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    parts = [p.new_zeros(p.numel()) if v is None else v.detach().reshape(-1) for v, p in zip(values, like, strict=True)]
    return torch.cat(parts)
