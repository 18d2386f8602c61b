"""The network on one batch with its tape in one piece, for products."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class WholeTape:
    """The same forward pass as a graph's, recorded without cuts; made by ``graph.whole``.

    Parameters are constants on this tape. The derivative of anything by ``values[v]`` is its derivative by an additive
    injection at node v, for all that was computed from v.

    Attributes:
        values: For each node of the graph its activation, ``(B, …)``, on the tape.
        loss: The loss, a scalar.
        entries: Entries of all intermediate tensors of the tape: about what a product holds for each probe.
    """

    values: dict[str, Tensor]
    loss: Tensor
    entries: int
