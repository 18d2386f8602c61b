"""What every memory does with updates, against its dense projector in float64, to 1e-12 of the update's norm."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from hessopt.wrappers.memory import LayerMemory, Memory, SubspaceMemory, memory_from_state
from tests.contracts.coverage import uncovered

NAMES = ("weight", "bias", "other")
SHAPES = ((2, 3), (2,), (2, 2))
SIZE = 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def updates(seed: int = 1) -> list[Tensor]:
    return [normal(*shape, seed=seed + i) for i, shape in enumerate(SHAPES)]


def projector(columns: Tensor) -> Tensor:
    """Onto the span of columns."""
    return columns @ torch.linalg.pinv(columns)


class MemoryContract(ABC):
    """Properties of a memory; a subclass makes one and says which updates it allows."""

    kind: ClassVar[type[Memory]]

    @abstractmethod
    def make(self) -> Memory:
        """A memory for parameters of :data:`SHAPES`."""

    @abstractmethod
    def allowed(self) -> Tensor:
        """The dense projector onto allowed updates, ``(P, P)``."""

    @pytest.fixture
    def memory(self) -> Memory:
        memory = self.make()
        assert type(memory) is self.kind
        assert memory.names == NAMES
        assert memory.shapes == tuple(map(torch.Size, SHAPES))
        return memory

    def test_updates_are_projected_onto_the_allowed_ones(self, memory: Memory) -> None:
        before = updates()
        found = memory.project(before)
        assert [part.shape for part in found] == list(memory.shapes)
        assert (flat(found) - self.allowed() @ flat(before)).norm() <= 1e-12 * flat(before).norm()

    def test_allowed_updates_stay(self, memory: Memory) -> None:
        once = memory.project(updates())
        assert (flat(memory.project(once)) - flat(once)).norm() <= 1e-12 * flat(once).norm()

    def test_what_is_removed_is_orthogonal_to_what_stays(self, memory: Memory) -> None:
        before = flat(updates())
        found = flat(memory.project(updates()))
        assert abs(found @ (before - found)) <= 1e-12 * before.norm() ** 2
        assert found.norm() <= before.norm()

    @pytest.mark.parametrize("still", range(3))
    def test_parameters_that_do_not_move_stay(self, memory: Memory, still: int) -> None:
        """And the joint update is allowed, and the nearest such."""
        before = updates()
        before[still].zero_()
        found = memory.project(before)
        assert not found[still].any()
        forbidden = torch.eye(SIZE, dtype=torch.float64) - self.allowed()
        assert (forbidden @ flat(found)).norm() <= 1e-12 * flat(before).norm()
        moving = flat([torch.full_like(part, i != still) for i, part in enumerate(before)])
        held = torch.cat([forbidden, torch.diag(1 - moving)])
        nearest = flat(before) - torch.linalg.pinv(held) @ (held @ flat(before))
        assert (flat(found) - nearest).norm() <= 1e-12 * flat(before).norm()

    def test_no_update_gives_none(self, memory: Memory) -> None:
        assert not flat(memory.project([torch.zeros(*shape) for shape in SHAPES])).any()

    def test_updates_are_left_as_they_are(self, memory: Memory) -> None:
        before, copies = updates(), updates()
        found = memory.project(before)
        for part in found:
            part.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))

    def test_the_dtype_is_that_of_the_updates(self, memory: Memory) -> None:
        found = memory.project([part.float() for part in updates()])
        assert {part.dtype for part in found} == {torch.float32}
        exact = flat(memory.project(updates()))
        assert (flat(found).double() - exact).norm() <= 1e-5 * exact.norm()

    def test_saved_and_loaded_it_projects_bit_for_bit(self, memory: Memory) -> None:
        file = io.BytesIO()
        torch.save(memory.state_dict(), file)
        file.seek(0)
        loaded = memory_from_state(torch.load(file, weights_only=True))
        assert type(loaded) is self.kind
        assert (loaded.names, loaded.shapes, loaded.numbers) == (memory.names, memory.shapes, memory.numbers)
        pairs = zip(memory.project(updates()), loaded.project(updates()), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class TestSubspaceMemory(MemoryContract):
    kind = SubspaceMemory

    def make(self) -> Memory:
        return SubspaceMemory(normal(SIZE, 2), NAMES, SHAPES)

    def allowed(self) -> Tensor:
        return torch.eye(SIZE, dtype=torch.float64) - projector(normal(SIZE, 2))

    def test_its_numbers(self, memory: Memory) -> None:
        assert memory.numbers == SIZE * 2


class TestSubspaceMemoryThatKeeps(MemoryContract):
    """So many directions that some vanish on any one parameter."""

    kind = SubspaceMemory

    def make(self) -> Memory:
        return SubspaceMemory(normal(SIZE, 9), NAMES, SHAPES, keep=True)

    def allowed(self) -> Tensor:
        return projector(normal(SIZE, 9))


class TestLayerMemory(MemoryContract):
    """Inputs of a layer with a bias, and of one without."""

    kind = LayerMemory

    def bases(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.qr(normal(4, 1, seed=8)).Q, torch.linalg.qr(normal(2, 1, seed=9)).Q

    def make(self) -> Memory:
        first, second = self.bases()
        return LayerMemory({(0, 1): first, (2, -1): second}, NAMES, SHAPES)

    def allowed(self) -> Tensor:
        """``Δ ↦ Δ (1 − M Mᵀ)`` of ``(W b)``, entry by entry."""
        first, second = self.bases()
        columns = []
        for unit in torch.eye(SIZE, dtype=torch.float64):
            w, b, v = (part.reshape(shape) for part, shape in zip(unit.split([6, 2, 4]), SHAPES, strict=True))
            joint = torch.cat([w, b.unsqueeze(1)], 1)
            joint = joint - joint @ first @ first.mT
            columns.append(flat([joint[:, :3], joint[:, 3], v - v @ second @ second.mT]))
        return torch.stack(columns, 1)

    def test_its_numbers(self, memory: Memory) -> None:
        assert memory.numbers == 4 + 2


def test_every_implementation_is_covered() -> None:
    assert uncovered(Memory, MemoryContract) == set()
