"""The state of :class:`hessopt.kronecker_band.KroneckerBand`: averages, inverses, and where its schedule stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diagnostics.cliques import Bandwidth
from hessopt.kronecker_layers import Rows

if TYPE_CHECKING:
    from hessopt.kronecker_band import KroneckerBand


def state_of(band: KroneckerBand) -> dict[str, Any]:
    """Everything that the next steps depend on, as tensors and plain numbers."""
    state: dict[str, Any] = {
        "steps": band.steps, "damping": band.damping, "scale": band.scale, "generator": band.gathering.random_state,
        "active": band.recorder.active, "left_out": band.left_out.clone(),
    }  # fmt: skip
    if band.factors is not None and band.inverse is not None and band.distances is not None:
        state.update(
            called=list(band.called),
            distances=torch.from_numpy(band.distances),
            updates=band.factors.updates,
            skipped=band.factors.skipped.clone(),
            ready=band.inverse.ready,
            excluded=list(band.excluded),
            rows=list(band.rows),
            bandwidth=band.bandwidth,
            tensors=[t.clone() for t in [*band.factors.tensors, *band.inverse.tensors, *band.diagonals.values()]],
        )
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
        ValueError: the state is of another network or bandwidth.
    """
    mismatch = "the state's factors are of another network or bandwidth than this optimizer's."
    if state.get("bandwidth", band.bandwidth) not in (candidates or [band.bandwidth]):
        raise ValueError(mismatch)
    band.steps, band.damping, band.scale = int(state["steps"]), float(state["damping"]), float(state["scale"])
    saved = state["generator"].cpu()
    if saved.shape == band.generator.get_state().shape:
        band.generator.set_state(saved)
    else:
        band.generator.manual_seed(band.seed)  # of another kind of device: no state of this one's
    band.start(bool(state["active"]))
    band.left_out.fill_(state.get("left_out", 0))  # there is none in states of older versions
    band.probe, band.last = None, []
    band.recorder.linking = not state.get("updates")
    if "tensors" not in state:
        band.factors, band.inverse = None, None
        return
    if any(not 0 <= number < len(band.blocks) for number in state["called"]):
        raise ValueError(mismatch)
    band.bandwidth = state["bandwidth"]
    for number, block in enumerate(band.blocks):
        if number not in state["called"]:
            band.others.update(dict.fromkeys(block.parameters, "its layer was not called at the first step"))
    band.build(state["called"], state["distances"].cpu().numpy())
    assert band.factors is not None
    assert band.inverse is not None
    band.factors.updates, band.inverse.ready = int(state["updates"]), bool(state["ready"])
    band.factors.skipped.fill_(state.get("skipped", 0))  # there are none in states of older versions
    band.excluded, band.rows = list(state["excluded"]), list(state["rows"])
    own, tensors = [*band.factors.tensors, *band.inverse.tensors, *band.diagonals.values()], state["tensors"]
    if "probe" in state:
        band.probe = band.blank_factors(*candidates)
        band.probe.updates, band.samples = int(state["probe"]["updates"]), int(state["probe"]["samples"])
        band.probe.skipped.fill_(state["probe"].get("skipped", 0))
        last = state["probe"]["last"]
        band.last = [None if row is None else Rows(*(t.to(band.device) for t in row)) for row in last]
        own, tensors = [*own, *band.probe.tensors], [*tensors, *state["probe"]["tensors"]]
    if [t.shape for t in own] != [t.shape for t in tensors]:
        raise ValueError(mismatch)
    for mine, saved in zip(own, tensors, strict=True):
        mine.copy_(saved)
