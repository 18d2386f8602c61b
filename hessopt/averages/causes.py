"""Why no curvature was gathered, and what to do about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from hessopt.averages.recorder import Recorder
from hessopt.closure.loss_curvature import LOSSES, Loss
from hessopt.errors import ClosureError, HessoptError, ModelError

DECLARE = f"declare the loss, loss={' | '.join(map(repr, LOSSES))} or the module that computes it"
SEE_LOSS = "declare the module that computes the loss and call it, loss=criterion, so that it is seen"
CLOSURE = "pass a closure, optimizer.step(lambda: loss_fn(model(x), y))"


@dataclass
class Seen:
    """What happened since curvature became due.

    Attributes:
        network: The network was called with gradients enabled.
        without_gradients: It was called with gradients disabled.
        returned: Type of what it returned, if there is no tensor in it that the loss is known to be computed from.
        unclear: Shape of its ``logits``, if the classes among their dimensions are not known.
        loss: The declared module was called with gradients enabled.
        misfit: It returned something else than the loss.
        noted: There was an output, or a loss, that a backward might have arrived at.
        bare: A backward arrived there, and no layer had been seen on the tape.
        empty: A backward arrived there, and the batch had no samples.
    """

    network: bool = False
    without_gradients: bool = False
    returned: str | None = None
    unclear: tuple[int, ...] | None = None
    loss: bool = False
    misfit: bool = False
    noted: bool = False
    bare: bool = False
    empty: bool = False

    def uncalled(self, loss: nn.Module) -> str:
        """That a declared module was not called."""
        name = type(loss).__name__
        if self.loss:
            return (
                f"the declared {name} was called since the last step, but on nothing that depends on the network's "
                "parameters. Call it on what the network returns, not detached."
            )
        return (
            f"the declared {name} was not called, on what the network returns, since the last step. Call that very "
            "module in the loop or closure and not its functional form; if the loss is computed inside of the network "
            '(as with `labels=`), take it out of there, or declare it by name, loss="cross_entropy", or leave out '
            'loss= and pass a closure that returns `(loss, output)`, or use curvature="empirical" (SpectralNewton: '
            "in its coordinates)."
        )


def cause(seen: Seen, recorder: Recorder, loss: Loss | None, empirical: bool) -> HessoptError:
    """The error to raise at a step for which no curvature was gathered, ever.

    Args:
        seen: What happened since curvature became due.
        recorder: Of the layers' calls.
        loss: The declared loss, or None.
        empirical: Whether curvature is that of the samples' own gradients, which needs no loss.
    """
    start = "no curvature was gathered: "
    called = seen.network or recorder.called
    if seen.empty:
        return ClosureError(f"{start}the batches of all processes are empty.")
    if not empirical and loss is None:
        return ClosureError(f"{start}the loss is not known. To have it, {DECLARE}, or {CLOSURE}.")
    if not called and (seen.without_gradients or recorder.called_without_gradients):
        return ClosureError(
            f"{start}the network was called with gradients disabled only (torch.no_grad, torch.inference_mode) since "
            "the last step. Call it with gradients enabled, and back-propagate the loss."
        )
    if seen.bare and not recorder.called:
        return ClosureError(
            f"{start}forward hooks of the network's layers did not run.{_compiled()} Call the network that the "
            "optimizer was given, or its layers, as modules."
        )
    if not called and not seen.loss:
        return ClosureError(
            f"{start}the network was not called since the last step, as far as its forward hooks see.{_compiled()} "
            "Call the network that the optimizer was given, or its layers, and back-propagate the loss, before each "
            "step."
        )
    if not empirical and isinstance(loss, nn.Module) and not seen.noted:
        if seen.misfit:
            return ModelError(
                f"the declared {type(loss).__name__} does not return the loss, a tensor with one number that depends "
                "on its input. Leave out loss= and pass a closure that returns `(loss, output)`."
            )
        return ClosureError(start + seen.uncalled(loss))
    if seen.unclear is not None:
        return ModelError(
            f"the network returns {seen.returned}, whose `logits` are of shape {seen.unclear}, so which of their "
            'dimensions are classes is not known. Say so: loss=hessopt.NamedLoss("cross_entropy", class_dim=-1), or 1.'
        )
    if seen.returned is not None:
        return ModelError(
            f"the network returns {seen.returned}, which is neither a tensor nor has a tensor `logits`, and the loss's "
            "curvature is of one tensor. Declare the loss module that you call, loss=criterion, or leave out loss= and "
            "pass a closure that returns `(loss, output)`, or wrap the network in a module that returns the tensor."
        )
    if not empirical and not seen.network and not isinstance(loss, nn.Module):
        return ClosureError(
            f"{start}layers of the network were called, but not the network itself, whose output the declared "
            f"{loss!r} is a function of.{_compiled()} Call the network, or declare the module that computes the loss."
        )
    return ClosureError(
        f"{start}no backward() went from the loss through the network's output to its parameters since the last step. "
        "Call backward() on that loss, of an output that is neither detached nor changed in place."
    )


def _compiled() -> str:
    """What to say of compiled networks, if there are any in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None or not dynamo.counters["frames"]:
        return ""
    return (
        " Networks were compiled in this process: torch.compile does not look for hooks that came after it, nor tell "
        "two networks of one class apart by theirs. Set `torch._dynamo.config.skip_nnmodule_hook_guards = False` "
        "before compiling, or call torch._dynamo.reset() when the optimizer was made."
    )


def refuse_scaler(optimizer: Optimizer) -> None:
    """Raise a ClosureError where a GradScaler left gradients scaled, as ``_step_supports_amp_scaling`` had it do."""
    if optimizer.__dict__.pop("found_inf", None) is not None:
        del optimizer.__dict__["grad_scale"]
        raise ClosureError(
            'under a GradScaler curvature="empirical" has to see by what the loss was scaled: '
            f"{SEE_LOSS}. Or train in bfloat16, without a scaler."
        )
