"""Which forward passes count for the curvature: those that a backward follows whose gradients the step takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diagnostics.autograd.tape import Function


class Choice:
    """Of the backward passes between two steps, those whose forward passes give the curvature.

    - A backward that brings nothing to a trained parameter (of another network's loss, for inputs alone) does not
      count.
    - The first ones count, up to a number, so of micro-batches whose gradients are accumulated the first. A later one
      takes the place of all before it if no parameter has a ``.grad`` when it begins: then those were dropped, and no
      step taken.
    - ``backward()`` comes before :func:`torch.autograd.grad`, whose gradients may serve something else.
    - If one backward runs through several forward passes, the first of these counts: it is reached last, and takes the
      place of the later ones.

    Args:
        parameters: The trained parameters.
        most: How many backward passes count.

    Attributes:
        chosen: Numbers of the backward passes that were chosen, in their order, with the order of the forward pass.
        own: Ids of the parameters, and of what stands for them on the tape.
        further: Numbers of backward passes that were seen to add to the gradients of these.
    """

    def __init__(self, parameters: Sequence[Tensor], most: int = 1) -> None:
        self._parameters, self._most = parameters, most
        self.own = {id(p) for p in parameters}
        self.reset()

    def reset(self) -> None:
        """Nothing was chosen."""
        self.chosen: dict[int, int] = {}
        self.further: set[int] = set()
        self._accumulates = False
        self._seen: tuple[int, bool] | None = None

    def excludes(self, order: int) -> bool:
        """Whether a pass cannot be chosen, by what is known without a look at its tape."""
        task, anew = self._backward()
        if task in self.chosen:
            return order >= self.chosen[task]
        return len(self.chosen) >= self._most and self._accumulates and not anew

    def takes(self, order: int, leaves: Iterable[Function]) -> bool:
        """Whether the pass that the running backward has arrived at is one to take, as far as is known.

        Args:
            order: Of the forward pass, among others.
            leaves: Functions behind it that accumulate gradients.
        """
        task, anew = self._backward()
        accumulates = self._accumulating(leaves)
        if accumulates is None or order >= self.chosen.get(task, order + 1):
            return False
        if self.chosen and task not in self.chosen:
            if self._accumulates and not accumulates:
                return False
            if self._accumulates != accumulates or anew:
                self.chosen, self.further = {}, set()
            elif len(self.chosen) >= self._most:
                self.further.add(task)
                return False
        self.chosen[task], self._accumulates = order, accumulates
        return True

    def take_outside(self) -> int:
        """Take what is of no backward pass, as a pass of its own; returns the number it goes by."""
        task = -1 - len(self.chosen)
        self.chosen[task] = 0
        return task

    def _backward(self) -> tuple[int, bool]:
        """The running backward, and whether there was no gradient when it began."""
        task = current_backward()
        if self._seen is None or self._seen[0] != task:
            self._seen = task, all(p.grad is None for p in self._parameters)
        return self._seen

    def _accumulating(self, leaves: Iterable[Function]) -> bool | None:
        """Whether the running backward accumulates into a trained parameter; False: it returns its gradient."""
        for leaf in leaves:
            if id(getattr(leaf, "variable", None)) not in self.own:
                continue
            try:
                if torch._C._will_engine_execute_node(leaf):
                    return True
            except RuntimeError:  # autograd does not answer for what torch.autograd.grad is asked for
                return False
        return None


def current_backward() -> int:
    """Number of the backward that is running in this thread."""
    return int(torch._C._current_graph_task_id())
