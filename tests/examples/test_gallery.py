"""Every script of the gallery runs from its command line, on the least that its options allow."""

from __future__ import annotations

import importlib
import pkgutil
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import gallery

COMMANDS = {
    "banded_on_digits": "--seconds 0.01 --seeds 1",
    "burgers": "--seconds 0.01 --out burgers.png",
    "curve_fitting": "--seconds 0.01 --seeds 1 --out curves.png",
    "deep_narrow": "--seconds 0.01 --seeds 1",
    "diagnose_digits": "--steps 2 --out digits.json",
    "diagnose_models": "branches --verdicts --threads 1",
    "distributed": "--epochs 1 --every 50 --out distributed",
    "kronecker_mnist": "--data {data} --images 1100 --epochs 1 --bandwidths 0,1",
    "mnist_autoencoder": "--data {data} --images 200 --seconds 0.01 --scale 0.02 --threads 1",
    "monitor_training": "--steps 4 --every 2 --out curvature.jsonl",
    "poisson": "--seconds 0.01 --networks 2-32-1 --rules 'line search'",
    "quickstart": "--seconds 0.01 --seeds 1 --out quickstart.png",
    "saddles": "--steps 2 --seeds 1",
    "spectra": "--steps 2 --out spectra.png",
    "spectral_digits": "--steps 3 --seeds 1 --out spectral.png",
}
SLOW = {"banded_on_digits", "deep_narrow", "diagnose_digits", "diagnose_models", "quickstart", "saddles", "spectra"}


@pytest.fixture
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own; what scripts set for the whole process is put back."""
    threads, dtype, random = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_rng_state(random)


def write_digits(folder: Path) -> None:
    """1100 random images under the name of MNIST."""
    random = np.random.default_rng(0)
    parts = {
        "x_train": random.integers(0, 256, (1100, 28, 28), np.uint8),
        "y_train": (np.arange(1100) % 10).astype(np.uint8),
    }
    np.savez(folder / "mnist.npz", **parts)


def test_every_script_has_a_command() -> None:
    assert COMMANDS.keys() == {module.name for module in pkgutil.iter_modules(gallery.__path__)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMMANDS]
)
def test_a_script_runs(
    name: str, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "{data}" in COMMANDS[name]:
        write_digits(undisturbed)
    options = shlex.split(COMMANDS[name].format(data=undisturbed))
    monkeypatch.setattr(sys, "argv", [name, *options])
    importlib.import_module(f"examples.gallery.{name}").main()
    assert capsys.readouterr().out
    if "--out" in options:
        assert (undisturbed / options[options.index("--out") + 1]).stat().st_size
