"""Which linear layers a run of the closure went through, and how they are connected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diagnostics.tape import Function, ancestry
from hessopt.errors import ModelError

_WAY_OUT = (
    "Freeze it with `requires_grad_(False)`, or leave it out of this optimizer (pass the other parameters, and the "
    "network as `model=`) and train it by another one, e.g. torch.optim.AdamW"
)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer ``a = x Wᵀ + b`` as the closure called it.

    Attributes:
        name: The module's name in the network.
        input: x, ``(B, d_in)``, on the tape.
        pre_activation: a, ``(B, d_out)``, on the tape.
        weight: W, ``(d_out, d_in)``, or None if it is not trained.
        bias: b, ``(d_out,)``, or None if there is none or it is not trained.
    """

    name: str
    input: Tensor
    pre_activation: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The trained parameters: weight, bias, or both in this order."""
        return tuple(p for p in (self.weight, self.bias) if p is not None)


@dataclass(frozen=True)
class LinearTape:
    """The trained linear layers of one run of the closure, in the order in which they were called.

    Attributes:
        layers: The layers, ``0..n-1``.
        edges: ``(v, w)`` for every layer v whose pre-activation reaches the input of layer w without passing through
            another trained layer; the network's output is layer number n here.
    """

    layers: tuple[LinearLayer, ...]
    edges: tuple[tuple[int, int], ...]

    def distances(self) -> NDArray[np.float64]:
        """``(n, n)`` lengths of the shortest undirected paths between layers, ``inf`` where there is none.

        A path may pass through the network's output: two heads of a network are two apart.
        """
        count = len(self.layers)
        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from(range(count + 1))
        graph.add_edges_from(self.edges)
        distance = np.full((count + 1, count + 1), np.inf)
        for v, lengths in nx.all_pairs_shortest_path_length(graph):
            distance[v, list(lengths)] = list(lengths.values())
        return distance[:count, :count]


class LinearRecorder:
    """Records the calls of the linear layers that own the trained parameters.

    Args:
        module: The network.
        parameters: The optimizer's parameters; those that require grad are the trained ones.

    Raises:
        ModelError: the network is compiled, scripted or wrapped for parallel training; no parameter requires grad;
            or a trained parameter is not the weight or bias of exactly one :class:`torch.nn.Linear`.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor]) -> None:
        _check_eager(module)
        self.trained = {p for p in parameters if p.requires_grad}
        self.names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        self.linears = _owners(module, self.trained, self.names)
        self.calls: list[tuple[str, Tensor, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record calls while the context lasts; the network computes the same numbers as without."""
        self.calls = []
        with ExitStack() as stack:
            for name, linear in self.linears.items():
                # First of all hooks, so that a hook of the user that changes the output is not taken for the layer.
                handle = linear.register_forward_hook(self._hook(name), prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            self.calls.append((name, args[0] if args else kwargs["input"], output))
            # A clone, so that an in-place activation downstream does not change the recorded tensor's tape.
            return output.clone()

        return record

    def tape(self, loss: Tensor, output: Tensor) -> LinearTape:
        """The recorded layers and how they are connected.

        Args:
            loss: The closure's loss, on the tape.
            output: The tensor that the loss is computed from.

        Raises:
            ModelError: a layer was not called exactly once, or on something else than ``(B, d_in)``; the batch sizes
                differ; or a trained parameter reaches the loss otherwise than through its layer and ``output``.
        """
        layers = self._layers()
        size = layers[0].input.shape[0]
        if size == 0:
            raise ModelError("the closure called the network on an empty batch; curvature needs at least one sample.")
        for layer in layers:
            if layer.input.shape[0] != size:
                raise ModelError(
                    f"layer {layer.name!r} was called on {layer.input.shape[0]} rows and layer {layers[0].name!r} on "
                    f"{size}: row b must be sample b in every layer. {_WAY_OUT}."
                )
        if output.ndim == 0 or output.shape[0] != size:
            raise ModelError(
                f"the output that the loss is computed from has shape {tuple(output.shape)}, but the layers were "
                f"called on {size} samples: the first dimension must be the batch. Let the closure return "
                "`(loss, output)` with an output, or `hessopt.LeastSquares(residuals)` with residuals, of each sample."
            )
        self._check_paths_of_loss(loss, output)
        return LinearTape(layers, self._edges(layers, output))

    def _layers(self) -> tuple[LinearLayer, ...]:
        counts = Counter(name for name, _, _ in self.calls)
        for name in self.linears:
            if counts[name] != 1:
                raise ModelError(
                    f"layer {name!r} was called {counts[name]} times by the closure; each trained layer must be called "
                    f"exactly once (a recomputation by activation checkpointing counts). {_WAY_OUT}."
                )
        layers = []
        for name, x, a in self.calls:
            if x.ndim != 2:
                raise ModelError(
                    f"layer {name!r} was called on a tensor of shape {tuple(x.shape)}; only (batch, features) is "
                    f"available. Flatten the input. {_WAY_OUT}."
                )
            if not a.requires_grad:
                raise ModelError(
                    f"layer {name!r} ran with gradients disabled (torch.no_grad in the model or the closure). Run it "
                    f"with gradients. {_WAY_OUT}."
                )
            linear = self.linears[name]
            weight, bias = (p if p in self.trained else None for p in (linear.weight, linear.bias))
            layers.append(LinearLayer(name, x, a, weight, bias))
        devices = {p.device for layer in layers for p in layer.parameters}
        if len(devices) > 1:
            raise ModelError(
                f"the trained layers are on several devices, {sorted(map(str, devices))}; move them to one."
            )
        return tuple(layers)

    def _check_paths_of_loss(self, loss: Tensor, output: Tensor) -> None:
        if output.grad_fn is None:
            raise ModelError(
                "the output that the loss is computed from has no autograd tape. Return it without `.detach()`."
            )
        leaves, met = ancestry(loss, {output.grad_fn})
        self._refuse(
            leaves,
            "otherwise than through the network's output",
            "Use the optimizer's weight_decay for an "
            "L2 penalty; else let the closure return `(loss, output)` with the tensor that all of the loss is "
            "computed from, or `hessopt.LeastSquares(residuals)`.",
        )
        if not met and loss.grad_fn is not output.grad_fn:
            raise ModelError(
                "the loss does not depend on the output that came with it. Let the closure return `(loss, output)` "
                "with the tensor that the loss is computed from."
            )

    def _edges(self, layers: Sequence[LinearLayer], output: Tensor) -> tuple[tuple[int, int], ...]:
        position: dict[Function, int] = {
            layer.pre_activation.grad_fn: v
            for v, layer in enumerate(layers)
            if layer.pre_activation.grad_fn is not None
        }
        edges = []
        for w, tensor in enumerate([*(layer.input for layer in layers), output]):
            leaves, met = ancestry(tensor, position.keys())
            self._refuse([*leaves, tensor], "otherwise than by calling its layer", f"{_WAY_OUT}.")
            edges += [(position[function], w) for function in met]
        return tuple(sorted(edges))

    def _refuse(self, leaves: Collection[Tensor], how: str, way_out: str) -> None:
        for leaf in leaves:
            if leaf in self.trained:
                raise ModelError(f"parameter {self.names[leaf]!r} reaches the loss {how}. {way_out}")


def _owners(module: nn.Module, trained: Collection[Tensor], names: dict[Tensor, str]) -> dict[str, nn.Linear]:
    """The linear layers that own the trained parameters, by name."""
    if not trained:
        raise ModelError("none of the optimizer's parameters requires grad, so there is nothing to train.")
    owner: dict[Tensor, str] = {}
    linears: dict[str, nn.Linear] = {}
    for name, child in module.named_modules():
        # A subclass with a forward of its own computes something else, and so does a patched instance.
        plain = isinstance(child, nn.Linear) and getattr(child.forward, "__func__", None) is nn.Linear.forward
        for kind, p in child.named_parameters(recurse=False):
            if p not in trained:
                continue
            if not plain or kind not in ("weight", "bias"):
                raise ModelError(
                    f"parameter {names[p]!r} belongs to a {type(child).__name__}, not to a plain torch.nn.Linear. "
                    f"{_WAY_OUT}."
                )
            if owner.setdefault(p, name) != name:
                raise ModelError(
                    f"parameter {names[p]!r} is shared by the layers {owner[p]!r} and {name!r}. {_WAY_OUT}."
                )
            assert isinstance(child, nn.Linear)
            linears[name] = child
    for p in trained:
        if p not in owner:
            raise ModelError(
                f"a parameter of shape {tuple(p.shape)} is not, or no longer, a parameter of the network; build a new "
                "optimizer after replacing layers."
            )
    return linears


def _check_eager(module: nn.Module) -> None:
    for name, child in module.named_modules():
        where = f"module {name!r}" if name else "the network"
        if isinstance(child, torch.jit.ScriptModule):
            raise ModelError(f"{where} is scripted; pass the eager network that it was made from.")
        if type(child).__module__.startswith("torch._dynamo") or child._compiled_call_impl is not None:
            raise ModelError(f"{where} is compiled, which hides its layers; pass the network without torch.compile.")
        if isinstance(child, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ModelError(
                f"{where} is wrapped in {type(child).__name__}, over which curvature is not reduced yet; train the "
                "wrapped network itself on one device."
            )
