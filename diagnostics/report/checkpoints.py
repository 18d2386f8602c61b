"""A model with the parameters of a checkpoint, for as long as it is diagnosed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.errors import DiagnosticsError

_WRAPPERS = ("state_dict", "model_state_dict", "model")


@contextmanager
def loaded(model: nn.Module, checkpoint: str | os.PathLike[str] | None) -> Iterator[None]:
    """``model`` with the state of a checkpoint; its own state again afterwards.

    Args:
        model: The network.
        checkpoint: A file of ``torch.save(model.state_dict(), …)``, or of a dict that holds one as ``"state_dict"``,
            ``"model_state_dict"`` or ``"model"``. Only tensors are unpickled. None: the model as it is.

    Raises:
        DiagnosticsError: the file cannot be read, or its keys or shapes are not the model's.
    """
    if checkpoint is None:
        yield
        return
    state = _read(checkpoint)
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    _check(own, state, checkpoint)
    try:
        model.load_state_dict(state)
        yield
    finally:
        model.load_state_dict(own)


def _read(checkpoint: str | os.PathLike[str]) -> dict[str, Tensor]:
    path = os.fspath(checkpoint)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DiagnosticsError(f"there is no checkpoint {path}.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DiagnosticsError(f"the checkpoint {path} cannot be read as a state_dict: {first}") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DiagnosticsError(f"the checkpoint {path} holds no state_dict but a {type(content).__name__}.")
    return dict(content)


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], checkpoint: str | os.PathLike[str]) -> None:
    missing, unexpected = [n for n in own if n not in state], [n for n in state if n not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    found = []
    if missing:
        found.append(f"missing: {_short(missing)}")
    if unexpected:
        found.append(f"unexpected: {_short(unexpected)}")
    if shapes:
        found.append(f"shapes: {_short(shapes)}")
    if found:
        raise DiagnosticsError(f"the checkpoint {os.fspath(checkpoint)} does not fit the model; {'; '.join(found)}.")


def _short(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
