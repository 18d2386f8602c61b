"""Reads the data sets, from ``.npz`` files or torchvision's layout, once for all runs of a process.

A folder may hold

- ``mnist.npz``, ``cifar10.npz`` (``x_train``, ``y_train``, ``x_test``, ``y_test``; images uint8, channels last), or
  torchvision's ``MNIST/raw/*-ubyte`` and ``cifar-10-batches-py/*``;
- ``tabular/NAME.npz`` (``X``, ``y`` and, if there is an official split, ``test_mask``), ``tinyshakespeare.txt``.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[Any]
Images: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor]"

IMAGE_KEYS = ("x_train", "y_train", "x_test", "y_test")


@lru_cache(maxsize=4)
def mnist(folder: Path, train: int, test: int) -> Images:
    """The first ``train`` and ``test`` images, ``(N, 784)`` in [0, 1], and their digits: x, y, x_test, y_test."""
    found = _mnist(folder, ("train", "test"))
    x, y, x_test, y_test = _first(found, train, test)
    return x.flatten(1).float() / 255, y, x_test.flatten(1).float() / 255, y_test


def mnist_pixels(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` training images as they are stored, uint8 ``(count, 28, 28)``, and their digits."""
    found = _mnist(folder, ("train",))
    x, y = (torch.from_numpy(np.array(found[key][:count])) for key in ("x_train", "y_train"))
    return x, y.long()


@lru_cache(maxsize=4)
def cifar10(folder: Path, train: int, test: int) -> Images:
    """The first ``train`` and ``test`` images, ``(N, 3, 32, 32)``, each channel standardised, and their classes."""
    pixels, labels, test_pixels, test_labels = cifar10_pixels(folder, train, test)
    inputs, test_inputs = (p.permute(0, 3, 1, 2).float() / 255 for p in (pixels, test_pixels))
    deviation, mean = torch.std_mean(inputs, dim=(0, 2, 3), keepdim=True)
    return (inputs - mean) / deviation, labels, (test_inputs - mean) / deviation, test_labels


def cifar10_pixels(folder: Path, train: int = 50000, test: int = 10000) -> Images:
    """The first ``train`` and ``test`` images as they are stored, uint8 ``(N, 32, 32, 3)``, and their classes."""
    packed, batches = folder / "cifar10.npz", folder / "cifar-10-batches-py"
    if packed.exists():
        found = arrays(packed, IMAGE_KEYS)
    elif batches.is_dir():
        parts = [_cifar_batch(batches / f"data_batch_{i}") for i in range(1, 6) if 10000 * (i - 1) < train]
        x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
        x_test, y_test = _cifar_batch(batches / "test_batch")
        found = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    else:
        raise FileNotFoundError(f"neither {packed} nor {batches} exists: pass the folder of CIFAR-10 as `--data DIR`.")
    return _first(found, train, test)


def cifar100_pixels(folder: Path) -> tuple[Images, str]:
    """All images of CIFAR-100 that the folder has (``cifar100*.npz`` or ``cifar-100-python``), and which these are."""
    packed, whole = sorted(folder.glob("cifar100*.npz")), folder / "cifar-100-python"
    if whole.is_dir():
        x, y = _cifar_batch(whole / "train", b"fine_labels")
        x_test, y_test = _cifar_batch(whole / "test", b"fine_labels")
        found: Mapping[str, Array] = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
        name = "CIFAR-100"
    elif packed:
        found, name = arrays(packed[0], IMAGE_KEYS), packed[0].stem
    else:
        raise FileNotFoundError(f"neither {whole} nor cifar100*.npz in {folder} exists: pass the folder by `--data`.")
    images = _first(found, len(found["x_train"]), len(found["x_test"]))
    return images, f"{name}, {len(images[0])} training images"


@lru_cache(maxsize=8)
def tabular(folder: Path, name: str) -> tuple[Array, Array, Array | None]:
    """``X`` (N, d), ``y`` (N,) and the mask of the test rows of official split 0, or None if there is none."""
    path = folder / "tabular" / f"{name}.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: pass the folder that has it as `--data DIR`.")
    with np.load(path) as found:
        mask = found["test_mask"][0] if "test_mask" in found.files else None
        return found["X"].astype(np.float64), found["y"].astype(np.float64), mask


@lru_cache(maxsize=1)
def characters(folder: Path) -> tuple[Tensor, int]:
    """The text of ``tinyshakespeare.txt`` as numbers of its distinct characters, and how many there are of these."""
    path = folder / "tinyshakespeare.txt"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: pass the folder that has it as `--data DIR`.")
    with path.open(encoding="utf-8", newline="") as file:  # as it is: no translation of line ends
        alphabet, numbers = np.unique(np.array(list(file.read())), return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), len(alphabet)


def arrays(path: Path, keys: tuple[str, ...]) -> Mapping[str, Array]:
    """Arrays of an ``.npz`` file; one packed with LZMA, slow to unpack, is kept unpacked in the user's cache folder."""
    with zipfile.ZipFile(path) as archive:
        slow = any(entry.compress_type == zipfile.ZIP_LZMA for entry in archive.infolist())
    if not slow:
        with np.load(path) as found:
            return {key: found[key] for key in keys}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hessopt-ablation"
    status = path.stat()
    unpacked = cache / f"{path.stem}-{status.st_size}-{status.st_mtime_ns}"
    if not unpacked.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that a process that runs at the same time never sees half of it.
        partial = Path(tempfile.mkdtemp(dir=cache))
        with np.load(path) as found:
            for key in keys:
                np.save(partial / f"{key}.npy", found[key])
        try:
            partial.rename(unpacked)
        except OSError:
            shutil.rmtree(partial)
            if not unpacked.is_dir():
                raise
    return {key: np.load(unpacked / f"{key}.npy", mmap_mode="r") for key in keys}


def _mnist(folder: Path, splits: tuple[str, ...]) -> Mapping[str, Array]:
    """``x_train``, ``y_train``, ``x_test``, ``y_test``, as far as they are of the splits."""
    packed, raw = folder / "mnist.npz", folder / "MNIST" / "raw"
    if packed.exists():
        return arrays(packed, tuple(f"{kind}_{split}" for split in splits for kind in "xy"))
    if not raw.is_dir():
        raise FileNotFoundError(f"neither {packed} nor {raw} exists: pass the folder of MNIST as `--data DIR`.")
    prefixes = {"train": "train", "test": "t10k"}
    files = {"x": "images-idx3-ubyte", "y": "labels-idx1-ubyte"}
    return {f"{k}_{split}": _idx(raw / f"{prefixes[split]}-{file}") for split in splits for k, file in files.items()}


def _first(found: Mapping[str, Array], train: int, test: int) -> Images:
    """The first rows, copied: labels as int64, images as they are."""
    x, y = (torch.from_numpy(np.array(found[key][:train])) for key in ("x_train", "y_train"))
    x_test, y_test = (torch.from_numpy(np.array(found[key][:test])) for key in ("x_test", "y_test"))
    return x, y.long(), x_test, y_test.long()


def _idx(path: Path) -> Array:
    """An array in the IDX format: two zero bytes, type 8 (uint8), number of dimensions, sizes as big-endian int32."""
    content = path.read_bytes()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes.")
    dimensions = content[3]
    sizes = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)


def _cifar_batch(path: Path, labels: bytes = b"labels") -> tuple[Array, Array]:
    with path.open("rb") as file:
        found = pickle.load(file, encoding="bytes")
    return found[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(found[labels])
