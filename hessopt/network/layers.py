"""The layers of a network: which module owns each trained parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diagnostics.ranks.spread import spread
from hessopt.errors import ModelError
from hessopt.network.processes import check_distributed, refuse_spread


@dataclass(frozen=True)
class Layer:
    """A module that owns trained parameters directly, not through a child: one block of the curvature.

    Attributes:
        name: The module's name in the network, empty for the network itself.
        parameters: Its trained parameters, in the order of their registration.
    """

    name: str
    parameters: tuple[Tensor, ...]


def layers_of(
    owner: str, module: nn.Module, parameters: Iterable[Tensor], *, sharded: bool = False
) -> tuple[Layer, ...]:
    """The layers that own the trained parameters, in the order of ``named_modules``.

    A parameter that several modules share belongs to the first of them.

    Args:
        owner: The optimizer's name.
        module: The network.
        parameters: The optimizer's parameters; those that require grad are the trained ones.
        sharded: FSDP2 may shard the network.

    Raises:
        ModelError: the network is compiled, scripted or wrapped for parallel training; no parameter requires grad; a
            trained parameter is not, or no longer, the network's; or they are on several devices.
    """
    _check_eager(module)
    parameters = list(parameters)
    found = spread(module) if sharded else None
    if found is not None and found.kind == "fully_shard (FSDP2)":
        check_distributed(owner, parameters, module)
    else:
        refuse_spread(owner, module)
    trained = dict.fromkeys(p for p in parameters if p.requires_grad)
    if not trained:
        raise ModelError("none of the optimizer's parameters requires grad, so there is nothing to train.")
    left, layers = set(trained), []
    for name, child in module.named_modules():
        own = tuple(p for p in child.parameters(recurse=False) if p in left)
        left.difference_update(own)
        if own:
            layers.append(Layer(name, own))
    for p in trained:
        if p in left:
            raise ModelError(
                f"a parameter of shape {tuple(p.shape)} is not, or no longer, a parameter of the network; build a new "
                "optimizer after replacing layers."
            )
    devices = {p.device for p in trained}
    if len(devices) > 1:
        raise ModelError(f"the trained layers are on several devices, {sorted(map(str, devices))}; move them to one.")
    return tuple(layers)


def _check_eager(module: nn.Module) -> None:
    for name, child in module.named_modules():
        where = f"module {name!r}" if name else "the network"
        if isinstance(child, torch.jit.ScriptModule):
            raise ModelError(f"{where} is scripted; pass the eager network that it was made from.")
        if type(child).__module__.startswith("torch._dynamo") or child._compiled_call_impl is not None:
            raise ModelError(f"{where} is compiled, which hides its layers; pass the network without torch.compile.")
