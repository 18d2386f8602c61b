"""Tensors in containers: found, replaced, and the originals left alone."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.autograd.trees import flatten, map_tensors, tensors


@dataclass(frozen=True)
class Pair:
    first: object
    second: object


class Output(dict):
    pass


def test_containers_are_rebuilt_with_other_tensors_and_the_same_rest() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    tree = (a, Pair([b, "text"], Output(x=None, y=UserDict(z=c))), {"n": 3})
    assert [id(t) for t in tensors(tree)] == [id(a), id(b), id(c)]
    doubled = map_tensors(lambda t: 2 * t + 1, tree)
    assert [t.item() for t in tensors(doubled)] == [1, 3, 5]
    assert [t.item() for t in tensors(tree)] == [0, 1, 2]
    assert isinstance(doubled[1], Pair)
    assert isinstance(doubled[1].second, Output)
    assert isinstance(doubled[1].second["y"], UserDict)
    assert doubled[1].first[1] == "text"
    assert doubled[2] == {"n": 3}


def test_containers_without_tensors_are_leaves() -> None:
    settings = Pair(1, Output(a=2))
    leaves, rebuild = flatten((settings, torch.ones(1)))
    assert leaves[0] is settings
    assert rebuild(leaves)[0] is settings


def test_a_class_is_no_dataclass_instance() -> None:
    assert flatten([Pair, Tensor])[0] == [Pair, Tensor]
