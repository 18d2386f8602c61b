"""What the command is given by name: the model, the data, the loss, a config file. Errors say which and why."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diagnostics.autograd.trees import map_tensors
from diagnostics.errors import DiagnosticsError, SectionFailedWarning
from diagnostics.rendering.formats import COMPARISON_FORMATS, REPORT_FORMATS, check_out, check_place
from diagnostics.report.budget import Budget
from diagnostics.report.compare import Comparison, compare
from diagnostics.report.diagnose import diagnose, wanted_sections
from diagnostics.report.interrupted import DiagnosisInterrupted
from diagnostics.report.report import Report
from diagnostics.report.settings import DiagnosisSettings

_TEXT, _TEXTS = "a string", "a list of strings"
_OPTIONS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(("model", "data", "loss", "exact", "device", "dtype", "mode", "out", "resume"), (_TEXT, (str,))),
    **dict.fromkeys(("checkpoint", "nodes", "sections"), (_TEXTS, (list,))),
    **dict.fromkeys(("probes", "seed"), ("an integer", (int,))),
    **dict.fromkeys(("epsilon", "memory", "seconds"), ("a number", (int, float))),
    "quiet": ("true or false", (bool,)),
}
_CHOICES = {"exact": ("auto", "yes", "no"), "dtype": ("float32", "float64"), "mode": ("eval", "train")}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``report``: those of the config file, and over them those of the command line."""
    given = {name: getattr(options, name) for name in _OPTIONS if getattr(options, name) is not None}
    chosen = read_config(options.config) | given if options.config is not None else given
    for name in ("model", "data", "loss"):
        if name not in chosen:
            shown = "MODULE:FACTORY" if name == "model" else f"--{name}"
            raise DiagnosticsError(f"the {name} is missing: give {shown} or `{name}` in a config file.")
    _check(chosen, options.config)
    return chosen


def _check(chosen: Mapping[str, Any], config: str | None) -> None:
    """What can be wrong with options alone, found before minutes of work, not after."""
    memory = chosen.get("memory", 1.0)
    if not 0 < memory < math.inf:
        raise DiagnosticsError(f"--memory: expected a positive number of GiB, got {memory}.")
    _settings(chosen)
    Budget(chosen.get("seconds"))
    wanted_sections(chosen.get("sections"))
    for checkpoint in chosen.get("checkpoint", []):
        if not Path(checkpoint).exists():
            raise DiagnosticsError(f"there is no checkpoint {checkpoint}.")
    if "out" in chosen:
        check_out(chosen["out"], REPORT_FORMATS if len(chosen.get("checkpoint", [])) < 2 else COMPARISON_FORMATS)
    if "resume" in chosen:
        resume = Path(chosen["resume"])
        if resume.suffix and not resume.is_dir():
            check_place("--resume", resume)
    places = {"out": chosen.get("out"), "resume": chosen.get("resume"), "config": config}
    named = [(name, os.path.realpath(place)) for name, place in places.items() if place is not None]
    for (one, place), (other, same) in combinations(named, 2):
        if place == same:
            raise DiagnosticsError(f"--{one} and --{other} name the same file: it would be overwritten.")


