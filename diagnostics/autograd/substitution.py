"""Run a module with other tensors in the places of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diagnostics.autograd.kernels import EXCLUSIVE
from diagnostics.autograd.trees import tensors as tensors_in
from diagnostics.errors import CaptureError, DiagnosticsError


@contextmanager
def substituted(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """While entered, ``model`` holds ``tensors`` in the places of its own; afterwards its own again, the very objects.

    Every place of a tensor is found by the tensor itself and once: a module that is registered under several names
    (a penalty that holds the network that it is about), and a weight that is tied. ``torch.func.functional_call``
    swaps such a module once for each of its names, and putting back in the same order leaves the substitutes in it.

    Only one thread at a time runs a model in this way (:data:`diagnostics.autograd.kernels.EXCLUSIVE`).

    Args:
        model: The module.
        tensors: By qualified name, as ``named_parameters()`` and ``named_buffers()`` list them. On exit, what the
            model has put in their places meanwhile (``self.count = self.count + 1``).

    Raises:
        KeyError: the model has no such parameter or buffer.
    """
    places: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    name_of: dict[int, str] = {}
    first: dict[str, tuple[dict[str, Tensor | None], str]] = {}
    with EXCLUSIVE:
        for prefix, module in model.named_modules():  # each module once
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is None:
                        continue
                    name = f"{prefix}.{key}" if prefix else key
                    places.append((held, key, tensor))
                    if name in tensors:
                        name_of[id(tensor)] = name
                        first[name] = held, key
        missing = tensors.keys() - first.keys()
        if missing:
            raise KeyError(f"{type(model).__name__} has no parameter or buffer {min(missing)!r}.")
        places = [place for place in places if id(place[2]) in name_of]
        try:
            for held, key, own in places:
                held[key] = tensors[name_of[id(own)]]
            yield
        finally:
            for name, (held, key) in first.items():
                left = held.get(key)
                if left is not None:
                    tensors[name] = left
            for held, key, own in places:
                held[key] = own


def run_model(model: nn.Module, inputs: Any, replaced: dict[str, Tensor]) -> Any:
    """The output of the model, with its buffers (and parameters) replaced for this call by those in ``replaced``.

    Restoring buffers afterwards instead would invalidate the tape that saved them. On return, ``replaced`` holds what
    the call has left in their places.
    """
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    try:
        with substituted(model, replaced):
            return model(*args, **kwargs)
    except RuntimeError as error:
        wrong = [t.dtype for t in tensors_in(inputs) if not t.is_floating_point()]
        if wrong and not isinstance(error, DiagnosticsError) and "dtype" in str(error):
            raise CaptureError(
                f"the model does not accept inputs of dtype {wrong[0]} ({error}). Convert them first, for example "
                "inputs.float() / 255 for images."
            ) from error
        raise
