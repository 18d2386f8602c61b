"""Groups of parameters as the places between which blocks of the parameters' Hessian are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.operators.curvature import CurvatureOperator
from diagnostics.operators.parameter_space import ParameterSpace

GroupSelection: TypeAlias = Mapping[str, str | Iterable[str]] | Literal["parameter"] | None
"""None, ``"parameter"``, or names of groups with names or patterns of parameters."""
ROOT = "(model)"
"""What the group of parameters that the model itself owns is called."""


class ParameterGroups:
    """Disjoint sets of an operator's parameters.

    Args:
        op: An operator of parameters.
        groups: None: one group for each module that owns some of the operator's parameters itself, by the module's
            name (``"(model)"`` for the model's own), in the order of ``model.parameters()``. ``"parameter"``: one for
            each tensor. A mapping: names or shell patterns for each group, in the order of the mapping; parameters in
            none are left out. A tied parameter is in the space once, under the first of its names, and so belongs to
            the first module that owns it; in a mapping any of its names will do.

    Attributes:
        names: Of the groups, in order.
        parameters: Names of the parameters of each group.
        space: The operator's parameter space.

    Raises:
        DiagnosticsError: no group, a pattern without a match among the operator's parameters, or a parameter in two
            groups.
    """

    def __init__(self, op: CurvatureOperator, groups: GroupSelection = None) -> None:
        if not isinstance(op, CurvatureOperator):
            raise TypeError(f"groups are of the parameters of a HessianOperator or its kin, got {type(op).__name__}.")
        self.space = op.space
        found: dict[str, list[str]] = {}
        if groups is None:
            for name in self.space.parameters:
                found.setdefault(name.rpartition(".")[0] or ROOT, []).append(name)
        elif groups == "parameter":
            found = {name: [name] for name in self.space.parameters}
        elif isinstance(groups, Mapping):
            found = {name: self._matches(op, name, patterns) for name, patterns in groups.items()}
        else:
            raise TypeError(f'groups must be None, "parameter" or a mapping from names to parameters, got {groups!r}.')
        if not found:
            raise DiagnosticsError("groups is empty: name some, or pass None for one group a module.")
        owner: dict[str, str] = {}
        for group, names in found.items():
            for name in names:
                if name in owner:
                    raise DiagnosticsError(
                        f"parameter {name!r} is in group {owner[name]!r} and in {group!r}: groups must be disjoint."
                    )
                owner[name] = group
        self.parameters = {group: tuple(names) for group, names in found.items()}
        self.names = tuple(found)
        self._slices = {group: _merged([self.space.slices[n] for n in names]) for group, names in found.items()}
        self._sizes: dict[str, int] = {g: sum(s.stop - s.start for s in slices) for g, slices in self._slices.items()}

    def size(self, name: str) -> int:
        """Entries of the group's parameters together."""
        return self._sizes[name]

    def index(self, name: str) -> Tensor:
        """Where the group's entries are in a vector of the operator, ``(d,)``."""
        return torch.cat([torch.arange(s.start, s.stop, device=self.space.device) for s in self._slices[name]])

    def spread(self, name: str, vectors: Tensor) -> Tensor:
        """Columns ``(d, k)`` of the group as columns ``(P, k)``, zero elsewhere."""
        result = vectors.new_zeros(vectors.shape[1], self.space.size).mT  # each column in one piece, as operators read
        start = 0
        for s in self._slices[name]:
            stop = start + s.stop - s.start
            result[s] = vectors[start:stop]
            start = stop
        return result

    def gather(self, name: str, columns: Tensor) -> Tensor:
        """The group's rows ``(d, k)`` of columns ``(P, k)``."""
        parts = [columns[s] for s in self._slices[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def order_distance(self) -> Tensor:
        """``|i − j|`` in the order of the groups, ``(n, n)``."""
        order = torch.arange(float(len(self.names)))
        return (order.unsqueeze(1) - order).abs()

    def _matches(self, op: CurvatureOperator, group: str, patterns: str | Iterable[str]) -> list[str]:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise DiagnosticsError(f"group {group!r} is empty: name a parameter, or leave the group out.")
        names = ParameterSpace(op.replay.model, patterns).parameters
        chosen = [name for name in names if name in self.space.parameters]
        if not chosen:
            raise DiagnosticsError(
                f"group {group!r} has none of the operator's parameters: {', '.join(map(repr, names))} were not "
                "chosen when it was made."
            )
        return chosen


class GroupBlock(LinearOperator):
    """The diagonal block of an operator at one group of parameters, ``(d, d)``."""

    def __init__(self, op: CurvatureOperator, groups: ParameterGroups, name: str) -> None:
        size = groups.size(name)
        super().__init__(
            (size, size), op.dtype, op.device, symmetric=True, positive_semidefinite=op.positive_semidefinite
        )
        self._op, self._groups, self._name = op, groups, name

    def matmat(self, vectors: Tensor) -> Tensor:
        """``A[w,w] X``."""
        return self._groups.gather(self._name, self._op @ self._groups.spread(self._name, vectors))

    def __repr__(self) -> str:
        return f"block {self._name!r} of {self._op!r}"


def _merged(slices: list[slice]) -> list[slice]:
    """Neighbouring slices as one."""
    starts = [slices[0].start, *(b.start for a, b in pairwise(slices) if a.stop != b.start)]
    stops = [*(a.stop for a, b in pairwise(slices) if a.stop != b.start), slices[-1].stop]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
