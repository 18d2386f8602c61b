"""Kernels that can be differentiated twice, and a run that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diagnostics.errors import CaptureError


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use kernels with a second derivative, and restore the user's choice afterwards.

    Fused attention kernels have a first derivative only; inside this context attention runs by PyTorch's composite
    (``MATH``) kernel. So do cuDNN's recurrent kernels: a forward pass also needs :class:`CompositeKernels`. cuDNN's
    other kernels stay, where the user has not turned them off, without their reduced precision (TF32). The inference
    path of transformer layers is off: it calls none of their submodules, and where nothing requires grad, it may pass
    nested tensors from one layer to the next.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), full_precision_cudnn():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Refuse non-reentrant checkpointing, and whatever else replaces the tensors that the tape saves.

    A checkpoint runs its part of the model again at every pass over the tape, on the model's own buffers and without
    the cuts: batch statistics would move, and spectral normalisation would take another step each time.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
            yield
    except RuntimeError as error:
        if _NO_HOOKS in str(error) and not isinstance(error, CaptureError):
            raise CaptureError(_NO_HOOKS) from error
        raise


_NO_HOOKS = (
    "the model uses torch.utils.checkpoint or other saved-tensor hooks, so its tape would run parts of the model "
    "again. Turn them off for the capture (model.gradient_checkpointing_disable() in transformers)."
)


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
            with full_precision_cudnn(enabled=False):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def second_order_kernels() -> Iterator[None]:
    """For a forward pass whose loss is differentiated twice: :func:`twice_differentiable` and composite kernels."""
    with twice_differentiable(), CompositeKernels():
        yield


_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


def full_precision_cudnn(enabled: bool | None = None) -> AbstractContextManager[None]:
    """Turn cuDNN on or off (None: as it is), in full precision (no TF32), with the user's choice of algorithms."""
    cudnn = torch.backends.cudnn
    context: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled if enabled is None else enabled,
        benchmark=cudnn.benchmark,
        benchmark_limit=cudnn.benchmark_limit,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )
    return context


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    rest = [d for d in range(v.ndim) if d != dim % v.ndim]
    length: Tensor = torch.linalg.vector_norm(v, dim=rest if dim != -1 else None, keepdim=True)
    return v * (g / length)


class RandomState:
    """The global random state of the CPU and of the CUDA devices that hold some tensors, as it was when made."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Start from this state; restore on exit what was there on entry."""
        with torch.random.fork_rng(devices=self._devices, device_type="cuda"):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Record gradients whatever the caller's ``no_grad`` or ``inference_mode`` says."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
