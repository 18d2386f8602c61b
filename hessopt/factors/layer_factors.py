"""The exact factors of all layers: closed forms of the uses of the parameters, Jacobians elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from diagnostics.autograd.tape import Verified, batched_vjp
from diagnostics.errors import MemoryBudgetError
from hessopt.factors.call_jacobians import call_rows
from hessopt.factors.sample_factors import DenseFactor, Factor, OuterFactor
from hessopt.network.layers import Layer
from hessopt.network.parameter_uses import CallUse, LinearUse, Use


@dataclass(frozen=True)
class LayerFactors:
    """What :func:`layer_factors` gives.

    Attributes:
        factors: One for each layer.
        general: Numbers of the layers whose rows were back-propagated one by one through the whole network.
    """

    factors: list[Factor]
    general: tuple[int, ...]


def layer_factors(
    layers: Sequence[Layer],
    uses: Sequence[Use],
    rows: Sequence[Tensor | None],
    output: Tensor,
    roots: Tensor,
    *,
    memory_limit: int = 4 * 2**30,
) -> LayerFactors:
    """The factors ``Ĵ_v = S ∂z/∂θ_v`` of all layers, exact for every network.

    One batched back-propagation of the roots' rows, all samples together, gives the cotangent of every use of the
    parameters. A layer whose uses are all linear gets an :class:`OuterFactor` of them; of other calls the parameters'
    rows are computed sample by sample. Then ``Ĵ_vᵀ y`` with a fixed y is compared with back-propagation. Where it
    differs — samples mix, a use was not seen, or a function does not treat rows alike — or where no closed form
    exists, all N rows of the layer are back-propagated one by one, through the whole network.

    Args:
        layers: The layers.
        uses: Of :class:`hessopt.network.parameter_uses.UseRecorder`.
        rows: For each use, of :func:`diagnostics.autograd.sample_mixing.sample_rows`.
        output: z, ``(B, …)``, with K entries a sample, with its tape.
        roots: ``(K', B, K)``: row k of every sample's root.
        memory_limit: Bytes that the matrices of layers without a closed form may take.

    Raises:
        MemoryBudgetError: they take more.
        DiagnosticsError: a derivative is not finite.
    """
    known = [(use, m) for use, m in zip(uses, rows, strict=True) if m is not None]
    general = {v for v, layer in enumerate(layers) if _hidden(layer, uses, rows)}
    found: dict[int, Factor] = {}
    cotangents = _cotangents(output, [use.result for use, _ in known], roots)
    if cotangents is None:
        general = set(range(len(layers)))
    else:
        pieces = [_Piece(use, m, c) for (use, m), c in zip(known, cotangents, strict=True) if c is not None]
        for v in set(range(len(layers))) - general:
            factor = _closed_form(layers[v], pieces, roots, memory_limit)
            if factor is None:
                general.add(v)
            else:
                found[v] = factor
    general |= _wrong(found, layers, output, roots)
    missing = sorted(general)
    if missing:
        wanted = [layers[v].parameters for v in missing]
        found |= dict(zip(missing, general_factors(wanted, output, roots, memory_limit=memory_limit), strict=True))
    return LayerFactors([found[v] for v in range(len(layers))], tuple(missing))


def general_factors(
    parameters: Sequence[Sequence[Tensor]], output: Tensor, roots: Tensor, *, memory_limit: int = 4 * 2**30
) -> list[Factor]:
    """Factors of any parameters on any tape, by one vector-Jacobian product for each of the N rows.

    Args:
        parameters: For each layer its parameters.
        output: z, ``(B, …)``, with its tape; samples may mix.
        roots: ``(K', B, K)``.
        memory_limit: Bytes that the Jacobians may take.
    """
    columns, batch, _ = roots.shape
    flat = [p for own in parameters for p in own]
    count = columns * batch
    _check_memory(count, sum(p.numel() for p in flat), roots, memory_limit)
    matrices = [roots.new_zeros(count, p.numel()) for p in flat]
    verified = Verified()
    with torch.enable_grad():  # autocast leaves outputs of less precision than the parameters
        output = output.to(reduce(torch.promote_types, (p.dtype for p in flat), output.dtype))
    for start in range(0, count, _AT_ONCE):
        number = torch.arange(start, min(start + _AT_ONCE, count), device=roots.device)
        seeds = output.new_zeros(len(number), batch, roots.shape[2])
        sample = number % batch
        seeds[torch.arange(len(number), device=roots.device), sample] = roots[number // batch, sample].to(output.dtype)
        products = batched_vjp([output], flat, [seeds.reshape(len(number), *output.shape)], verified)
        for matrix, product in zip(matrices, products, strict=True):
            if product is not None:
                matrix[number] = product.reshape(len(number), -1).to(matrix.dtype)
    of_layer = iter(matrices)
    return [DenseFactor(torch.cat([next(of_layer) for _ in own], 1), tuple(p.shape for p in own)) for own in parameters]


_AT_ONCE = 256


@dataclass(frozen=True)
class _Piece:
    """A use, the samples of its rows ``(R,)``, and the roots back-propagated to its result, ``(K', …)``."""

    use: Use
    rows: Tensor
    cotangent: Tensor


def _hidden(layer: Layer, uses: Sequence[Use], rows: Sequence[Tensor | None]) -> bool:
    """Whether a use of the layer mixes samples, or comes from the parameters alone."""
    pairs = zip(uses, rows, strict=True)
    return any(m is None for use, m in pairs if any(p is q for p in layer.parameters for q in use.parameters))


def _cotangents(output: Tensor, results: Sequence[Tensor], roots: Tensor) -> Sequence[Tensor | None] | None:
    """``(K', *result.shape)`` for every result; None if an operation's backward cannot be vectorised."""
    seeds = roots.reshape(len(roots), *output.shape).to(output.dtype)
    if not results:
        return []
    if len(seeds) == 0:
        return [t.new_zeros(0, *t.shape) for t in results]
    if len(seeds) == 1:  # without vmap, and so without a limit to what the backward may do
        products = torch.autograd.grad(output, results, seeds[0], retain_graph=True, allow_unused=True)
        return [None if product is None else product.unsqueeze(0) for product in products]
    try:
        return torch.autograd.grad(output, results, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:
        return None


def _closed_form(layer: Layer, pieces: Sequence[_Piece], roots: Tensor, memory_limit: int) -> Factor | None:
    own = [piece for piece in pieces if any(p is q for p in layer.parameters for q in piece.use.parameters)]
    pair = _weight_and_bias(layer, own)
    if pair is not None:
        return _outer(pair, own, roots)
    columns, batch, _ = roots.shape
    _check_memory(columns * batch, sum(p.numel() for p in layer.parameters), roots, memory_limit)
    sums = [roots.new_zeros(columns, batch, *p.shape) for p in layer.parameters]
    for piece in own:
        parts = _rows_of(piece, layer.parameters, roots, memory_limit)
        if parts is None:
            return None
        kept = piece.rows >= 0
        for v, part in parts:
            sums[v].index_add_(1, piece.rows[kept], part[:, kept].to(roots.dtype))
    matrix = torch.cat(
        [s.reshape(columns * batch, p.numel()) for s, p in zip(sums, layer.parameters, strict=True)], dim=1
    )
    return DenseFactor(matrix, tuple(p.shape for p in layer.parameters))


def _weight_and_bias(layer: Layer, own: Sequence[_Piece]) -> tuple[Tensor | None, Tensor | None] | None:
    """The parameters in their roles, if all uses of the layer are linear and of the same ones."""
    uses = [piece.use for piece in own]
    weights = {use.weight for use in uses if isinstance(use, LinearUse) and use.weight in set(layer.parameters)}
    biases = {use.bias for use in uses if isinstance(use, LinearUse) and use.bias in set(layer.parameters)}
    linear = all(isinstance(use, LinearUse) for use in uses) and uses
    if not linear or len(weights) > 1 or len(biases) > 1:
        return None
    weight, bias = next(iter(weights), None), next(iter(biases), None)
    roles = [p for p in (weight, bias) if p is not None]
    same = len(roles) == len(layer.parameters) and all(p is q for p, q in zip(roles, layer.parameters, strict=True))
    return (weight, bias) if same else None


def _outer(pair: tuple[Tensor | None, Tensor | None], own: Sequence[_Piece], roots: Tensor) -> OuterFactor:
    weight, bias = pair
    columns, batch, _ = roots.shape
    lefts, rights, numbers = [], [], []
    for piece in own:
        use = piece.use
        assert isinstance(use, LinearUse)
        operand = use.operand.detach().to(roots.dtype).flatten(0, -2).unsqueeze(0)
        cotangent = piece.cotangent.to(roots.dtype).flatten(1, -2)
        left, right = (operand.expand(columns, -1, -1), cotangent) if use.derivative else (cotangent, operand)
        parts = [right] if weight is not None and use.weight is weight else []
        if bias is not None:
            parts.append(right.new_full((*right.shape[:2], 1), float(use.bias is bias)))
        if weight is not None and use.weight is not weight:  # a bias that this layer lends to another's weight
            parts.insert(0, right.new_zeros(*right.shape[:2], weight.shape[1]))
        lefts.append(left)
        rights.append(torch.cat(parts, dim=2))
        numbers.append(piece.rows)
    same = all(len(right) == 1 for right in rights)
    rights = [right if same else right.expand(columns, -1, -1) for right in rights]
    return OuterFactor(
        _by_sample(lefts, numbers, batch), _by_sample(rights, numbers, batch), weight is not None, bias is not None
    )


def _by_sample(parts: Sequence[Tensor], numbers: Sequence[Tensor], batch: int) -> Tensor:
    """Rows ``(k, R, d)`` of several tensors as ``(k, B, T, d)``, T being the most rows that a sample has."""
    natural = torch.arange(batch, device=numbers[0].device)
    if all(len(m) == batch and torch.equal(m, natural) for m in numbers):
        return torch.stack(list(parts), dim=2)
    number = torch.cat(list(numbers))
    order = torch.argsort(number, stable=True)
    order = order[number[order] >= 0]
    sample = number[order]
    counts = torch.bincount(sample, minlength=batch)
    slot = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sample]
    rows = torch.cat(list(parts), dim=1)
    result = rows.new_zeros(len(rows), batch, int(counts.max()), rows.shape[2])
    result[:, sample, slot] = rows[:, order]
    return result


def _rows_of(
    piece: _Piece, parameters: Sequence[Tensor], roots: Tensor, memory_limit: int
) -> Iterator[tuple[int, Tensor]] | None:
    """Rows ``(K', R, *shape)`` of those of the parameters that are in the use, with their positions."""
    use, cotangent = piece.use, piece.cotangent
    wanted = [v for v, p in enumerate(parameters) if any(p is q for q in use.parameters)]
    largest = sum(parameters[v].numel() for v in wanted)
    _check_memory(cotangent.shape[0] * len(piece.rows), largest, roots, memory_limit)
    if isinstance(use, CallUse):
        found = call_rows(use, [parameters[v] for v in wanted], cotangent)
        return None if found is None else zip(wanted, found, strict=True)
    operand, flat = use.operand.detach().flatten(0, -2).unsqueeze(0), cotangent.flatten(1, -2)
    left, right = (operand, flat) if use.derivative else (flat, operand)
    outer = [left.unsqueeze(3) * right.unsqueeze(2) if parameters[v] is use.weight else flat for v in wanted]
    return zip(wanted, outer, strict=True)


def _wrong(found: dict[int, Factor], layers: Sequence[Layer], output: Tensor, roots: Tensor) -> set[int]:
    """The layers whose factor does not agree with back-propagation."""
    columns, batch, _ = roots.shape
    if not found or not columns:
        return set()
    weights = torch.cos(torch.arange(1, columns * batch + 1, dtype=roots.dtype, device=roots.device))
    seed = (roots * weights.reshape(columns, batch, 1)).sum(dim=0).reshape(output.shape).to(output.dtype)
    flat = [p for v in found for p in layers[v].parameters]
    slopes = iter(torch.autograd.grad(output, flat, seed, retain_graph=True, allow_unused=True))
    eps = max(torch.finfo(t.dtype).eps for t in (output, *flat))
    tolerance = 1e3 * eps * weights.norm()
    right = []
    for factor in found.values():
        error = roots.new_zeros(())
        for product in factor.vjp(weights):
            slope = next(slopes)
            error = error + (product if slope is None else product - slope.to(product.dtype)).square().sum()
        right.append(error.sqrt() <= tolerance * factor.trace().sqrt())
    return {v for v, ok in zip(found, torch.stack(right).tolist(), strict=True) if not ok}


def _check_memory(rows: int, columns: int, like: Tensor, limit: int) -> None:
    needed = rows * columns * like.element_size()
    if needed > limit:
        raise MemoryBudgetError(
            f"a layer without a closed form needs a Jacobian of {rows} rows (batch × outputs) and {columns} columns, "
            f"{needed / 2**30:.3g} GiB, more than the limit of {limit / 2**30:.3g} GiB. Use a smaller batch or raise "
            "memory_limit."
        )


def row_dims(uses: Sequence[Use]) -> list[int]:
    """How many leading dimensions of each use's result number its rows: all but the features of a linear layer."""
    return [use.result.ndim - 1 if isinstance(use, LinearUse) else min(use.result.ndim, 1) for use in uses]
