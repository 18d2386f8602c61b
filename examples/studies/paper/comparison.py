"""The paper's figures beside ours: which are compared, and the verdicts."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.studies.paper.experiments import EXPERIMENTS
from examples.studies.paper.extensions.architectures import ARCHITECTURES
from examples.studies.paper.extensions.labels import LABELS

PUBLISHED = Path(__file__).parent / "published"
WITHIN = "within 2 σ"
OUTSIDE = "NOT"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Published:
    """A published table: its file, the columns that say which variant, and those compared with ours of that name."""

    file: str
    title: str
    variant: tuple[str, ...]
    quantities: tuple[str, ...]
    by_distance: bool = False


@dataclass(frozen=True)
class Finding:
    """A published figure that does not follow from the paper's own code or data."""

    where: str
    reason: str
    quantities: tuple[str, ...] = ()
    phases: tuple[str, ...] = ("init", "mid", "final")
    variant: tuple[tuple[str, str], ...] = ()


TABLES: dict[str, tuple[Published, ...]] = {
    "exp1": (
        Published("table2_exp1_rho_lyapunov_acc.csv", "Table 2", ("L", "arch"), ("rho_max", "lyapunov1", "test_acc")),
        Published("fig2_fig3_exp1_R_C_curves.csv", "Figures 2 and 3", ("L", "arch"), ("R", "C"), True),
    ),
    "exp1_deep": (
        Published("tableN3_exp1_deep.csv", "Table N.3", ("L", "arch"), ("rho_max", "test_acc")),
        Published("exp1_appendix_R_C_curves.csv", "Table N.3, curves", ("L", "arch"), ("R", "C"), True),
    ),
    "exp1b": (
        Published("tableN2_exp1b_spectralnorm.csv", "Table N.2", ("L", "arch"), ("rho_max", "lyapunov1", "test_acc")),
        Published("figN1_exp1b_R_C_curves.csv", "Figure N.1", ("L", "arch"), ("R", "C"), True),
    ),
    "exp2": (
        Published("table3_exp2_bottleneck_L6.csv", "Table 3", ("L", "d_u"), ("D_far", "C_far", "R_far", "test_acc")),
        Published("tableN1_exp2_bottleneck_L8.csv", "Table N.1", ("L", "d_u"), ("D_far", "C_far", "R_far", "test_acc")),
    ),
    "exp3": (
        Published(
            "table5_exp3_gngap_isolation.csv", "Table 5", ("activation",), ("gap_global", "sigma_pp_sq", "test_acc")
        ),
        Published(
            "tableN5_exp3_decomposition_by_distance.csv",
            "Table N.5",
            ("activation",),
            ("sum_frob_tensor", "sum_frob_gn", "gap"),
            True,
        ),
    ),
    "exp3_norm": (
        Published(
            "table4_exp3b_gngap_layernorm.csv", "Table 4", ("activation",), ("gap_global", "sigma_pp_sq", "test_acc")
        ),
        Published(
            "exp3b_ln_decomposition_by_distance.csv",
            "Table 4 by distance",
            ("activation",),
            ("sum_frob_tensor", "sum_frob_gn", "gap"),
            True,
        ),
    ),
    "exp4": (
        Published(
            "tableN4_exp4_diamond_k123.csv",
            "Tables 6 and N.4",
            ("k", "merge", "activation"),
            ("gap", "frob_tensor", "rho_max", "test_acc"),
        ),
        Published(
            "figN2_exp4_branch_resonance.csv",
            "Figure N.2",
            ("k", "merge", "activation"),
            ("R_within_A", "R_within_B", "R_cross_AB"),
            True,
        ),
    ),
    "exp5": (
        Published("table7_exp5_toy_attention.csv", "Table 7", ("model",), ("frob_full", "frob_gn", "gap", "test_loss")),
    ),
    "exp6": (
        Published("exp6_R_C_D_all_checkpoints.csv", "Tables 9 and N.7", ("activation", "arch"), ("R", "C", "D"), True),
        Published("tableN8_exp6_gngap_all_checkpoints.csv", "Tables 8 and N.8", ("activation", "arch"), ("gap",), True),
    ),
    "ablation_probes": (Published("tableN6_exact_vs_stochastic.csv", "Table N.6", ("activation",), ("gap_exact",)),),
}

FINDINGS = (
    Finding(
        "exp5",
        "not what the published code gives: 63.3 / 2.29 / 2.22 by a rerun",
        ("gap", "frob_full", "frob_gn", "frob_tensor"),
        variant=(("model", "attention"),),
    ),
    Finding("exp5", "the published error lies below the protocol's noise floor, 0.137", ("test_loss",)),
    Finding("exp5", "by a rerun of the published code 4.7e-3", ("frob_full", "frob_gn"), ("init",)),
    Finding(
        "exp1b",
        "C(0) is 1 by definition and published as 0.84: it seems that small blocks count as 0",
        ("C",),
        variant=(("L", "16"), ("arch", "plain_SN")),
    ),
    Finding(
        "exp1_deep",
        "the residual network of L = 16 has other figures in Table N.2 and Figure N.1, which ours agree with: after "
        "training its test accuracy is 0.521 ± 0.003 here and 0.510 ± 0.002 there, and its R(0) 2.16 and 1.72",
        ("R", "C", "rho_max", "test_acc"),
        ("mid", "final"),
    ),
    Finding("exp1_deep", "published from 100 random probes; ours is exact", ("R", "C")),
    Finding("exp2", "published from 100 random probes at another width than stated; ours is exact"),
)


