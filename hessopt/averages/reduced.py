"""What the batches of several processes add to running averages, together: one exchange an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.ranks.collectives import Ranks
from hessopt.averages.averages import KroneckerAverages, Moments
from hessopt.averages.gathering import Structure
from hessopt.errors import ClosureError, HessoptError, ModelError


@dataclass(eq=False)
class Share:
    """What one process has of an update.

    Attributes:
        moments: For the factors; None where the process has no samples.
        probe: For those of the probe.
        squares: For the diagonals; of those that are met.
        scale: Trace of the loss's output curvature; None where it is not known.
        weight: What its curvature counts, beside those of the others.
        samples: B.
        rows: Numbers of rows of each block.
    """

    moments: Moments | None
    probe: Moments | None
    squares: Mapping[Tensor, Tensor]
    scale: Tensor | None
    weight: float | Tensor
    samples: int
    rows: Sequence[int]


@dataclass(eq=False)
class Whole:
    """The update of all processes, bit for bit the same in each.

    Attributes:
        moments: For the factors.
        probe: For those of the probe, if there is one.
        squares: For the diagonals; of those that nobody met what they are.
        scale: Trace of the loss's output curvature, zero where it is not known.
        part: What the curvature of this process counts in it.
        rows: Numbers of rows of each block, on the device.
        finite: Whether the gradients were finite everywhere, on the device.
        alike: Whether they were the same everywhere, on the device.
    """

    moments: Moments
    probe: Moments | None
    squares: dict[Tensor, Tensor]
    scale: Tensor
    part: Tensor
    rows: Tensor
    finite: Tensor
    alike: Tensor


def one_structure(
    own: Structure | None, error: HessoptError | None, ranks: Ranks, names: Sequence[str]
) -> Structure | None:
    """The structure of the network that all processes' batches show, or an error in all of them; waits for the device.

    Args:
        own: That of this process's batch; None where it has no samples.
        error: What its batch met.
        ranks: The processes.
        names: Of the blocks.

    Raises:
        HessoptError: the error of a process.
        ModelError: layers were called in one process and not in another, or connected otherwise.
    """
    entries = ranks.objects((None if error is None else str(error), own))
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(entries):
        if message is not None:
            raise ClosureError(f"in process {rank}: {message}")
    known = [(rank, structure) for rank, (_, structure) in enumerate(entries) if structure is not None]
    if not known:
        return None
    first, structure = known[0]
    for rank, other in known[1:]:
        if not structure.equals(other):
            alone = "".join(
                f"; process {who} alone called {[names[i] for i in mine.called if i not in theirs.called][:3]}"
                for who, mine, theirs in ((first, structure, other), (rank, other, structure))
                if set(mine.called) - set(theirs.called)
            )
            raise ModelError(
                f"at the first step processes {first} and {rank} did not call the same layers with the same "
                f"connections{alone}. The structure of the network is that of the first batch: let all processes call "
                "all layers in it; later ones may leave layers out."
            )
    return structure


def reduced(
    own: Share,
    ranks: Ranks,
    factors: KroneckerAverages,
    probe: KroneckerAverages | None,
    diagonals: Mapping[Tensor, Tensor],
    gradient: Tensor,
    *,
    adds: bool,
) -> Whole | None:
    r"""The update of all processes from the parts that each has: one exchange, of as many numbers as factors have.

    With B_r samples on process r, and its factor c_r on the loss,

    .. math::
       A = \frac{\sum_r B_r A_r}{\sum_r B_r}, \qquad
       G = \frac{\sum_r |c_r| G_r}{\sum_r |c_r|}, \quad \text{of sums } G = \frac{1}{n} \sum_r G_r,

    as the gradient of DistributedDataParallel is the mean of the processes' gradients, each of the mean loss of its own
    samples. So samples of a process that has fewer count for more, unless the loss is multiplied with ``c_r = n B_r /
    Σ B``. A process without samples has no part in a mean.

    Args:
        own: Of this process.
        ranks: The processes.
        factors: The averages.
        probe: Those of the probe, if there is one.
        diagonals: By parameter.
        gradient: Sum of the gradient's entries, which must be the same everywhere.
        adds: Whether the loss is a sum.

    Returns:
        None where no process has samples; for that a process without any waits for its device.
    """
    blank = torch.zeros((), dtype=factors.dtype, device=factors.device)
    there = own.moments is not None
    share = blank + 1.0 if adds else (blank + own.weight).abs() if there else blank
    tensors = _scaled(factors, own.moments, share)
    others = [] if probe is None else _scaled(probe, own.probe, share)
    met = [p in own.squares for p in diagonals]
    squares = [share * own.squares[p] if p in own.squares else torch.zeros_like(d) for p, d in diagonals.items()]
    seen = gradient.new_tensor([0.0] * ranks.size, dtype=factors.dtype)
    seen[ranks.rank] = gradient
    counts = torch.tensor([own.samples, *met, *own.rows], dtype=factors.dtype, device=factors.device)
    known = torch.stack([share, blank if own.scale is None else share * own.scale.to(blank)])
    sums = [*tensors, *others, *squares, seen, counts, known]
    ranks.sum_(sums)
    samples, met_by, rows = counts.split([1, len(diagonals), len(own.rows)])
    if not there and not float(samples):
        return None
    total = known[0].clamp_min(torch.finfo(blank.dtype).tiny)
    excluded = [] if own.moments is None else own.moments.excluded
    size = samples[0]
    return Whole(
        factors.divided(tensors, size, total, excluded, own.samples),
        None if probe is None else probe.divided(others, size, total, [], own.samples),
        {
            p: torch.where(met_by[i] > 0, square / total, d)
            for i, (square, (p, d)) in enumerate(zip(squares, diagonals.items(), strict=True))
        },
        known[1] / total,
        share / total if there else blank,
        rows,
        seen.isfinite().all() & (known[0] > 0),
        (seen == seen[0]).all() | ~seen.isfinite().all(),
    )


def _scaled(factors: KroneckerAverages, moments: Moments | None, share: Tensor) -> list[Tensor]:
    if moments is None:
        nothing = [share.new_zeros(stack.shape[0]) for stack in factors.stacks]
        return [*(torch.zeros_like(t) for t in factors.tensors), *nothing]
    return [t.contiguous() for t in factors.scaled(moments, share)]
