"""What cannot be captured, and why: checks of the model and its inputs before the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from diagnostics.autograd import trees
from diagnostics.errors import CaptureError
from diagnostics.ranks.spread import spread

_EXACT = (torch.float32, torch.float64)


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be captured, or that a forward pass would change."""
    found = spread(model)
    if found is not None:
        raise CaptureError(
            f"{found.where} is spread over processes or devices by {found.kind}, and curvature is computed on one: "
            f"{found.way_out}. The result is then that of this process's own batches.{_of_all(found.kind)}"
        )
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{where} is scripted or traced (torch.jit): its tape cannot be cut. Capture the original nn.Module."
            )
        # isinstance would ask the class, which takes longer than the rest of a small capture
        wrapped = torch._dynamo.eval_frame.OptimizedModule in type(module).__mro__
        if wrapped or module._compiled_call_impl is not None:
            raise CaptureError(
                f"{where} is compiled (torch.compile): compiled code has no second derivative. Capture the original "
                "nn.Module (the one passed to torch.compile); both share their parameters."
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise CaptureError(
                f"{where} is a {type(module).__name__} that has not seen an input, so it has no parameters yet: run "
                "the model once on the inputs before the capture."
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise CaptureError(
                f"{where} scales its weight down in place at every call (max_norm={module.max_norm}), so the capture "
                "would change the model. Set its max_norm to None meanwhile; rows seen before are scaled already."
            )
    for name, parameter in model.named_parameters():
        check_tensor(parameter, f"parameter {name!r}")


def _of_all(kind: str) -> str:
    if kind != "DistributedDataParallel":
        return ""
    return (
        " What is of the batches of all processes takes the wrapper: HessianOperator and its kin, what is estimated "
        "from their products, and Monitor; estimate_metrics takes a ShardedGraph of captures of `.module`."
    )


def check_loss_fn(loss_fn: Any, *arguments: str) -> None:
    """Refuse a loss function that is none, or cannot be called with these positional ``arguments``.

    Raises:
        TypeError: as Python would raise inside, with what to pass instead.
    """
    form = f"loss_fn({', '.join(arguments)}) -> scalar"
    if len(arguments) == 1:
        way_out = "Targets go into it: loss_fn=lambda z: F.cross_entropy(z, targets)."
    else:
        way_out = "A batch is one argument, the pair (inputs, targets); a loss without targets is lambda z, _: …"
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, {form}; got {type(loss_fn).__name__}. {way_out}")
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (ValueError, TypeError):  # a built-in function does not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(f"loss_fn must be {form}, but {name}{signature} is not: {error}. {way_out}") from None


P = ParamSpec("P")
R = TypeVar("R")


def at_most_positional(count: int, way_out: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: more than ``count`` positional arguments are refused with what to pass instead."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) > count:
                raise TypeError(f"{function.__name__} takes {count} positional arguments, got {len(args)}: {way_out}")
            return function(*args, **kwargs)

        return checked

    return decorate


def check_inputs(inputs: Any) -> int:
    """Refuse inputs that cannot be captured; returns the batch size."""
    tensors = trees.tensors(inputs)
    if not tensors:
        raise CaptureError(
            f"inputs hold no tensor but {type(inputs).__name__}: pass a tensor (B, …), a tuple for model(*inputs) or a "
            "dict for model(**inputs)."
        )
    if tensors[0].ndim == 0:
        raise CaptureError("the first input is a scalar: inputs need a batch dimension, (B, …).")
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            check_tensor(tensor, "an input")
    if tensors[0].shape[0] == 0:
        raise CaptureError(f"the batch is empty: the first input has shape {tuple(tensors[0].shape)}.")
    return tensors[0].shape[0]


def check_tensor(tensor: Tensor, what: str) -> None:
    """Refuse a tensor that is not real, not exact enough or not dense; ``what`` names it."""
    if tensor.is_complex():
        raise CaptureError(f"{what} is complex ({tensor.dtype}): curvature is defined for real networks only.")
    if tensor.is_floating_point() and tensor.dtype not in _EXACT:
        raise CaptureError(
            f"{what} has dtype {tensor.dtype}, too coarse for second derivatives. Convert a copy of the model and its "
            "inputs with .float() or .double(), and call capture outside torch.autocast."
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise CaptureError(f"{what} is not a dense tensor ({layout}): make it dense first.")
    if isinstance(tensor, nn.Parameter) and tensor.is_inference():
        raise CaptureError(
            f"{what} was made in inference mode and cannot be differentiated: make the model outside it."
        )
