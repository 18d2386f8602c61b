"""Rules about the whole network: what couples samples, is not used or is flat; spectrum; block-diagonal methods."""

from __future__ import annotations

from collections.abc import Iterator

from diagnostics.reporting.figures import Figures, named, percent, reach
from diagnostics.reporting.values import number
from diagnostics.verdicts import Finding, Rule

NEGATIVE, MOST_DISCARDED, LEAST_DISCARDED, FLAT = 0.1, 0.5, 0.05, 1e-6


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
    if largest > 0 and bool((tensor <= FLAT * largest).all()):
        bends = any(node["bends"] for node in figures.sections["network"]["nodes"])
        yield "no_signal" if bends else "flat", (), {"ratio": (tensor.max() / largest).item()}, True


def stability(figures: Figures) -> Iterator[Finding]:
    """sρ < 1."""
    gains = figures.sections["bounds"]["gains"]
    if gains is not None and number(gains["margin"]) > 0 and number(gains["rho"]) > 0:
        values = {"ratio": 1 - number(gains["margin"]), "rho": number(gains["rho"]), "children": gains["children"]}
        yield "stable", (), values, True


def negative_curvature(figures: Figures) -> Iterator[Finding]:
    """A negative eigenvalue that is not small against the largest."""
    spectrum = figures.sections["spectrum"]
    largest, smallest = number(spectrum["H"]["largest"]), number(spectrum["H"]["smallest"])
    if not smallest < -NEGATIVE * abs(largest):
        return
    # Ritz values lie inside the spectrum: the true λ_min is no larger, λ_max at most a residual larger
    sure = smallest < -NEGATIVE * (abs(largest) + number(spectrum["H"]["largest_residual"]))
    ratio = abs(smallest) / abs(largest) if largest else float("inf")
    values = {"smallest": smallest, "largest": largest, "ratio": ratio, "shown": percent(ratio)}
    section = figures.sections.get("sources", {})
    shares = [number(value) for value in section.get("negative_share") or []]
    top = max(range(len(shares)), key=lambda i: shares[i]) if shares and number(section["negative_mass"]) > 0 else None
    if top is None:
        yield "negative", (), values, sure
    else:
        node = section["sources"][top]
        yield "made_by", (node,), values | {"node": node, "share": shares[top]}, sure


def block_diagonal(figures: Figures) -> Iterator[Finding]:
    """What a block-diagonal approximation discards of the parameters' Hessian."""
    section = figures.sections["parameters"]
    if len(section["nodes"]) < 2 or not section["discarded"]:
        return
    row = section["discarded"][0]
    share, margin = number(row["total"]), reach(section["probes"]) * number(row["total_error"])
    values = {"share": share, "margin": margin, "shown": percent(share), "gn": number(row["gn"])}
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
        "negative-curvature",
        "advice",
        "λ_min of the parameters' Hessian is below −0.1 |λ_max|.",
        {"limit": NEGATIVE},
        "Dauphin et al. 2014; m⁻ in docs/sources.md; docs/saddle.md",
        {
            "negative": "the loss curves down: λ_min = {smallest:.3g}, {shown} of λ_max = {largest:.3g}; near a "
            "stationary point hessopt.SaddleEscape leaves along it",
            "made_by": "the loss curves down: λ_min = {smallest:.3g}, {shown} of λ_max = {largest:.3g}, and "
            "{node} makes most of the negative curvature between nodes; near a stationary point hessopt.SaddleEscape "
            "leaves along it",
        },
        negative_curvature,
        ("spectrum",),
    ),
    Rule(
        "piecewise-linear",
        "note",
        "The tensor part of every pair is zero: at most 1e-6 of the largest |GN|.",
        {"limit": FLAT},
        "Thm 33; docs/recursion.md, Non-smooth points",
        {
            "flat": "piecewise linear between its nodes: the tensor part is zero and H = GN for activations",
            "no_signal": "nodes bend, but the tensor part is zero: hardly any gradient arrives from the loss, or they "
            "bend where nothing passes",
        },
        piecewise_linear,
        ("network", "metrics"),
    ),
    Rule(
        "block-diagonal",
        "advice",
        "The share of |H|² of the parameters outside the diagonal blocks, grouped by node, is above 0.5 or below 0.05.",
        {"most": MOST_DISCARDED, "least": LEAST_DISCARDED},
        "Cor. 29; docs/bounds.md, Interaction radius and band errors",
        {
            "loses": "a block-diagonal approximation discards {shown} of the parameters' ‖H‖²: curvature between "
            "layers matters",
            "suffices": "a block-diagonal approximation discards only {shown} of the parameters' ‖H‖²",
        },
        block_diagonal,
        ("parameters",),
    ),
    Rule(
        "geometric-stability",
        "note",
        "sρ < 1: the largest number of children times the largest norm of a local Jacobian.",
        {"limit": 1.0},
        "Cor. 73; docs/bounds.md, Decay",
        {"stable": "sρ = {ratio:.2g} < 1: what a node does to later ones decays geometrically, at any depth"},
        stability,
        ("bounds",),
    ),
)