@dataclass(frozen=True)
class Line:
    """One published figure beside ours."""

    variant: tuple[str, ...]
    phase: str
    quantity: str
    distance: int | None
    paper: tuple[float, float]
    ours: tuple[float, float] | None
    verdict: str

    @property
    def where(self) -> str:
        return self.quantity if self.distance is None else f"{self.quantity}({self.distance})"


def published_rows(published: Published) -> Iterable[dict[str, str]]:
    """Rows of a published file; a row of figure N.2 is split into the variant, and named by its kind of pair."""
    with (PUBLISHED / published.file).open(newline="") as file:
        for row in csv.DictReader(file):
            if "config" in row:
                row["merge"], row["activation"] = row["config"].split("_")
                for part in ("mean", "std"):
                    row[f"R_{row['kind']}_{part}"] = row[f"R_{part}"]
            yield row


def compare(name: str, published: Published, rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Every figure of a published table in the published order; ``ours`` is None where nothing ran."""
    ours: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["experiment"] == name:
            at = (*(str(row["variant"].get(key)) for key in published.variant), row["phase"], row["distance"])
            ours.setdefault((*at, row["quantity"]), []).append(row)
    lines = []
    for theirs in published_rows(published):
        variant = tuple(theirs[key] for key in published.variant)
        distance = int(theirs["d"]) if published.by_distance else None
        for quantity in published.quantities:
            if f"{quantity}_mean" not in theirs:
                continue
            paper = float(theirs[f"{quantity}_mean"]), float(theirs.get(f"{quantity}_std", "nan"))
            found = ours.get((*variant, theirs["phase"], distance, quantity))
            if found is None:
                lines.append(Line(variant, theirs["phase"], quantity, distance, paper, None, NOT_RUN))
                continue
            values = [row["value"] for row in found]
            mean, spread = statistics.fmean(values), statistics.pstdev(values)
            if within(*paper, mean, spread):
                says = WITHIN
            elif other := elsewhere(name, theirs["phase"], found[0]):
                says = f"not comparable: {other}"
            elif doubt := doubted(name, quantity, theirs):
                says = f"paper inconsistent: {doubt}"
            else:
                says = OUTSIDE
            lines.append(Line(variant, theirs["phase"], quantity, distance, paper, (mean, spread), says))
    return lines


def within(mean: float, spread: float, our_mean: float, our_spread: float) -> bool:
    """Whether two means agree within two standard deviations of a single seed, both sides' together.

    Where neither varies (a gap that is zero to rounding in another arithmetic), whether both are below 1e-5.
    """
    if max(abs(mean), abs(our_mean)) < 1e-5:
        return True
    sigma = math.hypot(0.0 if math.isnan(spread) else spread, our_spread)
    return abs(mean - our_mean) <= max(2 * sigma, 1e-3 * abs(mean))


def elsewhere(name: str, phase: str, row: Mapping[str, Any]) -> str:
    """In what the trained networks were trained otherwise than in the paper, or nothing."""
    if phase == "init":
        return ""
    epochs = EXPERIMENTS[name].schedule.epochs
    parts = []
    if row["epochs"] != epochs:
        parts.append(f"{row['epochs']} of {epochs} epochs")
    if "subset" in row["data"]:
        parts.append("a subset of the images")
    return ", ".join(parts)


def doubted(name: str, quantity: str, theirs: Mapping[str, str]) -> str:
    """Why a published figure is not to be expected, or nothing."""
    for finding in FINDINGS:
        if (
            finding.where == name
            and (not finding.quantities or quantity in finding.quantities)
            and theirs["phase"] in finding.phases
            and all(theirs[key] == value for key, value in finding.variant)
        ):
            return finding.reason
    return ""


def coverage(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which variants, seeds and epochs ran, on what data: a line for each kind of run."""
    kinds: dict[tuple[str, int, tuple[int, ...]], list[str]] = {}
    seeds: dict[tuple[str, int, str], set[int]] = {}
    for row in rows:
        if row["experiment"] == name:
            variant = " ".join(str(value) for value in row["variant"].values())
            seeds.setdefault((row["data"], row["epochs"], variant), set()).add(row["seed"])
    for (data, epochs, variant), found in seeds.items():
        kinds.setdefault((data, epochs, tuple(sorted(found))), []).append(variant)
    whole = len({**EXPERIMENTS, **ARCHITECTURES, LABELS.name: LABELS}[name].variants)
    lines = []
    for (data, epochs, found_seeds), variants in kinds.items():
        which = f"{len(variants)} of {whole} variants ({', '.join(variants)})"
        which = "all variants" if len(variants) == whole else which
        trained = f"{epochs} epoch{'s' * (epochs > 1)}" if epochs else "initialisation only"
        lines.append(f"{data}, {trained}, seeds {', '.join(map(str, found_seeds))}: {which}")
    return lines
