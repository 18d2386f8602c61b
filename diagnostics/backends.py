"""Kernels that can be differentiated twice, and a run that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use kernels with a second derivative, and restore the user's choice afterwards.

    Fused attention kernels and cuDNN's recurrent kernels have a first derivative only; inside this context
    attention runs by PyTorch's composite (``MATH``) kernel and recurrent networks by the native one.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


@contextmanager
def fork_rng(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the global random state on exit: of the CPU and of the CUDA devices that hold ``tensors``."""
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None})
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        yield


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Record gradients whatever the caller's ``no_grad`` or ``inference_mode`` says."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
