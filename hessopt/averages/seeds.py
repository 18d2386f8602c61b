"""Columns of the loss's output curvature, to be back-propagated: what is known of the loss decides how."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from diagnostics.ranks.collectives import Ranks, ranks_of
from hessopt.averages.options import NamedLoss
from hessopt.closure.loss_curvature import (
    LOSSES,
    Columns,
    LossCurvature,
    LossName,
    criterion_curvature,
    named_curvature,
    random_signs,
)
from hessopt.closure.output_curvature import check_separable, loss_roots
from hessopt.errors import ClosureError, ModelError

EMPTY = "the batch is empty, so its loss has no curvature. Skip it (drop_last=True)."
MAX_OUTPUTS = 256
"""Outputs a sample up to which the output Hessian of a loss without a closed form is formed."""


class Seeds:
    """Gives columns of the curvature of a loss.

    Args:
        loss: By name, the module that computes it, or None.
        columns: K, or ``"exact"``.
        sampled: Monte-Carlo columns where there is a closed form.
        device: Of the draws.
        seed: Of the draws.
        group: Process group of those who draw for one network.

    Attributes:
        generator: Source of the draws.
        sign: -1 if losses that are not given by name or closed form are maximized.
        updates: How often curvature was drawn for a step that was taken.
    """

    def __init__(
        self,
        loss: NamedLoss | nn.Module | None,
        columns: Columns,
        sampled: bool,
        device: torch.device,
        seed: int,
        group: Any = None,
    ) -> None:
        self.loss = loss
        self.columns, self.sampled, self._seed, self._group = columns, sampled, seed, group
        self.generator = torch.Generator(device).manual_seed(seed)
        self.sign, self.updates = 1, 0
        self._separable = False

    @property
    def name(self) -> LossName | None:
        """Of the loss, if it was declared by name."""
        return self.loss.name if isinstance(self.loss, NamedLoss) else None

    @property
    def ranks(self) -> Ranks:
        """The processes that draw for one network."""
        return ranks_of(group=self._group)

    def begin(self) -> None:
        """Before the first draw of an update: each of several processes has draws of its own, by its number.

        Those of one process go on from where they were.
        """
        ranks = self.ranks
        if ranks.size > 1:
            own = f"{self._seed} {self.updates} {ranks.rank}".encode()
            self.generator.manual_seed(int.from_bytes(hashlib.blake2b(own, digest_size=8).digest(), "big") >> 1)

    def knows_classes(self, output: Tensor) -> bool:
        """Whether it is clear which dimension of a network's ``logits`` the declared classes are.

        Of logits of more than two dimensions the last is usual, and the second where they go into PyTorch's loss as
        they are.
        """
        assert isinstance(self.loss, NamedLoss)
        return self.loss.name != "cross_entropy" or self.loss.class_dim is not None or output.ndim < 3

    def of_output(self, output: Tensor) -> Tensor:
        """Columns ``(K, *output.shape)`` of the loss that was declared by name.

        Raises:
            ModelError: the output has no such dimension of classes.
        """
        assert isinstance(self.loss, NamedLoss)
        assert self.loss.name is not None
        z, place = output.detach(), self.loss.class_dim
        if place is not None:
            if not -z.ndim <= place < z.ndim or place % z.ndim == 0:
                raise ModelError(f"class_dim={place} is no dimension of the classes of an output {tuple(z.shape)}.")
            z = z.movedim(place, 1)
        columns = self._of(named_curvature(self.loss.name, self.loss.reduction, z))
        return columns if place is None else columns.movedim(2, place % z.ndim + 1)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Tensor | None]:
        """Of a call of the declared module, in order; and the first that has a tape, or None."""
        assert isinstance(self.loss, nn.Module)
        given = inspect.signature(self.loss.forward).bind(*args, **kwargs).args
        return given, next((a for a in given if isinstance(a, Tensor) and a.requires_grad), None)

    def of_call(self, given: tuple[Any, ...], output: Tensor, value: GradientEdge) -> tuple[Tensor, Tensor]:
        """Of a call of the declared module: what to back-propagate from, and columns.

        Args:
            given: Arguments.
            output: The first of these that has a tape.
            value: Where what it returned is on the tape, which is retained.

        Raises:
            ModelError: it has no closed form, and its value or the number of outputs does not allow the general one.
            NotConvexError: it is not convex in its input.
        """
        assert isinstance(self.loss, nn.Module)
        form = criterion_curvature(self.loss, *given) if output is given[0] and len(given) > 1 else None
        if form is not None:
            return form.output, self._of(form)
        return output, self.of_loss(value, output)

    def of_loss(self, loss: Tensor | GradientEdge, output: Tensor) -> Tensor:
        """Of any loss that is a sum over samples, on the tape of its output, which is retained.

        Raises:
            ModelError: more than ``MAX_OUTPUTS`` outputs a sample, or the loss couples samples.
            NotConvexError: the loss is not convex in the output (concave, if it is maximized).
        """
        if not self._separable:
            check_separable(loss, output)
            self._separable = True
        return hessian_columns(loss, output, self.columns, self.generator, self.sign)

    def _of(self, curvature: LossCurvature) -> Tensor:
        return curvature.columns(self.columns, self.sampled, self.generator)


def hessian_columns(
    loss: Tensor | GradientEdge, output: Tensor, columns: Columns, generator: torch.Generator, sign: int = 1
) -> Tensor:
    """Columns of any loss that is a sum over samples: roots of its output Hessians, or these times random signs.

    Args:
        loss: ℓ, or its place, on the tape of ``output``, which is retained.
        output: z, ``(B, …)``.
        columns: K, or ``"exact"``.
        generator: Source of the signs.
        sign: -1: of minus the loss.

    Raises:
        ClosureError: the batch is empty.
        ModelError: more than ``MAX_OUTPUTS`` outputs a sample.
        NotConvexError: the loss is not convex in the output.
    """
    if not len(output):
        raise ClosureError(EMPTY)
    width = output[0].numel()
    if width > MAX_OUTPUTS:
        raise ModelError(
            f"the loss has no closed form here, and its output Hessian is not formed for {width} outputs a sample (at "
            f"most {MAX_OUTPUTS}). Declare it, loss={' | '.join(map(repr, LOSSES))} or its torch.nn module, or return "
            'an output whose rows are one position each (`logits.flatten(0, 1)`), or use curvature="empirical".'
        )
    roots = loss_roots(loss, output, sign)
    if not len(roots):
        return torch.zeros(1, *output.shape, dtype=roots.dtype, device=roots.device)  # a loss linear in its output
    if columns != "exact":
        signs = random_signs((columns, *roots.shape[:2]), roots, generator) / columns**0.5
        roots = torch.einsum("ckb,kbi->cbi", signs, roots)
    return roots.reshape(len(roots), *output.shape)
