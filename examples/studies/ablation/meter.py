"""Counts gradient-equivalents: the work of a run in units of one forward and backward pass of one mini-batch.

What is counted is what passes through the network: every evaluation of the task's loss, every other forward pass of
its model, and every run of autograd's engine, whoever starts it (the optimizer, a library that it uses, or ours). The
work of one such event is the floating-point operations of its matrix products and convolutions, by torch's own
formulas, and one for each number that any other operation writes. An optimizer's own linear algebra (roots,
factorizations, momentum) is not counted: it shows in the seconds.

An event is counted operation by operation where it occurs for the first time in a run, and by its signature (what is
differentiated with respect to what, the shapes, whether a tape is made) from then on, so that counting does not slow
the run down. Operations, and not seconds, are what is measured, so that counts are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from examples.shared.task import Batch, Evaluated, Task

Result = TypeVar("Result")


class Work(TorchDispatchMode):
    """The operations inside this context, backward passes included.

    Attributes:
        operations: Their number so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket) or _MORE.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=out)
        elif not func.is_view:
            self.operations += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def _lstm_layer(x: Tensor, w_in: Tensor, w_state: Tensor, *args: Any, **kwargs: Any) -> int:
    steps = prod(x.shape[:-1])
    return 2 * steps * (w_in.numel() + w_state.numel())


def _lstm_layer_backward(*args: Any, **kwargs: Any) -> int:
    return 2 * _lstm_layer(*args)


_MORE: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mkldnn_rnn_layer: _lstm_layer,  # one fused operation, which torch has no formula for
    torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_layer_backward,
}


class Meter:
    """Counts one run.

    Args:
        unit: Operations of one gradient-equivalent, see :func:`operations_of_gradient`.

    Attributes:
        spent: Gradient-equivalents so far.
        evaluations: Runs of the task's loss so far.
    """

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self.evaluations = 0
        self._operations = 0
        self._known: dict[Hashable, int] = {}
        self._inside = False

    @property
    def spent(self) -> float:
        return self._operations / self.unit

    def attach(self, task: Task) -> Task:
        """The task, its loss counted, of batches and of rows."""
        rows = task.residual_rows
        return replace(
            task,
            evaluate_loss=self._counted("loss", task.evaluate_loss),
            residual_rows=None if rows is None else self._counted("rows", rows),
        )

    def _counted(self, name: str, evaluate: Callable[[Any], Result]) -> Callable[[Any], Result]:
        def counted(argument: Any) -> Result:
            self.evaluations += 1
            shapes = tuple(leaf.shape for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))
            result: Result = self._event((name, torch.is_grad_enabled(), shapes), lambda: evaluate(argument))
            return result

        return counted

    @contextmanager
    def watching(self, task: Task) -> Iterator[None]:
        """Count what happens inside this context."""
        autograd: Any = torch.autograd
        modules: list[Work | None] = []

        def counted(outputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
            return self._event(_signature(outputs, *args), lambda: _ENGINE(outputs, *args, **kwargs))

        def before(module: Any, inputs: Any) -> None:
            # A forward pass of the model outside of the task's loss; not cached, as these are few.
            modules.append(None if self._inside or modules else Work())
            if modules[-1] is not None:
                modules[-1].__enter__()  # type: ignore[no-untyped-call]

        def after(module: Any, inputs: Any, output: Any) -> None:
            work = modules.pop()
            if work is not None:
                work.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._operations += work.operations

        hooks = [task.model.register_forward_pre_hook(before), task.model.register_forward_hook(after)]
        autograd._engine_run_backward = counted
        try:
            yield
        finally:
            autograd._engine_run_backward = _ENGINE
            for hook in hooks:
                hook.remove()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Count nothing inside this context."""
        inside, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = inside

    def _event(self, key: Hashable | None, call: Callable[[], Any]) -> Any:
        if self._inside:
            return call()
        self._inside = True
        try:
            operations = self._known.get(key)
            if operations is not None:
                result = call()
            else:
                with Work() as work:
                    result = call()
                operations = work.operations
                if key is not None:
                    self._known[key] = operations
        finally:
            self._inside = False
        self._operations += operations
        return result


# Private, but all of backward(), grad() and torch.func go through it, by whatever name they were imported.
_ENGINE: Callable[..., Any] = torch.autograd._engine_run_backward  # type: ignore[attr-defined]


def _signature(
    outputs: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor | None],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any],
    *rest: Any,
) -> Hashable | None:
    """What two runs of the engine of the same work share; None where that is not known."""
    for cotangent in cotangents:
        # A batch of cotangents: their number shows nowhere.
        if cotangent is not None and torch._C._functorch.is_legacy_batchedtensor(cotangent):
            return None
        if cotangent is not None and torch._C._functorch.is_batchedtensor(cotangent):
            return None
    # An output may be an edge of the tape in place of a tensor; its cotangent has its shape.
    ends = tuple(
        (o.shape, type(o.grad_fn)) if isinstance(o, Tensor) else (None if c is None else c.shape, type(o.node))
        for o, c in zip(outputs, cotangents, strict=True)
    )
    return ("engine", ends, tuple(i.shape if isinstance(i, Tensor) else () for i in inputs), create_graph)


def operations_of_gradient(task: Task, batch: Batch) -> int:
    """Operations of one evaluation of the loss and one backward pass: one gradient-equivalent.

    The task is used up: buffers and random state may have changed.
    """
    meter = Meter(1)
    task = meter.attach(task)
    with meter.watching(task):
        loss_of(task.evaluate_loss(batch)).backward()
    return int(meter.spent)


def loss_of(evaluated: Evaluated) -> Tensor:
    return evaluated[0] if isinstance(evaluated, tuple) else evaluated.loss
