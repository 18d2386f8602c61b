"""Rules about the whole network: what couples samples, is not used or is flat; saddles; block-diagonal methods."""

from __future__ import annotations

import math
from collections.abc import Iterator

from diagnostics.document.figures import Figures, named, percent, reach
from diagnostics.document.values import number
from diagnostics.document.verdict import Finding, Rule

STEPS, MATTERS, MOST_DISCARDED, LEAST_DISCARDED, FLAT = 100, 0.01, 0.5, 0.05, 1e-6


def coupled(figures: Figures) -> Iterator[Finding]:
    """Samples that influence each other."""
    network = figures.sections["network"]
    if network["coupled"] or network["batch_norm_in_training"]:
        kind = "batch_norm" if network["batch_norm_in_training"] else "other"
        yield kind, (), {"batch_size": network["batch_size"]}, True


def unused(figures: Figures) -> Iterator[Finding]:
    """Parameters on no tape."""
    names = figures.sections["network"]["unused_parameters"]
    if names:
        values = {"count": len(names), "which": named(names), "verb": "is" if len(names) == 1 else "are"}
        yield "unused", (), values, True


def piecewise_linear(figures: Figures) -> Iterator[Finding]:
    """A tensor part that is zero everywhere."""
    tensor, gn = figures.metric("tensor_norm"), figures.metric("gn_norm")
    largest = gn.max().item()
    if len(figures.nodes) > 1 and largest > 0 and bool((tensor <= FLAT * largest).all()):
        nodes = figures.sections["network"]["nodes"]
        bends = any(node["bends"] for node in nodes if node.get("gradient", math.nan) is not None)
        yield "no_signal" if bends else "flat", (), {"ratio": (tensor.max() / largest).item()}, True


def saddle(figures: Figures) -> Iterator[Finding]:
    """A move along negative curvature that gains more than a hundred gradient steps would."""
    spectrum = figures.sections["spectrum"]
    gain, loss = number(spectrum.get("escape_gain")), number(spectrum["loss"])
    largest, smallest = number(spectrum["H"]["largest"]), number(spectrum["H"]["smallest"])
    norm = max(abs(largest), abs(smallest))  # of Ritz values, which lie inside the spectrum: a step's gain is no larger
    if not (norm > 0 and gain >= MATTERS * abs(loss)):
        return
    step = number(spectrum["gradient_norm"]) ** 2 / (2 * norm)
    if gain > STEPS * step:
        values = {"gain": gain, "loss": loss, "steps": gain / step if step > 0 else math.inf, "smallest": smallest}
        values |= {"length": number(spectrum["escape_length"]), "step": step}
        shown = f"{values['steps']:.2g} gradient steps" if step > 0 else "any gradient step"
        yield "saddle", (), values | {"shown": shown}, True


def block_diagonal(figures: Figures) -> Iterator[Finding]:
    """What a block-diagonal approximation discards of the parameters' Gauss-Newton matrix."""
    section = figures.sections["parameters"]
    if len(section["nodes"]) < 2 or not section["discarded"]:
        return
    row = section["discarded"][0]
    share, margin = number(row["gn"]), reach(section["probes"]) * number(row["gn_error"])
    values = {"share": share, "margin": margin, "shown": percent(share), "total": number(row["total"])}
    if share > MOST_DISCARDED:
        yield "loses", (), values, share - margin > MOST_DISCARDED
    elif share < LEAST_DISCARDED:
        yield "suffices", (), values, share + margin < LEAST_DISCARDED


WHOLE_RULES = (
    Rule(
        "coupled-samples",
        "warning",
        "A product seeded at some samples arrives at others, or a batch-norm is in training mode.",
        {},
        "docs/recursion.md, Samples",
        {
            "batch_norm": "batch-norm in training mode couples the {batch_size} samples: figures are of this batch as "
            "a whole; call model.eval() for those of the network at inference",
            "other": "the {batch_size} samples influence each other: figures are of this batch as a whole",
        },
        coupled,
        ("network",),
    ),
    Rule(
        "unused-parameters",
        "warning",
        "A parameter that requires grad is on the tape of no node, nor on that of the loss.",
        {},
        "docs/parametric.md",
        {"unused": "{which} {verb} not used in the forward pass: no gradient and no curvature"},
        unused,
        ("network",),
    ),
    Rule(
        "saddle",
        "advice",
        "A move along the eigenvector of λ_min lowers the loss by at least one per cent and by more than 100 gradient "
        "steps would, each counted as |g|²/(2‖H‖).",
        {"most_steps": STEPS, "least_share": MATTERS},
        "Dauphin et al. 2014; docs/saddle.md",
        {
            "saddle": "near a saddle: along negative curvature (λ_min = {smallest:.3g}) the loss falls by {gain:.3g} "
            "from {loss:.3g}, as much as by {shown}; hessopt.SaddleEscape leaves along it"
        },
        saddle,
        ("spectrum",),
    ),
    Rule(
        "piecewise-linear",
        "note",
        "The tensor part of every pair of two nodes or more is zero: at most 1e-6 of the largest |GN|.",
        {"limit": FLAT},
        "Thm 33; docs/recursion.md, Non-smooth points",
        {
            "flat": "piecewise linear between its nodes: the tensor part is zero and H = GN for activations, so "
            "curvature='ggn' leaves out nothing but what products of weights make",
            "no_signal": "nodes bend, but the tensor part is zero: hardly any gradient arrives from the loss, or they "
            "bend where nothing passes",
        },
        piecewise_linear,
        ("network", "metrics"),
    ),
    Rule(
        "block-diagonal",
        "advice",
        "The share of |GN|² of the parameters outside the diagonal blocks, grouped by node, is above 0.5 or below "
        "0.05.",
        {"most": MOST_DISCARDED, "least": LEAST_DISCARDED},
        "Cor. 29; docs/bounds.md, Interaction radius and band errors",
        {
            "loses": "a block-diagonal approximation of the parameters' GN discards {shown} of ‖GN‖²: prefer a method "
            "that sees curvature between layers",
            "suffices": "a block-diagonal approximation of the parameters' GN discards only {shown} of ‖GN‖²: one "
            "block a layer is enough",
        },
        block_diagonal,
        ("parameters",),
    ),
)
