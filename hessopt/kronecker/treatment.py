"""What is done with each parameter: which have Kronecker factors, and which a diagonal, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from hessopt.averages.blocks import Block

_log = logging.getLogger(__name__)

MANY = 0.1
"""Share of the parameters that may be without Kronecker factors in silence."""


def treatment(
    names: Mapping[Tensor, str], blocks: Sequence[Block], others: Mapping[Tensor, str], notes: Mapping[int, str]
) -> dict[str, str]:
    """How each parameter is treated, by its name in the network.

    Args:
        names: Of the network's parameters.
        blocks: Of parameters with factors.
        others: Parameters with a diagonal, with the reason.
        notes: What is to be added about a block, by its number.
    """
    found = {names.get(p, "?"): f"diagonal: {why}" for p, why in others.items()}
    for number, block in enumerate(blocks):
        g, o, a = block.shape
        sides = [f"diagonal {n}" if d else f"{n}×{n}" for n, d in zip((a, o), block.diagonal[::-1], strict=True)]
        text = f"{block.kind}: {' ⊗ '.join(sides)}" + (f", {g} groups" if g > 1 else "") + notes.get(number, "")
        for p in block.parameters:
            found.setdefault(names[p], text)
    return found


def without_factors(model: nn.Module, parameters: Collection[Tensor], others: Collection[Tensor]) -> dict[str, float]:
    """The share of the parameters that have a diagonal in place of Kronecker factors, by their module's class."""
    owners: dict[Tensor, str] = {p: type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False)}
    total = sum(p.numel() for p in parameters)
    counts: Counter[str] = Counter()
    for p in others:
        counts[owners.get(p, "no module")] += p.numel()
    return {name: count / total for name, count in counts.most_common()}


def warn_of_diagonals(model: nn.Module, parameters: Collection[Tensor], others: Collection[Tensor]) -> None:
    """Log a warning if more than ``MANY`` of the parameters are without factors."""
    shares = without_factors(model, parameters, others)
    if sum(shares.values()) > MANY:
        named = [f"{name} ({_percent(share)})" for name, share in list(shares.items())[:5]]
        more = ["…"] if len(shares) > 5 else []
        _log.warning(
            "KroneckerNewton: %s of the parameters have no Kronecker factors but a diagonal, which trains them "
            "about as a diagonal method does: those of %s. `optimizer.band.report()` names each and the reason. Build "
            "such layers of torch.nn.Linear, Conv1d to Conv3d, Embedding and normalisations, or take another "
            "optimizer for them.",
            _percent(sum(shares.values())),
            ", ".join(named + more),
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"
