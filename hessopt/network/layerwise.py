"""What optimizers share whose curvature is that of a network's layers, and who therefore need the network."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from diagnostics.ranks.collectives import Ranks, mesh_group, ranks_of
from hessopt.errors import ModelError
from hessopt.network.arguments import Params, network_of
from hessopt.network.layers import layers_of
from hessopt.network.processes import check_start, unwrapped
from hessopt.network.saved_state import Group, SavedState


class LayerwiseOptimizer(SavedState):
    """Base class: the network, its parameters in groups, and copies.

    Several processes may train one network (:mod:`diagnostics.ranks`): then all take the same steps.

    Args:
        params: The network, also in DistributedDataParallel, or its parameters in any form that :mod:`torch.optim`
            takes, with ``model``.
        model: The network, if ``params`` is not the network itself.
        defaults: Options of param groups: ``lr``, ``weight_decay``, ``momentum`` and ``maximize``, which is the same in
            all groups.

    Raises:
        TypeError: the network is missing.
        ValueError: an option is out of range, or a parameter is not the network's.
        ModelError: the network is compiled, scripted or wrapped for parallel training.
    """

    model: nn.Module

    _SHARDED: ClassVar[bool] = False
    """Whether FSDP2 may shard the network."""

    _TENSORS: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(self, params: Params, model: nn.Module | None, defaults: dict[str, Any]) -> None:
        owner, given = type(self).__name__, network_of(params, model)
        network, self._group = unwrapped(given)
        self._wrapper = None if network is given else weakref.ref(given)
        if network is None:
            raise TypeError(
                f"{owner} needs the network itself: pass it in place of the parameters, `{owner}(model)`, "
                f"or besides them, `{owner}(model.parameters(), model=model)`."
            )
        self.model = network
        self._compared = False
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, defaults)
        layers_of(owner, self.model, self._parameters(), sharded=self._SHARDED)
        if self._group is None:
            self._group = mesh_group(self._parameters())

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        known = set(self.model.parameters())
        for position, p in enumerate(group["params"]):
            if p not in known:
                raise ValueError(
                    f"parameter {position} of group {len(self.param_groups) - 1}, of shape {tuple(p.shape)}, is "
                    "not a parameter of the network; pass the network that owns it as model=."
                )

    @property
    def _ranks(self) -> Ranks:
        """The processes that train the network."""
        return ranks_of(group=self._group)

    def _refuse_join(self) -> None:
        """Raise a ModelError inside of a :class:`torch.distributed.algorithms.Join` of the network."""
        wrapper = None if self._wrapper is None else self._wrapper()
        if wrapper is not None and getattr(wrapper._join_config, "enable", False):
            raise ModelError(
                f"inside of Join processes take different numbers of steps, and those of {type(self).__name__} are "
                "taken together. Leave it out, and give every process as many batches (drop_last=True), or batches "
                "without samples at the end."
            )

    def _check_start(self, gradients: Sequence[Tensor | None], steps: int) -> None:
        """At the first step, and the first one of a state that was loaded: whether all processes begin alike."""
        if not self._compared:
            check_start(type(self).__name__, self._ranks, self._parameters(), gradients, steps)
            self._compared = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compared = False
        for name in ("_group", "_wrapper"):
            self.__dict__.setdefault(name, None)  # a copy, whose process group is the default one

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
