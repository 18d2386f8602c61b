"""Which parameters of a network have a Kronecker-factored curvature, and the rows that its factors are averages of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.autograd.patches import patch_gram, patches_of

Sharing = Literal["expand", "reduce"]

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_CHANNEL_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_TRAILING_NORMS = (nn.LayerNorm, nn.RMSNorm)
LEAST = 8
"""Samples that are left of a batch that is thinned."""


@dataclass(frozen=True)
class Rows:
    """What one call of a layer adds to the factors of its block, for ``g`` groups, n samples of T positions each.

    Attributes:
        inputs: ``(g, n, T, a)``, the homogeneous coordinate of the bias included; for an embedding the positions'
            indices, ``(1, n, T)``, which stand for unit vectors.
        cotangents: ĵ, ``(g, K, n, T, o)``.
        gram: ``Σ x xᵀ`` over samples and positions, ``(g, a, a)``, in place of inputs, whose shape alone is right then.
    """

    inputs: Tensor
    cotangents: Tensor
    gram: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters whose curvature is ``A ⊗ G``: the step is a matrix ``(g, o, a)``, of g independent groups.

    Attributes:
        name: The module's name.
        kind: ``"linear"``, ``"convolution"``, ``"embedding"``, ``"norm"`` or ``"bias"``.
        modules: Modules that share the parameters.
        weight: The trained weight, or None.
        bias: The trained bias, or None.
        shape: ``(g, o, a)``.
        diagonal: Whether G and A are diagonal.
        transposed: The weight is ``(inputs, outputs)``.
    """

    name: str
    kind: str
    modules: tuple[nn.Module, ...]
    weight: Tensor | None
    bias: Tensor | None
    shape: tuple[int, int, int]
    diagonal: tuple[bool, bool]
    transposed: bool = False

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The weight, the bias, or both in this order."""
        return tuple(p for p in (self.weight, self.bias) if p is not None)

    @property
    def coupled(self) -> bool:
        """Whether there are factors between this block and others."""
        return self.shape[0] == 1 and self.diagonal == (False, False)

    def views(self, matrix: Tensor) -> list[Tensor]:
        """Views of ``(g, o, a)``, which is contiguous, in the shape of the parameters."""
        if self.kind == "norm":
            parts = matrix.view(-1).split([p.numel() for p in self.parameters])
            return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]
        if self.kind in ("bias", "embedding"):
            return [matrix.view(self.parameters[0].shape)]
        assert self.weight is not None
        if self.transposed:
            views = [matrix[0, :, : len(self.weight)].mT]
        else:
            views = [matrix[..., : self.weight.shape[1:].numel()].view(self.weight.shape)]
        return views if self.bias is None else [*views, matrix[..., -1].view(self.bias.shape)]

    def rows(
        self,
        module: nn.Module,
        x: Tensor,
        cotangents: Tensor,
        sharing: Sharing,
        dtype: torch.dtype,
        gram: bool = False,
    ) -> Rows:
        """The rows of one call.

        Args:
            module: Which module was called.
            x: Its input, detached.
            cotangents: ``(K, *output.shape)``.
            sharing: For a linear layer with several positions a sample: ``"expand"`` takes positions for independent,
                ``"reduce"`` takes the mean of their inputs and the sum of their cotangents.
            dtype: Of the rows.
            gram: The Gram matrix of the inputs is enough, where that is less work.
        """
        j = cotangents.to(dtype)
        if self.kind == "embedding":
            return Rows(x.reshape(1, len(x), -1), j.reshape(1, len(j), len(x), -1, j.shape[-1]))
        x = x.to(dtype)
        dimensions = _spatial(module)
        if x.ndim == _least_dimensions(module):  # one sample without a batch dimension
            x, j = x.unsqueeze(0), j.unsqueeze(1)
        if self.kind == "norm":
            return _norm_rows(module, x, j, self.weight is not None, self.bias is not None)
        if self.kind == "bias":
            return _one(_sums(j, x.ndim - 1 if dimensions is None else 1))
        if dimensions is not None:
            assert isinstance(module, nn.modules.conv._ConvNd)
            j = _by_group(j, self.shape[0])
            found = patch_gram(module, x, self.bias is not None) if gram and not self.diagonal[1] else None
            if found is not None:
                return Rows(x.new_zeros(()).expand(j.shape[0], *j.shape[2:4], self.shape[2]), j, found)
            inputs = patches_of(module, x, self.bias is not None)
        else:
            inputs = x.reshape(1, len(x), -1, x.shape[-1])
            j = j.reshape(1, len(j), len(x), -1, j.shape[-1])
            if self.bias is not None:
                inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)
        if sharing == "reduce" and self.kind == "linear":
            inputs, j = inputs.mean(2, keepdim=True), j.sum(3, keepdim=True)
        return Rows(inputs, j)

    def thinned(
        self, module: nn.Module, x: Tensor, cotangents: Tensor, least: float, first: int
    ) -> tuple[Tensor, Tensor]:
        """Input and cotangents of every k-th sample, as large as if they were all.

        Args:
            module: Which module was called.
            x: Its input, detached.
            cotangents: ``(K, *output.shape)``.
            least: Rows for each dimension of the larger factor that are left.
            first: Modulo k, which sample comes first.
        """
        groups, outputs, inputs = self.shape
        if self.kind not in ("linear", "convolution") or x.ndim == _least_dimensions(module):
            return x, cotangents
        rows = cotangents[0].numel() // (groups * outputs)
        stride = min(int(rows / (least * max(outputs, inputs))), len(x) // LEAST)
        if stride < 2:
            return x, cotangents
        kept = slice(first % stride, None, stride)
        part = x[kept]
        return part, cotangents[:, kept] * (len(x) / len(part)) ** 0.5


def plan_blocks(
    module: nn.Module, trained: Iterable[Tensor], max_size: int, *, tied: bool = False
) -> tuple[list[Block], dict[Tensor, str]]:
    """Assign parameters to blocks.

    Args:
        module: The network.
        trained: Parameters to assign.
        max_size: Factors with more rows are diagonal.
        tied: A weight that is an embedding's and a linear layer's has the factors of the linear layer alone.

    Returns:
        The blocks in the order of ``module.named_modules()``, and for every other parameter the reason.
    """
    wanted = dict.fromkeys(trained)
    owners: dict[Tensor, list[tuple[str, nn.Module, str]]] = {}
    names: dict[Tensor, str] = {}
    for name, child in module.named_modules():
        for kind, p in child.named_parameters(recurse=False):
            if p in wanted:
                owners.setdefault(p, []).append((name, child, kind))
                names[p] = f"{name}.{kind}" if name else kind
    if tied:
        for p, places in owners.items():
            heads = [place for place in places if not isinstance(place[1], nn.Embedding)]
            if heads and all(_kind(layer) == "linear" for _, layer, _ in heads):
                owners[p] = heads
    blocks: list[Block] = []
    rest: dict[Tensor, str] = {}
    done: set[Tensor] = set()
    for p, places in owners.items():
        if p in done:
            continue
        name, child, _ = places[0]
        block = _block(name, child, tuple(dict.fromkeys(m for _, m, _ in places)), wanted, max_size)
        reason = block if isinstance(block, str) else _shared(block, owners)
        if reason:
            rest[p] = reason
        else:
            assert isinstance(block, Block)
            blocks.append(block)
            done.update(block.parameters)
    rest.update({p: "not a parameter of the network" for p in wanted if p not in owners})
    return blocks, rest


def _block(
    name: str, module: nn.Module, modules: tuple[nn.Module, ...], trained: dict[Tensor, None], limit: int
) -> Block | str:
    """The block that a module's own parameters make, or why there is none."""
    kind = _kind(module)
    if kind is None:
        return f"no rule for {type(module).__name__}"
    weight, bias = (
        None if (p := module._parameters.get(key)) is None or p not in trained else p for key in ("weight", "bias")
    )
    if weight is None and bias is None:
        return f"no rule for this parameter of {type(module).__name__}"
    transposed = kind == "linear" and not isinstance(module, nn.Linear)
    if kind == "norm":
        sizes = sum(p.numel() for p in (weight, bias) if p is not None)
        shape = (1, sizes, 1)
    elif weight is None:
        assert bias is not None
        kind, shape = "bias", (1, bias.numel(), 1)
    elif kind == "convolution":
        groups = module.groups
        assert isinstance(groups, int)
        shape = (groups, len(weight) // groups, weight.shape[1:].numel() + (bias is not None))
    elif transposed:
        shape = (1, weight.shape[1], len(weight) + (bias is not None))
    else:
        shape = (1, len(weight), weight.shape[1:].numel() + (bias is not None))
    diagonal = (kind == "embedding" or shape[1] > limit, shape[2] > limit)
    return Block(name, kind, modules, weight, bias, shape, diagonal, transposed)


def _kind(module: nn.Module) -> str | None:
    # A subclass with a forward of its own computes something else, and so does a patched instance.
    for kind, types in (
        ("linear", (nn.Linear,)),
        ("convolution", tuple(_CONVOLUTIONS)),
        ("embedding", (nn.Embedding,)),
        ("norm", (*_CHANNEL_NORMS, *_TRAILING_NORMS)),
    ):
        for cls in types:
            if isinstance(module, cls) and getattr(module.forward, "__func__", None) is cls.forward:
                if isinstance(module, nn.Embedding) and (
                    module.max_norm is not None or module.scale_grad_by_freq or module.sparse
                ):
                    return None
                return kind
    return "linear" if _transposed_linear(module) else None


def _transposed_linear(module: nn.Module) -> bool:
    """Whether this is a ``Conv1D`` of Hugging Face's transformers: ``x W + b``, W ``(inputs, outputs)``.

    It is told by its name and form, as that package need not be there.
    """
    cls = next((c for c in type(module).__mro__ if c.__name__ == "Conv1D"), None)
    if cls is None or getattr(module.forward, "__func__", None) is not cls.__dict__.get("forward"):
        return False
    weight, outputs = module._parameters.get("weight"), getattr(module, "nf", None)
    own = {name for name, p in module._parameters.items() if p is not None}
    return weight is not None and own <= {"weight", "bias"} and weight.ndim == 2 and weight.shape[1] == outputs


def _shared(block: Block, owners: dict[Tensor, list[tuple[str, nn.Module, str]]]) -> str:
    """Why the sharing of parameters forbids this block; empty if it does not."""
    first = block.modules[0]
    for p in block.parameters:
        places = owners[p]
        if {m for _, m, _ in places} != set(block.modules):
            return "shared by modules that do not share their other parameters"
        if any(type(m) is not type(first) for _, m, _ in places) or len({kind for *_, kind in places}) > 1:
            return "shared by modules of different kinds"
    return ""


def _spatial(module: nn.Module) -> int | None:
    return next((d for cls, d in _CONVOLUTIONS.items() if isinstance(module, cls)), None)


def _least_dimensions(module: nn.Module) -> int:
    """Of an input without a batch."""
    if isinstance(module, _TRAILING_NORMS):
        return len(module.normalized_shape)
    dimensions = _spatial(module)
    if dimensions is not None:
        return dimensions + 1
    return 1 if isinstance(module, nn.Linear) or _transposed_linear(module) else 0


def _one(j: Tensor) -> Rows:
    """Rows of exact per-sample gradients ``(K, n, P)``: the input is the number one."""
    return Rows(j.new_ones(1, j.shape[1], 1, 1), j[None, :, :, None, :])


def _sums(j: Tensor, channels: int) -> Tensor:
    """``(K, n, …, C, …)`` summed over all but columns, samples and dimension ``channels`` of the layer."""
    kept = (0, 1, channels + 1)
    others = [d for d in range(j.ndim) if d not in kept]
    return j.sum(others) if others else j


def _norm_rows(module: nn.Module, x: Tensor, j: Tensor, weight: bool, bias: bool) -> Rows:
    """Per-sample gradients of the affine map that follows a normalisation."""
    if isinstance(module, _TRAILING_NORMS):
        shape: Sequence[int] = module.normalized_shape
        if isinstance(module, nn.LayerNorm):
            normal = functional.layer_norm(x, shape, eps=module.eps)
        else:
            normal = functional.rms_norm(x, shape, eps=module.eps)
        keep = x.ndim - len(shape)
        collapse = [d + 1 for d in range(1, keep)]
    else:
        normal = _normalised(module, x)
        collapse = list(range(3, j.ndim))
    parts = [t.sum(collapse) if collapse else t for t in ([j * normal] if weight else []) + ([j] if bias else [])]
    return _one(torch.cat([part.flatten(2) for part in parts], dim=2))


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    running = module.running_mean is not None and not module.training
    mean, var = (module.running_mean, module.running_var) if running else (None, None)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return functional.instance_norm(x, mean, var, use_input_stats=not running, eps=module.eps)
    return functional.batch_norm(x, mean, var, training=not running, eps=module.eps)


def _by_group(j: Tensor, groups: int) -> Tensor:
    """``(K, n, g·o, *L)`` to ``(g, K, n, T, o)``."""
    j = j.flatten(3) if j.ndim > 3 else j
    grouped: Tensor = j.unflatten(2, (groups, -1))
    return grouped.permute(2, 0, 1, 4, 3)
