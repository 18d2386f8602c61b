"""The Hessian with respect to parameters, by the same recursion: parameters are source nodes (docs/parametric.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from diagnostics.autograd.kernels import plain_autograd, twice_differentiable
from diagnostics.blocks.containers import BlockMatrix
from diagnostics.blocks.factored import TotalJacobians
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.recursion import assemble_blocks
from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.graph.graph import Graph, Part
from diagnostics.graph.local import differentiate
from diagnostics.parametric.dense_map import dense_map
from diagnostics.parametric.dense_pairs import Workspace, add_dense_pair, is_dense
from diagnostics.parametric.maps import ParameterMap, TotalJacobian
from diagnostics.parametric.patch_pairs import add_patch_pair, is_patched
from diagnostics.parametric.recognise import parameter_map


class ParameterBlocks(Mapping[tuple[str, str], Tensor]):
    """The Hessian with respect to the parameters, by pairs of names: ``blocks["fc.weight", "fc.bias"]``.

    Blocks are views of ``matrix``, ``(P_v, P_w)``, with parameters flattened in row-major order.

    Attributes:
        matrix: The whole matrix, ``(P, P)``, in the order of ``model.parameters()``.
        slices: Rows of each parameter, by name.
    """

    def __init__(self, matrix: Tensor, slices: Mapping[str, slice]) -> None:
        self.matrix = matrix
        self.slices = slices

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        """The block of a pair of parameters."""
        v, w = pair
        for name in (v, w):
            if name not in self.slices:
                raise KeyError(
                    f"no parameter {name!r} that requires grad; there are {', '.join(map(repr, self.slices))}"
                )
        return self.matrix[self.slices[v], self.slices[w]]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((v, w) for v in self.slices for w in self.slices)

    def __len__(self) -> int:
        return len(self.slices) ** 2

    def __repr__(self) -> str:
        return f"ParameterBlocks of {len(self.slices)} parameters, {tuple(self.matrix.shape)}"


def parameter_hessian(graph: Graph, part: Part = "total", *, memory_limit: int = 8 * 2**30) -> Tensor:
    """The Hessian of the loss with respect to the parameters, or its Gauss-Newton or tensor part, ``(P, P)``.

    A parameter is a source node of the same recursion, shared by all samples. With per-sample Jacobians D[u,θ] of the
    nodes u that use θ, activation blocks H[u,w] and local curvatures K,

        H[θ,θ'] = Σ_b Σ_{u∋θ, w∋θ'} D[u,θ]ᵀ H[u,w] D[w,θ'] + Σ_b Σ_{u∋θ} Σ_q K_u[θ,q] J[q←θ'] + its transpose for θ'
                  + Σ_b Σ_u K_u[θ,θ'].

    A shared weight is a source with several children: all pairs of its nodes are summed. The Gauss-Newton part is the
    first term with H^GN, the tensor part all the rest. The model is run once more with a node for every module that
    owns parameters. Linear layers (on any leading dimensions) and 2-D convolutions without groups never form D;
    other parameters cost a vector-Jacobian product for each entry of their node and of themselves.

    Args:
        graph: A captured network, with any nodes: the result does not depend on them.
        part: ``"total"``, ``"gn"`` or ``"tensor"``.
        memory_limit: Bytes that the result and its factors may take.

    Returns:
        ``(P, P)`` in the order of ``model.parameters()``, for the parameters that require grad; zero rows for those
        that the loss does not depend on. Of exactly the loss that was given.

    Raises:
        DiagnosticsError: no parameter requires grad, or a node has no second derivative, or the model does not give
            the same loss when it is run again.
        MemoryBudgetError: more than ``memory_limit`` would be needed; the message says how much.
        StaleGraphError: a parameter changed since the capture.

    Source: docs/parametric.md; cf. Eq. 5 and F.1 of arXiv 2604.11639.
    """
    return parameter_blocks(graph, part, memory_limit=memory_limit).matrix


def parameter_blocks(graph: Graph, part: Part = "total", *, memory_limit: int = 8 * 2**30) -> ParameterBlocks:
    """The same as :func:`parameter_hessian`, by pairs of parameter names."""
    if part not in ("total", "gn", "tensor"):
        raise ValueError(f'part must be "total", "gn" or "tensor", got {part!r}.')
    graph.check_fresh()
    trained = {name: p.numel() for name, p in graph.parameters.items() if p.requires_grad}
    if not trained:
        raise DiagnosticsError("no parameter of the model requires grad: call requires_grad_() on some before capture.")
    starts = accumulate(trained.values(), initial=0)
    slices = {name: slice(start, start + size) for (name, size), start in zip(trained.items(), starts, strict=False)}
    size = sum(trained.values())
    _check_memory(size * size * graph.dtype.itemsize, memory_limit)
    fine = graph.refined
    matrix = graph.loss.detach().new_empty(size, size, dtype=fine.dtype)
    result = ParameterBlocks(matrix, slices)

    with plain_autograd(), twice_differentiable():
        layout = Layout.of(fine)
        local = differentiate(fine)
        maps = {node.name: parameter_map(fine, node, local.signals.get(node.name)) for node in fine if node.parameters}
        loss_map = _loss_map(fine)
    jacobians = TotalJacobians(fine, layout, local.jacobians)
    blocks = assemble_blocks(fine, layout, local, jacobians)
    activation: BlockMatrix = {"total": blocks.total, "gn": blocks.gn, "tensor": blocks.tensor}[part]
    # The sum of all pairs u >= w, with u = w by half, is half of the Hessian: adding its transpose completes it.
    half = _Half(result)
    work = Workspace()
    with torch.no_grad():
        for u, left in maps.items():
            for w, right in maps.items():
                if layout.position[w] > layout.position[u]:
                    break
                factor = 0.5 if u == w else 1.0
                move = None if part == "gn" or u == w else partial(jacobians.block, w=w)
                if is_patched(left) and is_patched(right):
                    moved = None if move is None else left.moved(move)
                    add_pair = add_dense_pair if is_dense(left) and is_dense(right) else add_patch_pair
                    add_pair(left, right, activation[u, w], moved, factor, half.add_block, work)
                else:
                    _add_pair(left, right, activation[u, w] * factor, move, half)
            own = None if part == "gn" else left.own_curvature()
            if own is not None:
                half.add(own * 0.5, left, left)
        if loss_map is not None and part != "tensor":
            for w, right in maps.items():
                bent = loss_map.bend(partial(jacobians.block, w=w))
                if bent is not None:
                    half.add(right.contract(bent), loss_map, right)
            own = loss_map.own_curvature()
            if own is not None:
                half.add(own * 0.5, loss_map, loss_map)
        half.complete()
    return result


class _Half:
    """A matrix of which half is known: the Hessian is the half plus its transpose."""

    def __init__(self, result: ParameterBlocks) -> None:
        self._result = result
        self._filled: dict[tuple[str, str], int] = {}  # leading rows of a block; the rest is uninitialised memory

    def add_block(self, v: str, w: str, value: Tensor, rows: slice | None = None) -> None:
        """Add ``value`` to rows of the block of two parameters, its columns flat or not; all rows by default.

        Rows that follow those filled so far are written and not added to: memory is touched once.
        """
        block = self._result[v, w]
        block = block.unflatten(1, value.shape[1:]) if value.ndim > 2 else block
        start, stop = (0, len(block)) if rows is None else (rows.start, rows.stop)
        filled = self._filled.get((v, w), 0)
        known = min(max(filled - start, 0), stop - start)
        block[start : start + known] += value[:known]
        block[start + known : stop].copy_(value[known:])
        self._filled[v, w] = max(filled, stop)

    def add(self, block: Tensor, left: ParameterMap, right: ParameterMap) -> None:
        for v, rows in left.split(block, 0):
            for w, part in right.split(rows, 1):
                self.add_block(v, w, part)

    def complete(self) -> None:
        for v, w in self._result:
            block, mirror = self._result[v, w], self._result[w, v]
            match (v, w) in self._filled, (w, v) in self._filled:
                case True, True if v <= w:
                    block.add_(mirror.mT.clone())
                    if v != w:
                        mirror.copy_(block.mT)
                case True, False:
                    mirror.copy_(block.mT)
                case False, False:
                    block.zero_()


def _add_pair(left: ParameterMap, right: ParameterMap, block: Tensor, move: TotalJacobian | None, half: _Half) -> None:
    """Add the blocks of the parameters of two nodes, a few samples at a time: whole batches do not fit into a cache."""
    samples, outer, inner = block.shape
    forward = left.size * inner <= outer * right.size  # the side whose intermediate result is smaller goes first
    width = max(left.size * inner, 1) if move is not None or forward else outer * right.size
    straight: Tensor | None = None
    turned: Tensor | None = None
    for start in range(0, samples, max(1, _CACHED // width)):
        part = slice(start, start + max(1, _CACHED // width))
        u, w = left.samples(part), right.samples(part)
        rows = None if move is None else u.bend(partial(_some_samples, move, part))
        if forward:
            pushed = u.push(block[part])
            rows = pushed if rows is None else rows.add_(pushed)
        else:
            product = u.contract(w.push(block[part].mT))
            turned = product if turned is None else turned.add_(product)
        if rows is not None:
            product = w.contract(rows)
            straight = product if straight is None else straight.add_(product)
    if straight is not None:
        half.add(straight, left, right)
    if turned is not None:
        half.add(turned, right, left)


def _some_samples(move: TotalJacobian, part: slice, q: str) -> Tensor | None:
    jacobian = move(q)
    return None if jacobian is None else jacobian[part]


_CACHED = 2**22  # entries of an intermediate result


def _loss_map(graph: Graph) -> ParameterMap | None:
    """How parameters enter the loss directly, as a weight penalty inside it does."""
    if not graph.loss_parameters:
        return None
    unit = torch.ones_like(graph.loss)
    return dense_map(graph, "the loss", graph.loss, graph.loss_parameters, graph.loss_parents, unit)


def _check_memory(needed: int, limit: int) -> None:
    if needed > limit:
        raise MemoryBudgetError(
            f"the Hessian with respect to the parameters takes {needed / 2**30:.1f} GiB, more than the limit of "
            f"{limit / 2**30:.1f} GiB. Freeze parameters that are not of interest, or raise memory_limit."
        )
