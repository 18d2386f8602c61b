"""The exact Gauss-Newton factors of one evaluation of a closure, and the graph of the layers that it shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diagnostics.autograd.sample_mixing import sample_rows
from diagnostics.autograd.tape import ancestry
from hessopt.closure.output_curvature import (
    check_hessian_memory,
    check_separable,
    loss_roots,
    residual_roots,
)
from hessopt.closure.protocol import Evaluation
from hessopt.errors import ModelError, NotConvexError
from hessopt.factors.layer_factors import layer_factors, row_dims
from hessopt.factors.sample_factors import Factor
from hessopt.network.layer_graph import Edges, layer_distances, layer_edges
from hessopt.network.layers import Layer, layers_of
from hessopt.network.parameter_uses import Use, UseRecorder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Structure:
    """What one evaluation shows of the network; kept until it changes.

    Attributes:
        key: What it depends on.
        edges: Of the graph of layers, :func:`hessopt.network.layer_graph.layer_edges`.
        rows: For each use of a parameter, the samples that its rows belong to.
        distances: Of the layers, ``(n, n)``.
    """

    key: tuple[Any, ...]
    edges: Edges
    rows: Sequence[Tensor | None]
    distances: NDArray[np.float64]


class ExactCurvature:
    """Reads layers, graph and exact factors off the closure's run in :meth:`recorder`'s context.

    Args:
        module: The network.
        memory_limit: Bytes for the output's second derivatives and for Jacobians without a closed form.
    """

    def __init__(self, module: nn.Module, memory_limit: int) -> None:
        self.module = module
        self.memory_limit = memory_limit
        self._structure: Structure | None = None
        self._general: tuple[str, ...] = ()

    def recorder(self, parameters: Sequence[Tensor]) -> UseRecorder:
        """A recorder for one run of the closure."""
        self._all = layers_of("BandedNewton", self.module, parameters)
        return UseRecorder([p for layer in self._all for p in layer.parameters])

    def layers(self, uses: Sequence[Use]) -> tuple[Layer, ...]:
        """The layers in the order of their first use; those that were not used come last."""
        first: dict[Tensor, int] = {}
        for i, use in enumerate(uses):
            for p in use.parameters:
                first.setdefault(p, i)
        never = len(uses)
        return tuple(sorted(self._all, key=lambda layer: min(first.get(p, never) for p in layer.parameters)))

    def structure(self, evaluation: Evaluation, layers: Sequence[Layer], uses: Sequence[Use]) -> Structure:
        """Graph and samples; where they are new, after a check that the loss is a sum over samples.

        Raises:
            ModelError: the output or the loss cannot be treated.
        """
        output = evaluation.output
        _check_output(evaluation, layers, {p: n for n, p in self.module.named_parameters()})
        # Derivatives connect every layer with the residuals directly: then the graph ends where the network does.
        returned = [t for t in evaluation.outputs if isinstance(t, Tensor)]
        derived = any(not use.forward for use in uses)
        edges = layer_edges(layers, uses, returned if derived and returned else [output])
        modes = tuple(module.training for module in self.module.modules())
        shapes = tuple(use.result.shape for use in uses)
        key = (tuple(layer.name for layer in layers), edges, evaluation.is_least_squares, modes, shapes, output.shape)
        if self._structure is None or self._structure.key != key:
            if not evaluation.is_least_squares:
                check_separable(evaluation.loss, output)
            rows = sample_rows(output, [use.result for use in uses], row_dims(uses))
            self._structure = Structure(key, edges, rows, layer_distances(len(layers), edges))
        return self._structure

    def factors(
        self,
        evaluation: Evaluation,
        layers: Sequence[Layer],
        uses: Sequence[Use],
        rows: Sequence[Tensor | None],
        sign: int,
        dtype: torch.dtype,
    ) -> list[Factor]:
        """The factors of all layers, with the roots of the loss in ``dtype``.

        Args:
            evaluation: The closure's run.
            layers: Of :meth:`layers`.
            uses: What the recorder saw.
            rows: Of :meth:`structure`.
            sign: -1 if the loss is maximized.
            dtype: Of the factors.

        Raises:
            NotConvexError: the loss is not convex in the output (concave, if maximizing).
            MemoryBudgetError: the loss's second derivatives or Jacobians do not fit.
        """
        output = evaluation.output
        if evaluation.is_least_squares:
            if sign < 0:
                raise NotConvexError("a sum of squares is not concave in its residuals, so it cannot be maximized.")
            roots = residual_roots(output)
        else:
            check_hessian_memory(output, self.memory_limit)
            roots = loss_roots(evaluation.loss, output, sign)
        found = layer_factors(layers, uses, rows, output, roots.to(dtype), memory_limit=self.memory_limit)
        general = tuple(layers[v].name for v in found.general)
        if general != self._general:
            if general:
                _log.warning(
                    "no closed form for layers %s (samples mix, or their parameters are used in a way that was not "
                    "seen): each of the %d rows is back-propagated by itself, which is exact and slow",
                    ", ".join(repr(name) for name in general),
                    found.factors[0].size,
                )
            self._general = general
        return found.factors


def _check_output(evaluation: Evaluation, layers: Sequence[Layer], names: dict[Tensor, str]) -> None:
    loss, output = evaluation.loss, evaluation.output
    if output.ndim == 0 or output.numel() == 0:
        raise ModelError(
            f"the output that the loss is computed from has shape {tuple(output.shape)}, an empty batch or none at "
            "all; its first dimension must be the batch. Let the closure return `(loss, output)` with an output, or "
            "`hessopt.LeastSquares(residuals)` with residuals, of each sample."
        )
    if output.grad_fn is None:
        raise ModelError(
            "the output that the loss is computed from has no autograd tape. Return it without `.detach()`."
        )
    leaves, met = ancestry(loss, {output.grad_fn})
    trained = {p for layer in layers for p in layer.parameters}
    for leaf in leaves:
        if leaf in trained:
            raise ModelError(
                f"parameter {names[leaf]!r} reaches the loss otherwise than through the network's output. Use the "
                "optimizer's weight_decay for an L2 penalty; else let the closure return `(loss, output)` with the "
                "tensor that all of the loss is computed from, or `hessopt.LeastSquares(residuals)`."
            )
    if not met and loss.grad_fn is not output.grad_fn:
        raise ModelError(
            "the loss does not depend on the output that came with it. Let the closure return `(loss, output)` "
            "with the tensor that the loss is computed from."
        )
