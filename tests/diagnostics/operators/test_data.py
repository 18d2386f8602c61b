"""Batches: one or several, read again and again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from diagnostics import DiagnosticsError
from diagnostics.operators.data import Batches

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


class OnDemand:
    """A source without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield X[:4], Y[:4]
        yield X[4:], Y[4:]


@pytest.mark.parametrize(
    ("source", "sizes", "single", "count"),
    [
        ((X, Y), [6], True, 1),
        ([(X, Y)], [6], True, 1),
        ([[X, Y]], [6], True, 1),
        ([((X, X), (Y, Y))], [6], True, 1),
        ([(X[:4], Y[:4]), (X[4:], Y[4:])], [4, 2], False, 2),
        (((X[:4], Y[:4]), None), [4], True, 1),
        (OnDemand(), [4, 2], False, None),
        (DataLoader(TensorDataset(X, Y), batch_size=4), [4, 2], False, 2),
        (DataLoader(TensorDataset(X, Y), batch_size=6), [6], False, 1),
    ],
)
def test_sources(source: Any, sizes: list[int], single: bool, count: int | None) -> None:
    batches = Batches(source)
    for _ in range(2):
        assert [batch.size for batch in batches] == sizes
    assert batches.single is single
    assert batches.count() == count


def test_inputs_of_each_kind() -> None:
    assert isinstance(next(iter(Batches(({"x": X}, Y)))).inputs, dict)
    assert isinstance(next(iter(Batches([[[X, X], Y]]))).inputs, tuple)  # as collated by a DataLoader
    assert next(iter(Batches((X, None)))).targets is None


def test_private_copies_share_nothing() -> None:
    batch = next(iter(Batches(({"x": X, "mask": X > 3}, (Y, X.clone().requires_grad_())))))
    copy = batch.private(torch.device("cpu"))
    assert torch.equal(copy.inputs["x"], X)
    assert copy.inputs["x"].data_ptr() != X.data_ptr()
    assert copy.inputs["mask"].dtype == torch.bool
    assert copy.targets[0].data_ptr() != Y.data_ptr()
    assert copy.targets[1].requires_grad
    assert copy.targets[1].is_leaf
    assert copy.targets[1] is not batch.targets[1]


def test_copies_go_to_the_device(device: torch.device) -> None:
    assert next(iter(Batches((X, (Y, "text"))))).private(device).targets[0].device.type == device.type


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((pair for pair in [(X, Y)]), "batches is a generator, which can be read only once"),
        (iter([(X, Y)]), "batches is a list_iterator, which can be read only once"),
        (zip([X], [Y], strict=True), "batches is a zip, which can be read only once"),
        (X, "batches is a Tensor: pass one batch"),
        ({"x": X}, "batches is a dict: pass one batch"),
        (3, "batches is a int: pass one batch"),
        ((X, Y, Y), r"batches is a tuple of 3: a tuple is one batch, \(inputs, targets\)"),
        (((X, Y),), "batches is a tuple of 1"),
        (((X, Y), (X, Y)), "a tuple of two pairs: one batch with two inputs and two targets, or two batches"),
        (([X, X], (Y, Y)), "a tuple of two pairs"),
    ],
)
def test_refused_sources(source: Any, message: str) -> None:
    with pytest.raises(DiagnosticsError, match=message):
        Batches(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "batches is empty"),
        ([(X, Y), X], "batch 1 is a Tensor, not a pair"),
        ([(X, Y, Y)], "batch 0 is a tuple of 3, not a pair"),
        ([{"x": X, "y": Y}], "batch 0 is a dict, not a pair"),
        ([(X[:0], Y[:0])], "the batch is empty"),
        ([("text", Y)], "inputs hold no tensor but str"),
    ],
)
def test_refused_batches(source: Any, message: str) -> None:
    with pytest.raises(DiagnosticsError, match=message):
        list(Batches(source))
