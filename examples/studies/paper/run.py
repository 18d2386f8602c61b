"""Runs one experiment for several seeds: train, measure at init, mid and final, store."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.studies.paper.experiments import EXPERIMENTS, Experiment, Variant
from examples.studies.paper.extensions.architectures import ARCHITECTURES
from examples.studies.paper.extensions.labels import LABELS
from examples.studies.paper.images import Data, cifar10, cifar100, generated, toy_regression
from examples.studies.paper.measurement import Batch, Rows, accuracy, row
from examples.studies.paper.networks import Network
from examples.studies.paper.store import Store
from examples.studies.paper.trained import Phases, Trained
from examples.studies.paper.training import Schedule, train, train_alone


def load(experiment: Experiment, folder: Path | None, seed: int) -> Data:
    if experiment.load is not None:
        return experiment.load(folder, seed)
    if experiment.data == "toy":
        return toy_regression(seed)
    if folder is None:
        return generated(classes=experiment.classes)
    return cifar10(folder) if experiment.data == "cifar10" else cifar100(folder)


RESULTS = Path(__file__).parent / "results"
SCRATCH = Path("paper-results")


def run(
    experiment: Experiment,
    seeds: Sequence[int],
    store: Store,
    folder: Path | None = None,
    epochs: int | None = None,
    trained: Path | None = None,
) -> None:
    """Add what is missing of the experiment's variants and seeds to the store; ``trained``: folder of networks."""
    schedule = experiment.schedule if epochs is None else replace(experiment.schedule, epochs=epochs)
    if experiment.data != "toy" and folder is None:
        schedule = replace(schedule, epochs=0)  # labels are random: nothing to learn
    shared = None if experiment.data == "toy" else load(experiment, folder, 0)
    for variant in tqdm(experiment.variants, desc=experiment.name, disable=None):
        data = {seed: shared or load(experiment, folder, seed) for seed in seeds}
        runs = {
            seed: {
                "experiment": experiment.name,
                "variant": variant,
                "seed": seed,
                "epochs": schedule.epochs,
                "data": data[seed].origin,
            }
            for seed in seeds
        }
        missing = [seed for seed in seeds if not store.has(runs[seed])]
        if not missing:
            continue
        networks = [_initialised(experiment, variant, seed) for seed in missing]
        cache = trained and Trained(trained, networks, schedule, [runs[seed] for seed in missing])
        phases, seconds = cache.load() if cache else ({}, 0.0)
        if not phases:
            start = time.perf_counter()
            phases = _trained(experiment, networks, [data[seed] for seed in missing], schedule, missing, str(variant))
            seconds = (time.perf_counter() - start) / len(missing)
            if cache:
                cache.save(phases, seconds)
        for i, seed in enumerate(missing):
            rows: Rows = [{"phase": "final", **row("training_seconds", seconds)}]
            for phase in experiment.phases & phases.keys():
                network = phases[phase][i]
                assert isinstance(network, Network)
                rows += [{"phase": phase, **r} for r in measure(experiment, variant, network, data[seed], seed)]
            store.add(runs[seed], rows)


def _trained(
    experiment: Experiment,
    networks: Sequence[Network],
    data: Sequence[Data],
    schedule: Schedule,
    seeds: Sequence[int],
    name: str,
) -> Phases:
    if not experiment.alone:
        return train(networks, data, experiment.loss, schedule, seeds, name)
    augment = crop_and_flip if experiment.augmented else None
    single = [
        train_alone(network, d, experiment.loss, schedule, seed, name, augment)
        for network, d, seed in zip(networks, data, seeds, strict=True)
    ]
    return {phase: [found[phase] for found in single] for phase in single[0]}


def measure(experiment: Experiment, variant: Variant, network: Network, data: Data, seed: int) -> Rows:
    batch = Batch(data.x_test[: experiment.batch], data.y_test[: experiment.batch])
    network.eval()
    return [*experiment.measure(network, batch, variant, seed), *accuracy(network, data.x_test, data.y_test)]


def _initialised(experiment: Experiment, variant: Variant, seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return experiment.build(variant)


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the images padded by 4, half of them mirrored."""
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, len(x)), generator=generator)
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    columns = torch.arange(32) + left[:, None]
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = torch.arange(32) + top[:, None]
    every = torch.arange(len(x))[:, None, None, None]
    channels = torch.arange(3)[None, :, None, None]
    return padded[every, channels, rows[:, None, :, None], columns[:, None, None, :]]


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.paper",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", choices=GROUPS, help="default: every one")
    parser.add_argument("--data", type=Path, help="folder of CIFAR (.npz or torchvision's layout)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--epochs", type=int, help="other than the paper's")
    parser.add_argument("--quick", action="store_true", help="generated images, initialisation only, three seeds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results (default: those of the page; with --quick, {SCRATCH})"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME=VALUE", help="only the variants with these values, as k=2"
    )
    parser.add_argument("--trained", type=Path, default=SCRATCH / "trained", help="folder that keeps trained networks")
    return parser


GROUPS: dict[str, Sequence[Experiment]] = {
    **{name: (experiment,) for name, experiment in EXPERIMENTS.items()},
    "architectures": tuple(ARCHITECTURES.values()),
    "labels": (LABELS,),
}
"""The experiments behind each name of the command line."""


def main(description: str | None, given: Sequence[str] | None = None) -> None:
    """Run the experiments of a name, or all, and print the tables of each."""
    from examples.studies.paper.tables import report  # after the arguments, so that --help is quick

    options: Any = arguments(description).parse_args(given)
    torch.set_num_threads(options.threads)
    folder = None if options.quick else options.data
    groups = {options.name: GROUPS[options.name]} if options.name else GROUPS
    wanted = {e.name: e for e in only([e for group in groups.values() for e in group], options.only)}
    for name, group in groups.items():
        store = Store((options.out or (SCRATCH if options.quick else RESULTS)) / f"{name}.jsonl")
        for experiment in (wanted[e.name] for e in group if e.name in wanted):
            if folder is None and not options.quick and experiment.data != "toy":
                raise SystemExit("pass --data DIR with the data sets, or --quick for what needs none.")
            seeds = options.seeds[: experiment.quick_seeds] if options.quick else options.seeds
            run(experiment, seeds, store, folder, options.epochs, options.trained)
            print(report(experiment.name, store.rows))


def only(experiments: Sequence[Experiment], wanted: Sequence[str]) -> list[Experiment]:
    """The experiments with those of their variants that have the values of all ``name=value``."""
    pairs = [item.partition("=")[::2] for item in wanted]
    variants = {e.name: [v for v in e.variants if all(str(v.get(k)) == x for k, x in pairs)] for e in experiments}
    if not any(variants.values()):
        raise SystemExit(
            f"no variant has {', '.join(wanted)}; they are {[v for e in experiments for v in e.variants]}."
        )
    return [replace(e, variants=variants[e.name]) for e in experiments if variants[e.name]]
