"""Trained networks on disk: experiments that share networks train them once, and new quantities need no training."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.results.files import replacing
from examples.studies.paper.training import Schedule

Phases: TypeAlias = dict[str, list[nn.Module]]


class Trained:
    """Files of what networks became, found by all that decides it: structure, initial values, schedule, data, seed.

    Args:
        folder: Of the files, one a network.
        networks: The networks as initialised.
        schedule: Of the training; nothing is kept where it has no epochs.
        runs: ``seed`` and ``data`` of each network.
    """

    def __init__(
        self, folder: Path, networks: Sequence[nn.Module], schedule: Schedule, runs: Sequence[Mapping[str, Any]]
    ) -> None:
        self.networks = [copy.deepcopy(network).eval() for network in networks]
        self.epochs = schedule.epochs
        self.paths = [
            folder / f"{_digest(network, schedule, run)}.pt" for network, run in zip(networks, runs, strict=True)
        ]

    def load(self) -> tuple[Phases, float]:
        """Networks by phase and the seconds that training one took; nothing where one of them is missing."""
        if not self.epochs or not all(path.exists() for path in self.paths):
            return {}, 0.0
        phases: Phases = {"init": self.networks}
        seconds = 0.0
        for network, path in zip(self.networks, self.paths, strict=True):
            found = torch.load(path, weights_only=True)
            seconds = found["seconds"]
            for phase, state in found["phases"].items():
                trained = copy.deepcopy(network)
                trained.load_state_dict(state)
                phases.setdefault(phase, []).append(trained)
        return phases, seconds

    def save(self, phases: Phases, seconds: float) -> None:
        if not self.epochs:
            return
        for i, path in enumerate(self.paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            states = {phase: networks[i].state_dict() for phase, networks in phases.items() if phase != "init"}
            with replacing(path) as file:
                torch.save({"seconds": seconds, "phases": states}, file)


def _digest(network: nn.Module, schedule: Schedule, run: Mapping[str, Any]) -> str:
    known = hashlib.sha256(f"{network!r} {schedule} {run['seed']} {run['data']}".encode())
    for name, tensor in network.state_dict().items():
        known.update(name.encode())
        known.update(_bytes(tensor))
    return known.hexdigest()[:24]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
