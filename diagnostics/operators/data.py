"""The batches that an operator sums over: one, or a source that can be read again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.autograd.kernels import plain_autograd
from diagnostics.autograd.refusals import check_inputs
from diagnostics.autograd.trees import map_tensors
from diagnostics.errors import DiagnosticsError


@dataclass(frozen=True, eq=False)
class Batch:
    """One item of the data.

    Attributes:
        inputs: What the model takes: a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``.
        targets: What the loss takes beside the model's output.
        size: Number of samples: the first dimension of the first tensor of the inputs.
    """

    inputs: Any
    targets: Any
    size: int

    def private(self, device: torch.device) -> Batch:
        """A copy on ``device`` that shares no memory and no tape with this one."""

        def copied(tensor: Tensor) -> Tensor:
            copy = tensor.detach().to(device, copy=True)
            return copy.requires_grad_(tensor.requires_grad) if copy.is_floating_point() else copy

        with plain_autograd():
            return Batch(map_tensors(copied, self.inputs), map_tensors(copied, self.targets), self.size)


class Batches:
    """Batches in the order of their source, which is read from its start at every pass.

    Args:
        source: One batch as a tuple ``(inputs, targets)``, or something that can be iterated over any number of times
            and yields such pairs: a list, a ``DataLoader``. A list of one is one batch.

    Attributes:
        source: What the batches are read from; one batch is a list of one.
        single: Whether there is one batch, known without reading: its autograd tape can be kept.

    Raises:
        DiagnosticsError: the source can be read only once (a generator), is empty, or is neither a pair nor a source
            of pairs; a tuple of two pairs may mean one batch or two, so that a list must say which.
    """

    def __init__(self, source: Any) -> None:
        self.source = [source] if isinstance(source, tuple) else source
        if isinstance(source, tuple):
            _check_tuple(source)
        elif isinstance(source, Tensor | Mapping | str) or not hasattr(source, "__iter__"):
            raise DiagnosticsError(
                f"batches is a {type(source).__name__}: pass one batch as a tuple (inputs, targets), or several as a "
                "list or a DataLoader of such pairs. Where the loss takes no targets, pass (inputs, None)."
            )
        elif iter(source) is source:
            raise DiagnosticsError(
                f"batches is a {type(source).__name__}, which can be read only once, but every product reads all "
                "data. Pass a list (list(batches)) or the DataLoader itself."
            )
        self.single = isinstance(self.source, Sequence) and len(self.source) == 1

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for number, item in enumerate(self.source):
            empty = False
            yield _batch(item, number)
        if empty:
            raise DiagnosticsError("batches is empty: there is nothing to average over.")

    def count(self) -> int | None:
        """Number of batches of a pass, where the source says so."""
        try:
            return len(self.source)
        except (TypeError, NotImplementedError):
            return None


def _batch(item: Any, number: int) -> Batch:
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
        raise DiagnosticsError(
            f"batch {number} is {what}, not a pair (inputs, targets). One batch is a tuple (inputs, targets), several "
            "are a list of such; a dict of everything is ({'name': inputs, …}, targets)."
        )
    inputs, targets = item
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs  # as a DataLoader collates tuples
    return Batch(inputs, targets, check_inputs(inputs))


def _check_tuple(source: tuple[Any, ...]) -> None:
    if len(source) != 2:
        raise DiagnosticsError(
            f"batches is a tuple of {len(source)}: a tuple is one batch, (inputs, targets). Pass several batches as a "
            "list of such pairs."
        )
    if all(isinstance(part, tuple | list) and len(part) == 2 for part in source):
        raise DiagnosticsError(
            "batches is a tuple of two pairs: one batch with two inputs and two targets, or two batches? Pass a list: "
            "[(inputs, targets)] for one batch, [(inputs, targets), (inputs, targets)] for two."
        )
