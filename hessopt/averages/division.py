"""Which process computes what all of them need: a function of sizes alone, so the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diagnostics.ranks.collectives import Ranks

WORTH = 1000.0
"""Multiplications that a process does in the time in which it receives a number, about: 3e13 a second and 1e11 bytes a
second of an accelerator, or 1e11 and 4e8 of a processor."""
LEAST = 1e8
"""Multiplications that are fewer than what an exchange takes to begin."""
EIGEN, CHOLESKY = 25.0, 4.0
"""Times that a decomposition into eigenvectors, and an inverse by a Cholesky factor, take of a matrix product."""


class Work(NamedTuple):
    """A piece of work whose result every process needs.

    Attributes:
        cost: Multiplications that take as long.
        numbers: Of its result.
    """

    cost: float
    numbers: int


def owners_of(pieces: Sequence[Work], ranks: Ranks) -> list[int | None]:
    """A process for each piece that is worth sending, by :meth:`diagnostics.ranks.collectives.Ranks.owners`.

    A piece that costs less than :data:`WORTH` multiplications for each number of its result is done by all, and so are
    all pieces where the others together cost less than :data:`LEAST`.

    Returns:
        The owners; None for what every process does for itself.
    """
    sent = [i for i, piece in enumerate(pieces) if piece.cost >= WORTH * piece.numbers]
    found: list[int | None] = [None] * len(pieces)
    if ranks.size > 1 and sum(pieces[i].cost for i in sent) >= LEAST:
        for i, owner in zip(sent, ranks.owners([pieces[i].cost for i in sent]), strict=True):
            found[i] = owner
    return found


def own_entries(owners: Sequence[int | None], rank: int) -> list[int]:
    """Numbers of the pieces that a process computes."""
    return [i for i, owner in enumerate(owners) if owner is None or owner == rank]
