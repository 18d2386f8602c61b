"""What updates must leave alone: subspaces of the parameters, and how an update is projected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hessopt.errors import ModelError


class Memory(ABC):
    """Updates of the parameters that it names are projected; made by the functions of :mod:`hessopt.memories`.

    Attributes:
        names: Of the parameters, in the order of :meth:`project`; those of the model.
        shapes: Of the parameters.
    """

    kind: ClassVar[str]

    def __init__(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        self.names = tuple(names)
        self.shapes = tuple(torch.Size(shape) for shape in shapes)

    @abstractmethod
    def project(self, updates: Sequence[Tensor]) -> list[Tensor]:
        """The nearest allowed update in which every parameter that does not move stays; new tensors."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many numbers are stored."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; :func:`memory_from_state` is the inverse."""

    def _described(self) -> dict[str, Any]:
        return {"kind": self.kind, "names": list(self.names), "shapes": [list(shape) for shape in self.shapes]}


class SubspaceMemory(Memory):
    """Orthonormal columns M, ``(P, m)``: updates lose their part in the span, ``d − M Mᵀ d``, or keep only it.

    Where a parameter does not move, the others' update is projected so that the joint one is allowed: off the span of
    M's remaining rows, or onto what of the span vanishes on the missing ones.

    Args:
        basis: Columns, orthonormal or not; dependent ones are dropped.
        names: Of the parameters.
        shapes: Of the parameters, P entries in all.
        keep: Keep the part in the span, and remove all else.
    """

    kind = "subspace"

    def __init__(
        self, basis: Tensor, names: Sequence[str], shapes: Sequence[Sequence[int]], *, keep: bool = False
    ) -> None:
        super().__init__(names, shapes)
        size = sum(shape.numel() for shape in self.shapes)
        if basis.ndim != 2 or len(basis) != size or not basis.is_floating_point():
            raise ValueError(
                f"a basis has shape ({size}, m) and real entries, got {tuple(basis.shape)}, {basis.dtype}."
            )
        if not basis.isfinite().all():
            raise ValueError("the basis is not finite.")
        self.basis = _direction_by_direction(orthonormal(basis.detach()))
        self.keep = keep
        self._restricted: tuple[tuple[bool, ...], Tensor] | None = None

    def extended(self, vectors: Tensor) -> SubspaceMemory:
        """The memory of the span of both."""
        joint = torch.cat([self.basis.to(vectors), new_directions(self.basis.to(vectors), vectors)], 1)
        return SubspaceMemory(joint, self.names, self.shapes, keep=self.keep)

    @property
    def numbers(self) -> int:
        """P · m."""
        return self.basis.numel()

    def project(self, updates: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`SubspaceMemory`."""
        moving = tuple(bool(update.any()) for update in updates)
        if not any(moving):
            return [update.clone() for update in updates]
        flat = torch.cat([u.reshape(-1) for u, moves in zip(updates, moving, strict=True) if moves])
        dtype = torch.promote_types(flat.dtype, torch.float32)
        basis, projected = self._allowed(moving, flat.device, dtype), flat.to(dtype)
        inside = basis @ (basis.mT @ projected)
        projected = inside if self.keep else projected - inside
        pieces = iter(projected.to(flat.dtype).split([u.numel() for u, m in zip(updates, moving, strict=True) if m]))
        return [next(pieces).view(u.shape) if m else u.clone() for u, m in zip(updates, moving, strict=True)]

    def _allowed(self, moving: tuple[bool, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        known = self._restricted
        if known is not None and known[0] == moving and known[1].device == device and known[1].dtype == dtype:
            return known[1]
        basis = self.basis.to(device, dtype)
        if not all(moving):
            sizes = [shape.numel() for shape in self.shapes]
            rows = basis.split(sizes)
            free = torch.cat([part for part, moves in zip(rows, moving, strict=True) if moves])
            held = torch.cat([part for part, moves in zip(rows, moving, strict=True) if not moves])
            basis = _direction_by_direction(free @ _kernel(held) if self.keep else orthonormal(free))
        self._restricted = moving, basis
        return basis

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Memory`."""
        return {**self._described(), "basis": self.basis, "keep": self.keep}


class LayerMemory(Memory):
    """A subspace of inputs for each layer: updates of its weight leave the layer's response to them as it is.

    For a layer ``W x + b`` and orthonormal columns M of remembered inputs ``(x; 1)``, the update of ``(W b)`` becomes
    ``Δ − Δ M Mᵀ``. A convolution is the linear layer of its patches.

    Args:
        bases: By position of the weight and of the bias (-1: none), M, ``(d_in, m)`` or ``(d_in + 1, m)``.
        names: Of the parameters.
        shapes: Of the parameters.
    """

    kind = "layers"

    def __init__(
        self, bases: Mapping[tuple[int, int], Tensor], names: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(names, shapes)
        self.bases = dict(bases)

    @property
    def numbers(self) -> int:
        """Entries of all M."""
        return sum(basis.numel() for basis in self.bases.values())

    def project(self, updates: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`LayerMemory`."""
        projected = [update.clone() for update in updates]
        for (weight, bias), basis in self.bases.items():
            members = [i for i in (weight, bias) if i >= 0 and bool(updates[i].any())]
            if not members or not basis.shape[1]:
                continue
            rows = len(updates[members[0]])
            joint = torch.cat([updates[i].reshape(rows, -1) for i in members], 1)
            dtype = torch.promote_types(joint.dtype, torch.float32)
            allowed, delta = basis.to(joint.device, dtype), joint.to(dtype)
            if len(members) < 1 + (bias >= 0):  # one of the two stays: only its share of the inputs counts
                allowed = orthonormal(allowed[:-1] if members == [weight] else allowed[-1:])
            delta = delta - (delta @ allowed) @ allowed.mT
            sizes = [updates[i].numel() // rows for i in members]
            for i, piece in zip(members, delta.to(joint.dtype).split(sizes, 1), strict=True):
                projected[i] = piece.reshape(updates[i].shape)
        return projected

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Memory`."""
        layers = [[weight, bias, basis] for (weight, bias), basis in self.bases.items()]
        return {**self._described(), "layers": layers}


def memory_from_state(state: Mapping[str, Any]) -> Memory:
    """The memory that ``state_dict`` described."""
    names, shapes = state["names"], state["shapes"]
    if state["kind"] == SubspaceMemory.kind:
        memory = SubspaceMemory(state["basis"][:, :0], names, shapes, keep=state["keep"])
        memory.basis = _direction_by_direction(state["basis"])  # bit for bit
        return memory
    if state["kind"] == LayerMemory.kind:
        return LayerMemory({(weight, bias): basis for weight, bias, basis in state["layers"]}, names, shapes)
    raise ModelError(f"a memory of kind {state['kind']!r} is unknown to this version.")


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns of the same span; unchanged, bit for bit, if they already are so to rounding."""
    if not columns.shape[1]:
        return columns
    gram = columns.mT @ columns
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if (gram - eye).abs().amax() <= 10 * torch.finfo(gram.dtype).eps * len(columns) ** 0.5:
        return columns
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    kept: Tensor = u[:, s > _rank_limit(columns, s)].contiguous()
    return kept


def new_directions(basis: Tensor, vectors: Tensor) -> Tensor:
    """Orthonormal columns of what ``vectors`` add to the span of orthonormal columns."""
    unit = vectors / torch.linalg.vector_norm(vectors, dim=0).clamp_min(torch.finfo(vectors.dtype).tiny)
    rest = unit
    for _ in range(2):
        rest = rest - basis @ (basis.mT @ rest)
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    fresh: Tensor = u[:, s > torch.finfo(rest.dtype).eps * max(rest.shape) ** 0.5 * 10]
    if fresh.shape[1]:
        fresh = torch.linalg.qr(fresh - basis @ (basis.mT @ fresh)).Q
    return fresh


def _direction_by_direction(columns: Tensor) -> Tensor:
    """The same matrix, each column contiguous: projections, which are bound by memory, are three times faster so."""
    return columns.mT.contiguous().mT


def _kernel(rows: Tensor) -> Tensor:
    """Orthonormal c, ``(m, r)``, with ``rows @ c = 0``."""
    _, s, vh = torch.linalg.svd(rows, full_matrices=True)
    rank = int((s > max(_rank_limit(rows, s), 10 * torch.finfo(rows.dtype).eps)).sum())
    kernel: Tensor = vh[rank:].mT
    return kernel


def _rank_limit(matrix: Tensor, values: Tensor) -> float:
    largest = values[0].item() if len(values) else 0.0
    return max(matrix.shape) * torch.finfo(matrix.dtype).eps * largest
