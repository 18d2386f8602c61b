"""What optimizers share whose curvature is that of a network's layers, and who therefore need the network."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from hessopt.errors import ModelError
from hessopt.network.arguments import Params, check_group, network_of, refuse_meta
from hessopt.network.layers import layers_of
from hessopt.network.saved_state import SavedState


class LayerwiseOptimizer(SavedState):
    """Base class: the network, its parameters in groups, and copies.

    Args:
        params: The network, or its parameters in any form that :mod:`torch.optim` takes, with ``model``.
        model: The network, if ``params`` is not the network itself.
        defaults: Options of param groups: ``lr``, ``weight_decay``, ``momentum`` and ``maximize``, which is the same in
            all groups.

    Raises:
        TypeError: the network is missing.
        ValueError: an option is out of range, or a parameter is not the network's.
        ModelError: the network is compiled, scripted or wrapped for parallel training.
    """

    model: nn.Module

    _TENSORS = ("momentum_buffer",)
    _OWN: ClassVar[tuple[str, ...]] = ()
    """Names of attributes that a copy has as well, but for ``model``."""

    def __init__(self, params: Params, model: nn.Module | None, defaults: dict[str, Any]) -> None:
        owner, network = type(self).__name__, network_of(params, model)
        if network is None:
            raise TypeError(
                f"{owner} needs the network itself: pass it in place of the parameters, `{owner}(model)`, "
                f"or besides them, `{owner}(model.parameters(), model=model)`."
            )
        self.model = network
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, defaults)
        layers_of(owner, self.model, self._parameters())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the network, with its own ``lr`` and ``weight_decay`` if wanted."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        known = set(self.model.parameters())
        try:
            refuse_meta(group["params"])
            check_group(type(self).__name__, group, self.param_groups[0])
            for position, p in enumerate(group["params"]):
                if p not in known:
                    raise ValueError(
                        f"parameter {position} of group {len(self.param_groups) - 1}, of shape {tuple(p.shape)}, is "
                        "not a parameter of the network; pass the network that owns it as model=."
                    )
        except (ValueError, ModelError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in ("model", *self._OWN)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)  # states of older versions

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