def read_config(path: str) -> dict[str, Any]:
    """A TOML or JSON file of options.

    Raises:
        DiagnosticsError: it cannot be read, or a key is unknown or of the wrong type; the message names it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DiagnosticsError(f"the config file {path} cannot be read: {error.strerror}.") from error
    try:
        content = json.loads(text) if path.endswith(".json") else _toml(text)
    except ValueError as error:
        raise DiagnosticsError(f"the config file {path} is not valid: {error}.") from error
    if not isinstance(content, dict):
        raise DiagnosticsError(f"the config file {path} holds no options by name.")
    for key, value in content.items():
        if key not in _OPTIONS:
            raise DiagnosticsError(f"{path}: {key}: no such option; there are {', '.join(_OPTIONS)}.")
        expected, kinds = _OPTIONS[key]
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong or (kinds == (list,) and not all(isinstance(entry, str) for entry in value)):
            raise DiagnosticsError(f"{path}: {key}: expected {expected}, got {value!r}.")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise DiagnosticsError(f"{path}: {key}: expected one of {', '.join(_CHOICES[key])}, got {value!r}.")
    return content


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef, import-not-found, unused-ignore]
        except ImportError:
            raise DiagnosticsError(
                "TOML needs Python 3.11, or the package tomli: install it, or write the config as .json."
            ) from None
    return tomllib.loads(text)


def run_report(chosen: Mapping[str, Any]) -> Report | Comparison:
    """The report that the options ask for; of several checkpoints, a comparison."""
    loss_fn = _loss(chosen["loss"])
    model = _model(chosen)
    arguments: dict[str, Any] = {name: chosen[name] for name in ("nodes", "sections") if name in chosen}
    arguments["settings"] = _settings(chosen)
    arguments["exact"] = {"auto": None, "yes": True, "no": False}[chosen.get("exact", "auto")]
    data = _data(chosen, model)
    checkpoints: list[str | None] = list(chosen.get("checkpoint") or [None])
    reports: list[Report] = []
    budget = Budget(chosen.get("seconds"))
    for checkpoint in checkpoints:
        seconds = None if budget.seconds is None else max(budget.left / (len(checkpoints) - len(reports)), 1e-3)
        resume = chosen.get("resume")
        if resume is not None and len(checkpoints) > 1:  # a file each
            resume = str(Path(resume).with_suffix(f".{len(reports)}{Path(resume).suffix or '.json'}"))
        here = {"checkpoint": checkpoint, "resume": resume, "seconds": seconds}
        try:
            reports.append(_diagnosed(model, data, loss_fn, **here, **arguments))
        except DiagnosisInterrupted as stop:
            raise DiagnosisInterrupted(_together([*reports, cast(Report, stop.report)])) from None
        except KeyboardInterrupt:
            if not reports:
                raise
            raise DiagnosisInterrupted(_together(reports)) from None
    return _together(reports)


def _settings(chosen: Mapping[str, Any]) -> DiagnosisSettings:
    numbers = {name: chosen[name] for name in ("probes", "seed", "epsilon") if name in chosen}
    if "memory" in chosen:
        numbers["memory_limit"] = max(1, int(chosen["memory"] * 2**30))
    return DiagnosisSettings(**numbers)


def _together(reports: list[Report]) -> Report | Comparison:
    return reports[0] if len(reports) == 1 else compare(reports)


def _diagnosed(model: nn.Module, data: Any, loss_fn: Any, **arguments: Any) -> Report:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SectionFailedWarning)  # the command says it itself
            return diagnose(model, data, loss_fn, **arguments)
    except (DiagnosticsError, ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # of the user's own model or loss
        raise DiagnosticsError(f"model, data and loss do not fit together: {_cause(error)}") from error


def _model(chosen: Mapping[str, Any]) -> nn.Module:
    model = _called(chosen["model"], "factory", nn.Module)
    if not isinstance(model, nn.Module):
        raise DiagnosticsError(f"the factory {chosen['model']} returned a {type(model).__name__}, not a module.")
    if "dtype" in chosen:
        model = model.to(getattr(torch, chosen["dtype"]))
    if "device" in chosen:
        try:
            model = model.to(chosen["device"])
        except (RuntimeError, AssertionError) as error:
            raise DiagnosticsError(f"--device {chosen['device']}: {_cause(error)}") from error
    return model.train(chosen.get("mode", "eval") == "train")


def _data(chosen: Mapping[str, Any], model: nn.Module) -> Any:
    data = _called(chosen["data"], "loader", torch.utils.data.DataLoader)
    if data is None:
        raise DiagnosticsError(f"the loader {chosen['data']} returned None, not batches.")
    if "dtype" not in chosen:
        return data
    dtype = getattr(torch, chosen["dtype"])

    def converted(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    if isinstance(data, tuple):
        return map_tensors(converted, data)
    return _Converted(data, converted)


class _Converted:
    """Batches of a source, converted as they are read."""

    def __init__(self, source: Any, convert: Any) -> None:
        self._source, self._convert = source, convert

    def __iter__(self) -> Any:
        return (map_tensors(self._convert, item) for item in self._source)

    def __len__(self) -> int:
        return len(self._source)


def _loss(name: str) -> Any:
    if ":" in name:
        loss = _named(name, "loss")
        if isinstance(loss, type):
            loss = loss()
        if not callable(loss):
            raise DiagnosticsError(f"the loss {name} is a {type(loss).__name__}, not a function of (output, targets).")
        return loss
    loss = getattr(nn.functional, name, None)
    if not callable(loss) or name.startswith("_"):
        raise DiagnosticsError(
            f"there is no loss {name!r} in torch.nn.functional: give one, such as cross_entropy or mse_loss, or "
            "MODULE:FUNCTION."
        )
    return loss


def _called(name: str, what: str, ready: type) -> Any:
    """What ``MODULE:NAME`` is, or returns where it is a function or a class."""
    found = _named(name, what)
    if not callable(found) or isinstance(found, ready):
        return found
    try:
        return found()
    except Exception as error:
        raise DiagnosticsError(f"the {what} {name} failed: {_cause(error)}") from error


def _named(name: str, what: str) -> Any:
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute:
        raise DiagnosticsError(f"the {what} {name!r} is not of the form MODULE:NAME, such as net.py:make.")
    module = _imported(module_name, what)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise DiagnosticsError(f"the {what} {name}: {module_name} has no {attribute!r}.")
        found = getattr(found, part)
    return found


def _imported(name: str, what: str) -> Any:
    path = Path(name)
    try:
        if name.endswith(".py"):
            if not path.is_file():
                raise DiagnosticsError(f"the {what}: there is no file {name}.")
            key = f"_diagnosed_{path.resolve().as_posix()}"
            if key in sys.modules:
                return sys.modules[key]
            spec = importlib.util.spec_from_file_location(key, path)
            if spec is None or spec.loader is None:
                raise DiagnosticsError(f"the {what}: {name} cannot be imported.")
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module  # dataclasses and pickles look their module up
            sys.path.insert(0, str(path.resolve().parent))
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[key]
                raise
            return module
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(name)
    except DiagnosticsError:
        raise
    except Exception as error:
        raise DiagnosticsError(f"the {what}: {name} cannot be imported: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
