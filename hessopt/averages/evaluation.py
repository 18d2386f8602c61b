"""Run a closure so that the curvature that is due is gathered from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.ranks.collectives import Ranks
from diagnostics.ranks.spread import is_distributed
from hessopt.averages.gathering import Gathering
from hessopt.averages.recorder import check_strided
from hessopt.averages.sharded import whole
from hessopt.closure.backward_calls import gradients_of
from hessopt.closure.finite import gradient_norm
from hessopt.closure.protocol import Closure, Evaluation
from hessopt.closure.runner import ClosureRunner
from hessopt.errors import ClosureError
from hessopt.network.processes import agreed, averaged


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What a closure gave, without its tape.

    Attributes:
        runner: Can evaluate it again.
        loss: ℓ, detached.
        gradients: Of the parameters; None where there is none.
        norm: Of all of them together.
    """

    runner: ClosureRunner
    loss: Tensor
    gradients: list[Tensor | None]
    norm: float


def evaluate(
    gathering: Gathering[Any] | None,
    ranks: Ranks,
    model: nn.Module,
    closure: Closure,
    parameters: Sequence[Tensor],
    known: Sequence[Tensor],
) -> Evaluated:
    """Evaluate the loss and its gradient; curvature that is due is gathered in the closure's own backward, or after it.

    Of several processes each evaluates the loss of its own samples. What its ``backward()`` left in ``.grad`` is
    DistributedDataParallel's mean; a gradient that is computed here is averaged here. If one process meets an error,
    all raise one.

    Args:
        gathering: What gathers; None: nothing does.
        ranks: The processes that train the network.
        model: The network.
        closure: See :mod:`hessopt.closure.protocol`.
        parameters: The optimizer's.
        known: Those whose gradients are wanted.

    Raises:
        ClosureError: the closure does not give a finite, differentiable loss, or a gradient is not finite.
        ModelError: a gradient is sparse.
    """
    if gathering is not None:
        gathering.begin()
    waits = gathering is not None and gathering.waits
    # The curvature of a declared loss is gathered in the closure's own backward.
    declared = None if gathering is None else gathering.loss
    tape = waits and declared is None
    runner = ClosureRunner(closure, parameters, model, tape=tape)

    def first() -> tuple[Evaluation, list[Tensor | None]]:
        evaluation = runner.evaluate()
        if evaluation.backward_called:
            gradients = [p.grad for p in known]
        else:
            trained = [p for p in known if p.requires_grad]
            slopes = dict(zip(trained, gradients_of(evaluation.loss, trained, retain_graph=waits), strict=True))
            gradients = [slopes.get(p) for p in known]
        check_strided(gradients)
        return evaluation, gradients

    evaluation, gradients = agreed(ranks, first)
    if any(is_distributed(p) for p in known):
        if not evaluation.backward_called:
            raise ClosureError(
                "the closure does not call backward(), and derivatives with respect to parameters that FSDP2 shards "
                "are only had that way. Call `loss.backward()` in the closure."
            )
        gradients = [None if g is None else whole(g) for g in gradients]
    elif not evaluation.backward_called:
        gradients = averaged(ranks, gradients, known)
    try:
        norm = gradient_norm(gradients, known, model)
    except ClosureError:
        if gathering is not None:
            gathering.begin()
        raise
    missed = tape or not evaluation.backward_called or isinstance(declared, nn.Module)
    if gathering is not None and gathering.active and missed:

        def second() -> None:
            if gathering.waits:
                with torch.enable_grad():
                    gathering.gather(evaluation.loss, *evaluation.outputs_of_loss(gathering.options.accumulate))

        agreed(ranks, second)
    return Evaluated(runner, evaluation.loss.detach(), gradients, norm)
