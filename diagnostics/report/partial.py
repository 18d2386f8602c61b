"""Finished sections kept in a file, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.autograd.trees import tensors
from diagnostics.document.values import encode
from diagnostics.errors import DiagnosticsError
from diagnostics.report.workbench import Workbench
from diagnostics.results.files import check_writable, write_text

PARTIAL = "hessopt-diagnostics-partial/1"


class Partial:
    """A file with the sections that are finished; written whole after each, so that it is never half a file.

    Args:
        path: The file, or a folder in which it is called ``partial.json``; None: nothing is kept.
        identity: What the run is of, by :func:`identity`.

    Raises:
        DiagnosticsError: the file is of another run, or is no such file.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: dict[str, str]) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and (self.path.is_dir() or (not self.path.suffix and not self.path.exists())):
            self.path.mkdir(parents=True, exist_ok=True)
            self.path = self.path / "partial.json"
        if self.path is not None:
            check_writable(self.path)
        self._identity = identity
        self.sections: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            self.sections = self._read(self.path)

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keep a finished section, with its seconds."""
        self.sections[name] = result
        if self.path is not None:
            content = {"schema": PARTIAL, "identity": self._identity, "sections": self.sections}
            write_text(self.path, json.dumps(encode(content), allow_nan=False))

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kept, sections = content["identity"], content["sections"]
            schema = content["schema"]
        except (ValueError, KeyError, TypeError):
            schema = None
        if schema != PARTIAL:
            raise DiagnosticsError(f"{path} does not hold the sections of an interrupted run: name another file.")
        for what, value in self._identity.items():
            if kept.get(what) != value:
                raise DiagnosticsError(
                    f"{path} is of a run with other {what}: resume with the same, or delete the file to start anew."
                )
        return dict(sections)


def identity(bench: Workbench) -> dict[str, str]:
    """Digests of what figures depend on: parameters and buffers, the first batch, the loss, the settings."""
    model, batch, settings = bench.model, bench.batch, bench.settings
    modes = "".join("t" if module.training else "e" for module in model.modules())
    nodes = ",".join(bench.graph.chosen)
    how = (nodes, bench.plan.exact, bench.exact, bench.probes, settings.seed, settings.epsilon)
    return {
        "parameters": _digest([*model.parameters(), *model.buffers()]) + modes,
        "data": _digest([*tensors(batch.inputs), *tensors(batch.targets)]),
        "loss": repr(bench.graph.loss.item()),
        "settings": repr(how),
    }


def _digest(values: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
