"""Kernels that can be differentiated twice, and a run that leaves no trace."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diagnostics.errors import CaptureError

EXCLUSIVE = threading.RLock()
"""Held while a model runs for us: one thread at a time.

Hooks, buffers and the global random state are the process's, not the thread's: of two captures at once, each would cut
the other's pass, and restore the random state to the middle of the other's.
"""


class _SharedByThreads(AbstractContextManager[None]):
    """A context of effect on the whole process: the first to come in enters it, the last to go out leaves it.

    Contexts that save a process-wide setting and restore it nest within a thread, but not across threads: who comes
    second would save the first one's choice, and make it permanent if he also leaves second.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._entered: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                context = self._make()
                context.__enter__()
                self._entered = context
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._entered is not None:
                context, self._entered = self._entered, None
                context.__exit__(None, None, None)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use kernels with a second derivative, and restore the user's choice when no thread needs them any more.

    Fused attention kernels have a first derivative only; inside this context attention runs by PyTorch's composite
    (``MATH``) kernel. So do cuDNN's recurrent kernels: a forward pass also needs :class:`CompositeKernels`. cuDNN's
    other kernels stay, where the user has not turned them off, without their reduced precision (TF32). The inference
    path of transformer layers is off: it calls none of their submodules, and where nothing requires grad, it may pass
    nested tensors from one layer to the next.
    """
    with _COMPOSITE_ATTENTION, full_precision_cudnn():
        yield


@contextmanager
def _composite_attention() -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


_COMPOSITE_ATTENTION = _SharedByThreads(_composite_attention)


_NO_HOOKS = (
    "the model uses torch.utils.checkpoint or other saved-tensor hooks, so its tape would run parts of the model "
    "again. Turn them off for the capture (model.gradient_checkpointing_disable() in transformers)."
)


@contextmanager
def without_saved_tensor_hooks(message: str = _NO_HOOKS, error: type[Exception] = CaptureError) -> Iterator[None]:
    """Refuse non-reentrant checkpointing, and whatever else replaces the tensors that the tape saves.

    A checkpoint runs its part of the model again at every pass over the tape, on the model's own buffers and without
    what watched the first run: batch statistics would move, and spectral normalisation would take another step each
    time.

    Args:
        message: Says what is refused, and the way out.
        error: Raised with it.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(message):
            yield
    except RuntimeError as raised:
        if message in str(raised) and not isinstance(raised, error):
            raise error(message) from raised
        raise


class CompositeKernels(TorchFunctionMode):
    """Replaces fused operations without a right second derivative in PyTorch by the same function of simpler ones.

    The second derivative of ``torch._weight_norm`` is not even symmetric (PyTorch 2.13, CPU), cuDNN's recurrent layers
    have none: these run by native kernels.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        if func in _RECURRENT:
            with _WITHOUT_CUDNN:
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


def full_precision_cudnn() -> AbstractContextManager[None]:
    """Use cuDNN, where it is on, in full precision (no TF32), with the user's choice of algorithms."""
    return _FULL_PRECISION


def _cudnn_in_full_precision(enabled: bool | None = None) -> AbstractContextManager[None]:
    cudnn = torch.backends.cudnn
    context: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled if enabled is None else enabled,
        benchmark=cudnn.benchmark,
        benchmark_limit=cudnn.benchmark_limit,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )
    return context


_FULL_PRECISION = _SharedByThreads(_cudnn_in_full_precision)
_WITHOUT_CUDNN = _SharedByThreads(partial(_cudnn_in_full_precision, enabled=False))


@contextmanager
def _vmap_without_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


VMAP_WITHOUT_WARNING = _SharedByThreads(_vmap_without_warning)
"""``torch.vmap`` loops over operations without a batching rule and warns: slower, not wrong, and not the user's."""


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    rest = [d for d in range(v.ndim) if d != dim % v.ndim]
    length: Tensor = torch.linalg.vector_norm(v, dim=rest if dim != -1 else None, keepdim=True)
    return v * (g / length)


class RandomState:
    """The global random state of the CPU and of the accelerators that hold some tensors, as it was when made."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._devices = sorted({t.device for t in tensors if t.device.type not in ("cpu", "meta")}, key=str)
        with EXCLUSIVE:  # not the state in the middle of another thread's run
            self._states = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore on exit what was there on entry. One thread at a time."""
        with EXCLUSIVE:
            before = self._read()
            try:
                yield
            finally:
                self._write(before)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Start from this state; restore on exit what was there on entry. One thread at a time."""
        with self.kept():
            self._write(self._states)
            yield


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Record gradients whatever the caller's ``no_grad`` or ``inference_mode`` says."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
