"""The cuts of one forward pass: outputs of modules replaced by detached copies that require grad."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.autograd.loss_checks import floating_tensors
from diagnostics.autograd.refusals import check_tensor
from diagnostics.autograd.tape import Function
from diagnostics.autograd.trees import flatten
from diagnostics.errors import CaptureError
from diagnostics.graph.selection import OUTPUT


class Cuts:
    """The cuts made so far, in the order of the forward pass: a topological order."""

    def __init__(self, batch_size: int, skip_unbatched: bool, apart: bool = True) -> None:
        self.batch_size = batch_size
        self.skip_unbatched = skip_unbatched
        self.apart = apart  # or the tape stays in one piece
        self.values: dict[str, Tensor] = {}
        self.segments: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module | None] = {}
        self.calls: dict[str, int] = {}
        self.received: dict[str, tuple[Any, ...]] = {}
        self._handed_on: dict[Function, str] = {}
        self._versions: dict[str, tuple[int, Tensor]] = {}

    def hook(self, name: str) -> Callable[..., Any]:
        """A forward hook that cuts the output of the module ``name``, where this thread calls it."""
        thread = threading.get_ident()

        def cut_output_of_module(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None  # somebody else's forward pass
            call = self.calls.get(name, 0)
            self.calls[name] = call + 1
            if not torch.is_grad_enabled():
                raise CaptureError(
                    f"module {name!r} ran with gradients disabled (torch.no_grad inside the model, or reentrant "
                    "checkpointing). Curvature needs the autograd tape: run the model without it."
                )
            label = f"{name}@{call}" if call else name
            self.received[label] = (*args, *kwargs.values())
            return self._cut(label, module, output)

        return cut_output_of_module

    def cut_output(self, result: Any) -> tuple[Any, tuple[str, ...]]:
        """Cut the model's output where no chosen module has; returns it and the names of its nodes."""
        already = {
            self._handed_on[t.grad_fn]
            for t in floating_tensors(result)
            if t.grad_fn is not None and t.grad_fn in self._handed_on
        }
        before = set(self.values)
        name = f"{OUTPUT} of the model" if OUTPUT in self.values else OUTPUT
        z = self._cut(name, None, result, keep=already, skip_unbatched=False)
        return z, tuple(n for n in self.values if n in already or n not in before)

    def _is_batched(self, module: nn.Module | None, tensor: Tensor, first: bool) -> bool:
        """Whether the first dimension of an output, or of its ``first`` tensor, is the batch: by its size.

        That of a recurrent layer's states is the layers', whatever its size, and without ``batch_first`` that of its
        sequence is time.
        """
        if isinstance(module, nn.RNNBase) and not (first and module.batch_first and tensor.ndim == 3):
            return False
        return tensor.ndim > 0 and tensor.shape[0] == self.batch_size

    def modified_before(self) -> list[str]:
        """Nodes whose own tape was changed after the cut, by an operation in place through another name."""
        return [label for label, (version, _) in self._versions.items() if self.segments[label]._version != version]

    def modified_behind(self) -> list[str]:
        """Nodes on which an operation in place worked downstream."""
        return [label for label, (_, handed_on) in self._versions.items() if handed_on._version]

    def _cut(
        self,
        name: str,
        module: nn.Module | None,
        output: Any,
        keep: set[str] = frozenset(),  # type: ignore[assignment]
        skip_unbatched: bool | None = None,
    ) -> Any:
        skip_unbatched = self.skip_unbatched if skip_unbatched is None else skip_unbatched
        leaves, rebuild = flatten(output)
        cuttable = [
            i for i, t in enumerate(leaves) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
        ]
        if not cuttable and module is not None and not skip_unbatched:
            raise CaptureError(
                f"module {name!r} returned no floating-point tensor, so it cannot be a node; leave it out of `nodes`."
            )
        for i in cuttable:
            tensor = leaves[i]
            if tensor.grad_fn is not None and self._handed_on.get(tensor.grad_fn) in keep:
                continue
            label = name if len(cuttable) == 1 else f"{name}[{i}]"
            check_tensor(tensor, f"the output of module {name!r}" if module is not None else "the model's output")
            if skip_unbatched and not self._is_batched(module, tensor, first=i == cuttable[0]):
                continue
            if tensor.numel() == 0:
                if skip_unbatched or any(leaves[j].numel() for j in cuttable):
                    continue
                where = f"the output of module {name!r}" if module is not None else "the model's output"
                raise CaptureError(
                    f"{where} has no entries, {tuple(tensor.shape)}, so there is nothing to differentiate by: "
                    f"{'leave it out of `nodes`' if module is not None else 'give the loss something to depend on'}."
                )
            value = tensor.detach().requires_grad_() if self.apart or not tensor.requires_grad else tensor.clone()
            handed_on = value.clone()  # not a view: operations in place downstream must leave the leaf alone
            assert handed_on.grad_fn is not None
            # a parameter (or an input that requires grad) handed on as it is has no tape that could end here
            segment = tensor.view_as(tensor) if tensor.is_leaf and tensor.requires_grad else tensor
            self.values[label], self.segments[label], self.modules[label] = value, segment, module
            self._handed_on[handed_on.grad_fn] = label
            self._versions[label] = segment._version, handed_on
            leaves[i] = handed_on
        return rebuild(leaves)
