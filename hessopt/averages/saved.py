"""States of averages: what is missing or of another shape is named before anything is taken up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from hessopt.network.saved_state import check_shape

FRESH = (
    "If it was loaded into the structure of a fresh optimizer's, take one step with that one before. Nothing was "
    "loaded."
)


def check_entries(what: str, state: Any, names: Iterable[str]) -> None:
    """Raise a ValueError unless the state of ``what`` is a dict with entries of these names."""
    missing = sorted(set(names) - set(state)) if isinstance(state, dict) else [what]
    if missing:
        raise ValueError(f"the state lacks {missing[0]!r} of its {what}. {FRESH}")


def check_tensors(own: Sequence[tuple[str, Tensor]], saved: Sequence[Tensor]) -> None:
    """Raise a ValueError unless the saved tensors have the shapes of one's own, which come with what to call them."""
    for (name, mine), theirs in zip(own, saved, strict=False):
        check_shape(name, theirs, mine.shape)
    if len(own) != len(saved):
        what = f"lacks {own[len(saved)][0]}" if len(saved) < len(own) else "has averages of more layers"
        raise ValueError(
            f"the state {what}: it is of another network or bandwidth, or was loaded into the structure of a fresh "
            "optimizer's, which does not know the pairs of layers yet; take one step with that one before. Nothing was "
            "loaded."
        )
