"""The state of :class:`hessopt.kronecker.band.KroneckerBand`: averages, inverses, and where its schedule stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.blocks import Rows
from hessopt.network.cliques import Bandwidth
from hessopt.network.saved_state import check_shape

if TYPE_CHECKING:
    from hessopt.kronecker.band import KroneckerBand

T = TypeVar("T")


def state_of(band: KroneckerBand) -> dict[str, Any]:
    """Everything that the next steps depend on, as tensors and plain numbers.

    Before the first batch the averages are those of all layers, and zero, so that a checkpoint can be read into them.
    """
    factors, inverse, called, distances, diagonals = (
        band.factors, band.inverse, [], band.distances, list(band.diagonals.values()),
    )  # fmt: skip
    if factors is None or inverse is None or distances is None:
        count = len(band.blocks)
        called, distances = list(range(count)), np.where(np.eye(count, dtype=bool), 0.0, np.inf)
        factors = KroneckerAverages(band.blocks, torch.eye(count, dtype=torch.float64), band.dtype, band.device)
        inverse = band.inverse_of(factors)
        covered = {p for block in band.blocks for p in block.parameters}
        diagonals = [torch.zeros_like(p, dtype=band.dtype) for p in band.parameters if p not in covered]
    else:
        called = list(band.called)
    state: dict[str, Any] = {
        "steps": band.steps, "damping": band.damping, "scale": band.scale, "generator": band.gathering.random_state,
        "active": band.recorder.active, "left_out": band.left_out.clone(), "skipped": factors.skipped.clone(),
        "called": called, "distances": torch.from_numpy(distances),
        "updates": factors.updates, "ready": inverse.ready, "excluded": list(band.excluded), "rows": list(band.rows),
        "bandwidth": band.bandwidth, "probing": band.probe is not None,
        "tensors": [t.clone() for t in [*_stacked(factors, factors.tensors), *_stacked(factors, inverse.tensors)]],
        "diagonals": [t.clone() for t in diagonals],
    }  # fmt: skip
    if factors.pairs:
        both = [*_crossed(factors, factors.tensors), *_crossed(factors, inverse.tensors)]
        state["cross"] = [t.clone() for t in both]
    if band.probe is not None:
        state["probe"] = {
            "updates": band.probe.updates,
            "skipped": band.probe.skipped.clone(),
            "tensors": [t.clone() for t in band.probe.tensors],
            "last": [None if row is None else [row.inputs, row.cotangents] for row in band.last],
            "samples": band.samples,
        }
    return state


@torch.no_grad()
def load_state(band: KroneckerBand, state: dict[str, Any], candidates: Sequence[Bandwidth] = ()) -> None:
    """Take up a state, of a network and arguments like this one's.

    Args:
        band: Which takes it up.
        state: The state.
        candidates: Bandwidths that it may have instead of this one's, and that a probe is for.

    Raises:
        ValueError: the state is of another network or bandwidth, or incomplete; the band is then as it was.
    """
    _check(band, state, candidates)
    band.steps, band.damping, band.scale = int(state["steps"]), float(state["damping"]), float(state["scale"])
    saved = state["generator"].cpu()
    if saved.shape == band.generator.get_state().shape:
        band.generator.set_state(saved)
    else:
        band.generator.manual_seed(band.seed)  # of another kind of device: no state of this one's
    band.start(bool(state["active"]))
    band.left_out.fill_(state["left_out"])
    band.probe, band.last = None, []
    band.recorder.linking = not state["updates"]
    if not state["updates"]:
        band.factors, band.inverse, band.distances, band.diagonals = None, None, None, {}
        return
    band.bandwidth = state["bandwidth"]
    for number, block in enumerate(band.blocks):
        if number not in state["called"]:
            band.others.update(dict.fromkeys(block.parameters, "its layer was not called at the first step"))
    band.build(state["called"], state["distances"].cpu().numpy())
    assert band.factors is not None
    assert band.inverse is not None
    band.factors.updates, band.inverse.ready = int(state["updates"]), bool(state["ready"])
    band.factors.skipped.fill_(state["skipped"])
    band.excluded, band.rows = list(state["excluded"]), list(state["rows"])
    kept, inverses = (band.factors, band.factors.tensors), (band.factors, band.inverse.tensors)
    own = [*_stacked(*kept), *_stacked(*inverses), *_crossed(*kept), *_crossed(*inverses), *band.diagonals.values()]
    tensors = [*state["tensors"], *state.get("cross", []), *state["diagonals"]]
    if state["probing"]:
        band.probe = band.blank_factors(*candidates)
        band.probe.updates, band.samples = int(state["probe"]["updates"]), int(state["probe"]["samples"])
        band.probe.skipped.fill_(state["probe"]["skipped"])
        last = state["probe"]["last"]
        band.last = [None if row is None else Rows(*(t.to(band.device) for t in row)) for row in last]
        own, tensors = [*own, *band.probe.tensors], [*tensors, *state["probe"]["tensors"]]
    for mine, saved in zip(own, tensors, strict=True):
        mine.copy_(saved)


def _check(band: KroneckerBand, state: dict[str, Any], candidates: Sequence[Bandwidth]) -> None:
    """Raise a ValueError unless the state can be taken up."""
    wanted = (set(state_of(band)) - {"cross", "probe"}) | ({"probe"} if state.get("probing") else set())
    missing, count = sorted(wanted - set(state)), len(band.blocks)
    if missing:
        raise ValueError(
            f"the state lacks {missing[0]!r} of its averages. If it was loaded into the structure of a fresh "
            "optimizer's, take one step with that one before. Nothing was loaded."
        )
    known = candidates or [band.bandwidth]
    if state["bandwidth"] not in known and state["updates"]:
        raise ValueError(
            f"the state's averages are of another bandwidth, {state['bandwidth']!r}, and the optimizer's is "
            f"{' or '.join(map(repr, known))}. Nothing was loaded."
        )
    check_shape("the distances of layers", state["distances"], (count, count))
    if not state["updates"]:
        return
    kept = getattr(band, "called", []), band.distances, band._tapers
    try:
        band.called, band.distances, band._tapers = list(state["called"]), state["distances"].cpu().numpy(), {}
        factors = band.blank_factors(state["bandwidth"])
        probe = band.blank_factors(*candidates) if state["probing"] else None
    finally:
        band.called, band.distances, band._tapers = kept
    covered = {p for block in factors.blocks for p in block.parameters}
    diagonals = [p for p in band.parameters if p not in covered]
    names = {id(p): name for name, p in band.model.named_parameters()}
    inverse = band.inverse_of(factors)
    own = _described(factors, factors.tensors, "factor"), _described(factors, inverse.tensors, "inverse factor")
    _compare([pair for part in own for pair in _stacked(factors, part)], state["tensors"])
    _compare([pair for part in own for pair in _crossed(factors, part)], state.get("cross", []))
    described = [(f"the diagonal of parameter {names.get(id(p), '?')!r}", p) for p in diagonals]
    _compare(described, state["diagonals"])
    if probe is not None:
        _compare(_described(probe, probe.tensors, "probing factor"), state["probe"]["tensors"])


def _stacked(factors: KroneckerAverages, tensors: Sequence[T]) -> Sequence[T]:
    """Those of single layers."""
    return tensors[: 2 * len(factors.stacks)]


def _crossed(factors: KroneckerAverages, tensors: Sequence[T]) -> Sequence[T]:
    """Those of pairs of layers."""
    return tensors[2 * len(factors.stacks) :]


def _described(factors: KroneckerAverages, tensors: Sequence[Tensor], what: str) -> list[tuple[str, Tensor]]:
    """The tensors, in the order of :attr:`KroneckerAverages.tensors`, with what to call them."""
    names: list[str] = []
    for number in range(len(factors.stacks)):
        layers = [repr(b.name) for b, (n, _) in zip(factors.blocks, factors.place, strict=True) if n == number]
        names += [f"the {what} {side} of {', '.join(layers[:3])}" for side in ("A", "G")]
    for pairs in factors.pairs:
        between = [f"{factors.blocks[v].name!r} and {factors.blocks[w].name!r}" for v, w in pairs.blocks[:2]]
        names += [f"the {what} {side} between {', '.join(between)}" for side in ("A", "G")]
    return list(zip(names, tensors, strict=True))


def _compare(own: Sequence[tuple[str, Tensor]], saved: Sequence[Tensor]) -> None:
    for (name, mine), theirs in zip(own, saved, strict=False):
        check_shape(name, theirs, mine.shape)
    if len(own) != len(saved):
        what = f"lacks {own[len(saved)][0]}" if len(saved) < len(own) else "has averages of more layers"
        raise ValueError(
            f"the state {what}: it is of another network or bandwidth, or was loaded into the structure of a fresh "
            "optimizer's, which does not know the pairs of layers yet; take one step with that one before. Nothing was "
            "loaded."
        )
