"""Why two products of an operator differ, by one hypothesis after another."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.autograd.kernels import EXCLUSIVE
from diagnostics.autograd.trees import tensors
from diagnostics.errors import DiagnosticsError
from diagnostics.operators.data import Batch, Batches
from diagnostics.operators.replay import Replay


class NonDeterministicError(DiagnosticsError):
    """Two products of an operator with the same vector differ by more than rounding."""


@dataclass(frozen=True)
class Determinism:
    """What :meth:`diagnostics.operators.curvature.CurvatureOperator.check_deterministic` found.

    Attributes:
        difference: ``‖A v − (A v)'‖ / ‖A v‖`` of two products from two runs; 0 when they are equal bit for bit.
        held_fixed: What would make products differ if the operator did not hold it fixed, and what differs but makes
            no difference beyond rounding.
    """

    difference: float
    held_fixed: tuple[str, ...]

    def __str__(self) -> str:
        first = f"two products differ by {self.difference:.1e} of their norm"
        return "\n".join([first, *(f"  held fixed: {line}" for line in self.held_fixed)])


def check_deterministic(product: Callable[[], Tensor], batches: Batches, replay: Replay) -> Determinism:
    """Compare two values of ``product``, each computed from new runs, and find out why they differ if they do.

    The hypotheses, in this order: the model gives another loss on the same batch (and then: random numbers from NumPy
    or Python, nondeterministic kernels, state outside of buffers); the data are others or in another order; the
    backward pass has nondeterministic kernels.

    Raises:
        NonDeterministicError: they differ by more than the square root of the machine precision.
    """
    first, second = product(), product()
    difference = (first - second).norm().item() / max(first.norm().item(), torch.finfo(first.dtype).tiny)
    with replay.replayed():
        batch = next(iter(batches)).private(replay.device)
    if difference > torch.finfo(first.dtype).eps ** 0.5:
        reason = _reason(batches, batch, replay)
        raise NonDeterministicError(f"two products with the same vector differ by {difference:.1e}: {reason}")
    return Determinism(difference, tuple(_held_fixed(batches, batch, replay)))


def _reason(batches: Batches, batch: Batch, replay: Replay) -> str:
    data = _change_of_data(batches, replay.replayed)
    if _same_loss(replay, batch):
        if data is not None:
            return f"{data}. Pass list(batches) to fix them, or give the DataLoader no generator of its own."
        return (
            "the loss is the same bit for bit, but its derivatives are not: kernels of the backward pass are "
            "nondeterministic. Set torch.use_deterministic_algorithms(True)."
        )
    culprit = _first_difference(replay, batch, replay.replayed)
    for whose, context in (("NumPy", _numpy_replayed), ("Python", _python_replayed)):
        if _same_loss(replay, batch, context):
            return f"{culprit} draws random numbers of {whose}, which are not replayed as torch's are. Draw torch's."
    if _same_loss(replay, batch, _deterministic_kernels):
        return f"{culprit} runs nondeterministic kernels. Set torch.use_deterministic_algorithms(True)."
    return (
        f"{culprit} gives another result at every call, on the same batch, with the same buffers and the same global "
        "random state: it keeps state outside of buffers (a counter, a cache) or has a random generator of its own. "
        "Make the state a buffer, draw from torch's global generator, or switch it off with eval()."
    )


def _held_fixed(batches: Batches, batch: Batch, replay: Replay) -> Iterator[str]:
    if not _same_loss(replay, batch, _another_seed, replayed=False):
        culprit = _first_difference(replay, batch, _another_seed)
        yield f"the random state: {culprit} draws random numbers; every run draws those of the construction"
    changed = replay.changed_buffers(batch)
    if changed:
        listed = ", ".join(map(repr, changed[:3])) + (" …" if len(changed) > 3 else "")
        yield f"buffers: a forward pass changes {listed}; every run starts from their values at construction"
    data = _change_of_data(batches, replay.replayed)
    if data is not None:
        yield f"not the data: {data}, which changes products by no more than rounding"
    elif _change_of_data(batches, _another_seed) is not None:
        yield "the data: their order or values depend on the global random state, which is replayed at every pass"


def _same_loss(
    replay: Replay,
    batch: Batch,
    context: Callable[[], AbstractContextManager[None]] | None = None,
    *,
    replayed: bool = True,
) -> bool:
    """Whether two runs on the same batch give the same loss; ``context`` is entered anew for each."""
    losses = []
    for _ in range(2):
        with ExitStack() as stack:
            stack.enter_context(EXCLUSIVE)  # the contexts change settings of the process
            if replayed:
                stack.enter_context(replay.replayed())
            if context is not None:
                stack.enter_context(context())
            stack.enter_context(replay.recording())
            own = batch.private(replay.device)  # the model may work in place
            losses.append(replay.loss(replay.output(own), own).detach())
    return torch.equal(*losses)


def _first_difference(replay: Replay, batch: Batch, context: Callable[[], AbstractContextManager[None]]) -> str:
    """The first module, in the order of the calls, whose output differs between two runs."""
    runs: list[list[tuple[str, list[Tensor]]]] = []
    for _ in range(2):
        calls: list[tuple[str, list[Tensor]]] = []
        with ExitStack() as stack:
            stack.enter_context(EXCLUSIVE)
            for name, module in replay.model.named_modules():
                where = f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
                handle = module.register_forward_hook(_recorder(where, calls))
                stack.callback(handle.remove)
            stack.enter_context(context())
            stack.enter_context(replay.recording())
            replay.output(batch.private(replay.device))
        runs.append(calls)
    first, second = runs
    for (name, a), (other, b) in zip(first, second, strict=False):
        if name != other:
            return f"the code that calls {name}"
        if len(a) != len(b) or not all(map(torch.equal, a, b)):
            return name
    return "the loss function"


def _recorder(name: str, calls: list[tuple[str, list[Tensor]]]) -> Callable[[nn.Module, Any, Any], None]:
    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        calls.append((name, [t.detach().clone() for t in tensors(output)]))

    return record


def _change_of_data(batches: Batches, context: Callable[[], AbstractContextManager[None]]) -> str | None:
    """How the data of two passes differ, or None."""
    passes: list[list[bytes]] = []
    for _ in range(2):
        with context():
            passes.append([digest for batch in batches for digest in _digests(batch)])
    if passes[0] == passes[1]:
        return None
    common = sum((Counter(passes[0]) & Counter(passes[1])).values())
    if common == len(passes[0]) == len(passes[1]):
        return (
            "the data come in another order at every pass, so that batches have other members, and these influence "
            "each other (batch-norm in training mode, a loss that is no mean over samples) or meet other dropout masks"
        )
    return (
        f"the data are others at every pass ({len(passes[0]) - common} of {len(passes[0])} samples): random "
        "augmentation, or sampling"
    )


def _digests(batch: Batch) -> Iterator[bytes]:
    """One digest a sample: of its part of every tensor, and of whole tensors that have no sample dimension."""
    parts = []
    for tensor in tensors((batch.inputs, batch.targets)):
        dense = tensor.detach().cpu().contiguous()
        whole = dense.ndim == 0 or len(dense) != batch.size
        rows = dense.reshape(1, -1) if whole else dense.reshape(batch.size, -1)
        parts.append(rows.view(torch.uint8).expand(batch.size, -1) if rows.numel() else rows.new_zeros(batch.size, 0))
    for row in torch.cat([part.to(torch.uint8) for part in parts], dim=1).numpy():
        yield hashlib.blake2b(row.tobytes(), digest_size=8).digest()


_seeds = iter(range(1, 2**62))


@contextmanager
def _another_seed() -> Iterator[None]:
    """The global random state is another at every entry, and restored."""
    with torch.random.fork_rng():
        torch.manual_seed(next(_seeds))
        yield


@contextmanager
def _numpy_replayed() -> Iterator[None]:
    state = np.random.get_state()  # noqa: NPY002 - the global generator is what is suspected
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


@contextmanager
def _python_replayed() -> Iterator[None]:
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no deterministic kernel, the next hypothesis is tested
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
