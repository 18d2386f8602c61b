"""Parameters as one flat vector: which of them, in which order."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.autograd.kernels import EXCLUSIVE
from diagnostics.errors import DiagnosticsError, StaleGraphError

ParameterPredicate: TypeAlias = Callable[[str, nn.Parameter], bool]
ParameterSelection: TypeAlias = Iterable[str] | ParameterPredicate | None


class ParameterSpace:
    """The space R^P of the chosen parameters of a model.

    A vector holds the parameters in the order of ``model.parameters()``, each flattened in row-major order; a parameter
    that is shared (tied weights) is in it once, under the first of its names.

    Args:
        model: The network.
        selection: None for all parameters that require grad; names or shell patterns (``["layer1.*", "fc.weight"]``),
            of which each must match one that requires grad, any of its names when it is shared; or a predicate
            ``(name, parameter) -> bool``.

    Attributes:
        parameters: The chosen parameters, by name.
        slices: Entries of each in a vector, by name.
        size: P.
        dtype: Of all of them.
        device: Of all of them.

    Raises:
        DiagnosticsError: nothing requires grad or is chosen; a name matches nothing; the parameters are of several
            dtypes or on several devices.
    """

    def __init__(self, model: nn.Module, selection: ParameterSelection = None) -> None:
        self.parameters = _select(model, selection)
        self._shapes = [p.shape for p in self.parameters.values()]
        self._sizes = [shape.numel() for shape in self._shapes]
        ends = list(accumulate(self._sizes))
        self.slices = {
            name: slice(end - n, end) for name, n, end in zip(self.parameters, self._sizes, ends, strict=True)
        }
        self.size = ends[-1]
        kinds: dict[tuple[torch.dtype, torch.device], str] = {}
        for name, p in self.parameters.items():
            kinds.setdefault((p.dtype, p.device), name)
        if len(kinds) > 1:
            listed = ", ".join(f"{name!r} ({dtype}, {device})" for (dtype, device), name in kinds.items())
            raise DiagnosticsError(
                f"the parameters are of several dtypes or on several devices: {listed}. One vector cannot hold them "
                "without a conversion: choose some of them with parameters=…, or convert the model."
            )
        ((self.dtype, self.device),) = kinds

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"ParameterSpace of {len(self.parameters)} parameters, {self.size} entries"

    def flatten(self, values: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
        """One vector ``(P,)`` of a tensor for each parameter: a mapping from their names, or in their order.

        Raises:
            DiagnosticsError: a parameter is missing, one too many is there, or a shape is another.
        """
        if isinstance(values, Mapping):
            if values.keys() != self.parameters.keys():
                missing = [name for name in self.parameters if name not in values]
                surplus = [name for name in values if name not in self.parameters]
                raise DiagnosticsError(
                    f"flatten takes one tensor for each chosen parameter: missing are {missing[:5]}, unknown are "
                    f"{surplus[:5]}."
                )
            tensors = [values[name] for name in self.parameters]
        else:
            tensors = list(values)
            if len(tensors) != len(self.parameters):
                raise DiagnosticsError(
                    f"flatten takes {len(self.parameters)} tensors, one for each chosen parameter; got {len(tensors)}."
                )
        for (name, parameter), tensor in zip(self.parameters.items(), tensors, strict=True):
            if tensor.shape != parameter.shape:
                raise DiagnosticsError(
                    f"the tensor for parameter {name!r} has shape {tuple(tensor.shape)} instead of "
                    f"{tuple(parameter.shape)}."
                )
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The entries of a vector ``(P,)`` by parameter name, in the parameters' shapes; views where possible."""
        if vector.shape != (self.size,):
            raise DiagnosticsError(f"unflatten takes a vector ({self.size},), got shape {tuple(vector.shape)}.")
        pieces = self.split(vector.unsqueeze(1))
        return {name: piece.squeeze(0) for name, piece in zip(self.parameters, pieces, strict=True)}

    def check_trained(self) -> None:
        """Raise :class:`diagnostics.StaleGraphError` if a parameter does not require grad any more."""
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                raise StaleGraphError(
                    f"parameter {name!r} was frozen (requires_grad_(False)) after the operator was made: unfreeze it, "
                    "or make a new operator."
                )

    def split(self, columns: Tensor) -> list[Tensor]:
        """The columns of ``(P, k)``, in the parameters' order and shapes: ``(k, *parameter.shape)`` each."""
        rows = columns.mT.split([p.numel() for p in self.parameters.values()], dim=1)
        return [row.reshape(columns.shape[1], *p.shape) for row, p in zip(rows, self.parameters.values(), strict=True)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        count = len(pieces[0])
        return torch.cat([p.reshape(count, n) for p, n in zip(pieces, self._sizes, strict=True)], dim=1).mT


def _select(model: nn.Module, selection: ParameterSelection) -> dict[str, nn.Parameter]:
    with EXCLUSIVE:  # not what another thread's run has put in their places
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise DiagnosticsError(
            f"no parameter of {type(model).__name__} requires grad: call requires_grad_() on those of interest first."
        )
    if selection is None:
        return trained
    if callable(selection):
        chosen = {name: p for name, p in trained.items() if selection(name, p)}
        if not chosen:
            raise DiagnosticsError(
                "the predicate chose none of the parameters that require grad, which are " + _some(trained)
            )
        return chosen
    first_name = {id(p): name for name, p in reversed(trained.items())}
    with EXCLUSIVE:
        names = {
            alias: first_name.get(id(p)) for alias, p in model.named_parameters(remove_duplicate=False)
        }  # None: does not require grad
    wanted: set[str] = set()
    for pattern in [selection] if isinstance(selection, str) else selection:
        if not isinstance(pattern, str):
            raise TypeError(
                "parameters must be None, names or patterns (strings), or a predicate (name, parameter) -> bool; got "
                f"an entry of type {type(pattern).__name__}."
            )
        matches = {alias: name for alias, name in names.items() if fnmatchcase(alias, pattern)}
        found = {name for name in matches.values() if name is not None}
        if not found:
            raise DiagnosticsError(_no_match(model, pattern, list(matches), trained))
        wanted |= found
    if not wanted:
        raise DiagnosticsError("parameters is empty: name some, or pass None for all. There are " + _some(trained))
    return {name: p for name, p in trained.items() if name in wanted}


def _no_match(model: nn.Module, pattern: str, frozen: list[str], trained: Mapping[str, nn.Parameter]) -> str:
    if frozen:
        return (
            f"{pattern!r} matches only parameters that do not require grad ({', '.join(map(repr, frozen[:3]))}): call "
            "requires_grad_() on them first."
        )
    close = difflib.get_close_matches(pattern, trained, n=3)
    hint = f"Did you mean {', '.join(map(repr, close))}?" if close else "There are " + _some(trained)
    return f"no parameter of {type(model).__name__} is called or matches {pattern!r}. {hint}"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:12])) + (" …" if len(listed) > 12 else ".")
