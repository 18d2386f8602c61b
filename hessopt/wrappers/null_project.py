"""Experimental: project final updates off what must be remembered, around any optimizer, for continual learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from diagnostics.ranks.group import processes
from hessopt.closure.protocol import Closure
from hessopt.network.processes import check_alike
from hessopt.wrappers.base import OptimizerWrapper, check_dense_gradients
from hessopt.wrappers.memory import Memory, SubspaceMemory, memory_from_state


class NullProject(OptimizerWrapper):
    r"""Experimental: wraps an optimizer and projects its whole update off a memory.

    .. math::
        d = \theta_{\text{base}} - \theta, \qquad \theta \leftarrow \theta + d - M M^\top d .

    What is projected is what the wrapped optimizer did to the parameters, with momentum, second moments and decoupled
    weight decay in it. Projecting the gradient instead, as published, is the same for plain SGD only: Adam's division
    and weight decay both turn the step back into the memory. Parameters that the wrapped optimizer left alone (frozen,
    without a gradient, with a learning rate of 0) stay, and ``requires_grad`` is never changed. Without a memory every
    step is the wrapped optimizer's, bit for bit.

    Assign :attr:`memory` after each task:

    .. code-block:: python

        optimizer = hessopt.NullProject(torch.optim.SGD(model.parameters(), lr=0.05), model=model)
        ...  # train on the first task
        optimizer.memory = hessopt.memories.gpm_memory(model, inputs, 0.97, optimizer.memory)

    Args:
        base: The optimizer to wrap.
        basis: A :class:`hessopt.wrappers.memory.Memory` of :mod:`hessopt.memories`; or a matrix ``(P, m)`` of columns
            to remove, over the parameters of the groups in their order; or None, for none yet.
        model: The network that memories are of, by whose parameter names they are matched. None: a memory's parameters
            are those of the groups, in the same order.

    Raises:
        TypeError: ``base`` is no optimizer, or ``basis`` no memory.
        ValueError: the memory is not of these parameters.

    Source:
        The projection: Farajtabar et al. 2020, Saha et al. 2021; of the final update: Wang et al., "Training networks
        in null space of feature covariance for continual learning" (2021).

    Example:
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = NullProject(torch.optim.SGD([w], lr=0.1), torch.tensor([[1.0], [0.0]]))
        >>> loss = optimizer.step(lambda: w.square().sum())
        >>> w
        tensor([1.0000, 0.8000], requires_grad=True)
    """

    _OWN = ("_memory", "_compared")
    _KEY = "null_project"

    def __init__(
        self, base: Optimizer, basis: Memory | Tensor | None = None, *, model: nn.Module | None = None
    ) -> None:
        self._begin(base, model)
        self._memory: Memory | None = None
        self._compared: Memory | None = None
        self._finish()
        self.memory = basis

    @property
    def memory(self) -> Memory | None:
        """What is remembered; assign another one, a matrix ``(P, m)``, or None."""
        return self._memory

    @memory.setter
    def memory(self, value: Memory | Tensor | None) -> None:
        if isinstance(value, Tensor):
            listed = self._parameters()
            names = self._names(listed) if self.model is not None else [str(i) for i in range(len(listed))]
            value = SubspaceMemory(value, names, [p.shape for p in listed])
        if value is not None:
            if not isinstance(value, Memory):
                raise TypeError(
                    f"a memory is a hessopt.wrappers.memory.Memory or a matrix, got {type(value).__name__}."
                )
            self._remembered(value)
        self._memory = value

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step of the wrapped optimizer, projected.

        Args:
            closure: Evaluates the loss, see :mod:`hessopt.closure.protocol`. None: gradients are in ``.grad``.

        Returns:
            What the wrapped optimizer returned: the loss before its step; None without a closure.

        Raises:
            ClosureError: the closure does not give a finite, differentiable loss with a finite gradient.
            ModelError: a gradient is sparse; or several processes train together, and their memories differ.

        In these cases, and where the step is interrupted, parameters and the wrapped optimizer's state are as they
        were: with a memory, copies of them are kept during the step. Without a closure ``.grad`` is not looked at, as
        in :mod:`torch.optim`.
        """
        if self._memory is not self._compared and processes() > 1:
            check_alike("NullProject", "the memory", _tensors(self._memory))
            self._compared = self._memory
        remembered = [] if self._memory is None else self._remembered(self._memory)
        with self._guard(changed=self._memory is not None) as guard:
            before = guard.keep(remembered)
            if closure is None:
                check_dense_gradients(self._parameters())
                loss: Any = self.base.step()
            else:
                loss = self.base.step(self._for_base(closure, lambda *_: None))
            if self._memory is not None:
                self._project(self._memory, remembered, before)
        result: Tensor | None = loss
        return result

    @torch.no_grad()
    def _project(self, memory: Memory, remembered: list[Tensor], before: list[Tensor]) -> None:
        updates = [p.detach() - b for p, b in zip(remembered, before, strict=True)]
        for p, b, d in zip(remembered, before, memory.project(updates), strict=True):
            p.copy_(b + d)

    def _remembered(self, memory: Memory) -> list[Tensor]:
        """The parameters of a memory, in its order; those of groups added since are free."""
        if self.model is not None:
            named = dict(self.model.named_parameters(remove_duplicate=False))
            unknown = [name for name in memory.names if name not in named]
            if unknown:
                raise ValueError(f"the memory is of parameter {unknown[0]!r}, which the model does not have.")
            found: list[Tensor] = [named[name] for name in memory.names]
        else:
            found = self._parameters()[: len(memory.shapes)]
        shapes = [tuple(p.shape) for p in found]
        if shapes != [tuple(shape) for shape in memory.shapes]:
            raise ValueError(
                f"the memory is of parameters of shapes {[tuple(s) for s in memory.shapes][:4]} …, the optimizer's are "
                f"{shapes[:4]} …: pass model=, so that they are matched by name."
            )
        return found

    def _names(self, listed: list[Tensor]) -> list[str]:
        assert self.model is not None
        known = {id(p): name for name, p in self.model.named_parameters()}
        if any(id(p) not in known for p in listed):
            raise ValueError("a parameter of the optimizer is not one of model=.")
        return [known[id(p)] for p in listed]

    def _own_state(self) -> dict[str, Any]:
        return {"memory": None if self._memory is None else self._memory.state_dict()}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        if own["memory"] is not None:
            self._remembered(memory_from_state(own["memory"]))

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self._memory = None if own["memory"] is None else memory_from_state(own["memory"])


def _tensors(memory: Memory | None) -> list[Tensor]:
    return [] if memory is None else [t for t in tree_leaves(memory.state_dict()) if isinstance(t, Tensor)]
