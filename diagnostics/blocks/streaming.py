"""Batch means of blocks for batches whose blocks do not fit into memory: sums over parts of the batch."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diagnostics.autograd.trees import flatten, map_tensors
from diagnostics.blocks.containers import BlockMatrix, HessianBlocks, MeanBlocks
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.memory_plan import check_memory, planned_bytes
from diagnostics.blocks.recursion import hessian_blocks
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.capture import capture
from diagnostics.graph.graph import Graph
from diagnostics.graph.selection import Selection


def mean_blocks(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    nodes: Selection = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    pairs: Iterable[tuple[str, str]] | None = None,
    by_source: bool = False,
    memory_limit: int = 8 * 2**30,
) -> HessianBlocks:
    """Batch means of all blocks, without ever holding the blocks of more samples than fit into ``memory_limit``.

    The result is that of ``hessian_blocks(capture(model, inputs, loss_fn, nodes), pairs, by_source).mean()``. Samples
    that do not influence each other contribute to a batch mean one by one, so the batch is captured in parts, each
    with the loss of the whole batch as a function of its own outputs, the others' held fixed, and the parts' sums are
    added. Coupled samples (batch-norm in training mode) cannot be parted.

    Args:
        model: As in :func:`diagnostics.capture`.
        inputs: As in :func:`diagnostics.capture`; every tensor whose first dimension is the batch is parted.
        loss_fn: As in :func:`diagnostics.capture`: of the outputs of the whole batch.
        nodes: As in :func:`diagnostics.capture`.
        reduction: As in :func:`diagnostics.capture`.
        pairs: As in :func:`diagnostics.hessian_blocks`.
        by_source: As in :func:`diagnostics.hessian_blocks`.
        memory_limit: Bytes that the blocks of a part and the results may take, by plan. The autograd tape of one
            forward pass of the whole batch is not counted.

    Returns:
        :class:`diagnostics.HessianBlocks` of batch means, ``(d_v, d_w)``.

    Raises:
        MemoryBudgetError: one sample, or the joint sample of a coupled batch, takes more than ``memory_limit``.
        DiagnosticsError: a part of the batch alone has another output than within the batch (dropout in training mode,
            batch-norm in training mode before the first node), or another graph.
        CaptureError: As in :func:`diagnostics.capture`.
    """
    outputs: list[Any] = []
    graph = capture(model, inputs, partial(_watched, loss_fn, outputs), nodes, reduction=reduction)
    pairs = None if pairs is None else list(pairs)
    layout = Layout.of(graph, pairs)

    def needed(samples: int) -> int:
        return planned_bytes(graph, layout, by_source=by_source, averaged=True, samples=samples)

    batch = layout.samples
    most = bisect_right(range(1, batch + 1), memory_limit, key=needed)
    if most == 0:
        check_memory(needed(1), memory_limit, layout, "One sample at a time takes as much.")
    if most >= batch:  # coupled samples are one
        return hessian_blocks(graph, pairs, by_source, memory_limit=sys.maxsize).mean()
    count = -(-batch // most)
    edges = [batch * i // count for i in range(count + 1)]
    sums: dict[tuple[str, str], dict[str, Tensor]] = {}
    for start, stop in tqdm(pairwise(edges), total=count, desc="blocks", leave=False, disable=None):
        part = _part(model, inputs, loss_fn, nodes, graph, outputs[0], slice(start, stop))
        for key, matrix in _matrices(hessian_blocks(part, pairs, by_source, memory_limit=sys.maxsize), by_source):
            rows = matrix.mean().rows
            sums[key] = {v: sums[key][v] + row for v, row in rows.items()} if key in sums else dict(rows)
    scale = 1 / graph.batch_size if reduction == "sum" else 1.0
    means = {key: MeanBlocks(layout.mean(), {v: row * scale for v, row in rows.items()}) for key, rows in sums.items()}
    sources = {name: matrix for (kind, name), matrix in means.items() if kind == "source"}
    return HessianBlocks(means["gn", ""], means["tensor", ""], sources if by_source else None)


def _matrices(blocks: HessianBlocks, by_source: bool) -> Iterator[tuple[tuple[str, str], BlockMatrix]]:
    yield ("gn", ""), blocks.gn
    yield ("tensor", ""), blocks.tensor
    if by_source:
        yield from ((("source", name), share) for name, share in blocks.tensor_by_source.items())


def _watched(loss_fn: Callable[[Any], Tensor], outputs: list[Any], z: Any) -> Tensor:
    outputs.append(map_tensors(Tensor.detach, z))
    return loss_fn(z)


def _part(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    nodes: Selection,
    whole: Graph,
    z: Any,
    samples: slice,
) -> Graph:
    """The network on some samples, with the loss of the batch."""

    def batched(t: Any) -> bool:
        return isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == whole.batch_size

    def loss_of_part(z_part: Any) -> Tensor:
        fixed, rebuild = flatten(z)
        own, _ = flatten(z_part)
        return loss_fn(
            rebuild(
                [
                    torch.cat([f[: samples.start], o, f[samples.stop :]]) if batched(f) else o
                    for f, o in zip(fixed, own, strict=True)
                ]
            )
        )

    outputs: list[Any] = []
    part = map_tensors(lambda t: t[samples] if batched(t) else t, inputs)
    # the sums of a part are those of a loss that is a mean, whatever the reduction: as it is given
    graph = capture(model, part, partial(_watched, loss_of_part, outputs), nodes, reduction="mean")
    where = f"samples {samples.start} to {samples.stop - 1}"
    for full, own in zip(flatten(z)[0], flatten(outputs[0])[0], strict=True):
        if batched(full) and full.is_floating_point() and not _same(own, full[samples]):
            raise DiagnosticsError(
                f"the model gives another output for {where} alone than within the batch, so the batch cannot be "
                "parted (dropout or batch statistics in training mode?). Call model.eval(), or use hessian_blocks on "
                "the whole batch with a larger memory_limit."
            )
    if [(n.name, n.parents) for n in graph.nodes] != [(n.name, n.parents) for n in whole.nodes]:
        raise DiagnosticsError(
            f"the model runs through other nodes for {where} alone than for the whole batch, so the batch cannot be "
            "parted. Name the nodes explicitly, or use hessian_blocks on the whole batch with a larger memory_limit."
        )
    return graph


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, which depends on the number of samples."""
    return a.shape == b.shape and bool((a - b).norm() <= torch.finfo(a.dtype).eps ** 0.5 * b.norm())
