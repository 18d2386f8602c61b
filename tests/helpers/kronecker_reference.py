"""Networks to test on, and the same quantities by dense linear algebra and torch.func."""

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from hessopt import BandedNewton, Fixed, KroneckerAveraging, KroneckerDamping, LeastSquares, NamedLoss
from hessopt.averages.options import declared_loss
from hessopt.closure.output_curvature import curvature_roots, output_hessians
from hessopt.closure.protocol import Evaluation
from hessopt.factors.exact_curvature import ExactCurvature, Structure
from hessopt.factors.layer_factors import layer_factors
from hessopt.factors.sample_factors import Factor
from hessopt.kronecker.band import KroneckerBand
from hessopt.network.cliques import Bandwidth
from hessopt.network.layers import Layer
from hessopt.network.parameter_uses import Use
from tests.conformity.checks import same_state

LossFn = Callable[[Tensor], Tensor]

LAMBDA = 0.03
"""The damping of undisturbed steps."""


class Dag(nn.Module):
    """Linear layers on a directed acyclic graph; layer v sees the activations of its parents, merged, or the input.

    Args:
        parents: For each layer the layers that feed it (all before it); none means the network's input.
        widths: Output features of each layer.
        outputs: Layers whose pre-activations, concatenated, are the network's output.
        merge: "cat" or "add" (of what is padded with zeros to the same width).
    """

    def __init__(
        self,
        parents: Sequence[Sequence[int]],
        widths: Sequence[int],
        outputs: Sequence[int],
        merge: str = "cat",
        features: int = 2,
        bias: Sequence[bool] | None = None,
        in_place: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parents, self.outputs, self.merge, self.in_place = parents, outputs, merge, in_place
        bias = [True] * len(widths) if bias is None else bias
        self.layers = nn.ModuleList()
        for v, above in enumerate(parents):
            sizes = [widths[u] for u in above] or [features]
            fan_in = sum(sizes) if merge == "cat" else max(sizes)
            self.layers.append(nn.Linear(fan_in, widths[v], bias=bias[v], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        pre: list[Tensor] = []
        post: list[Tensor] = []
        for layer, above in zip(self.layers, self.parents, strict=True):
            inputs = [post[u] for u in above] or [x]
            if self.merge == "add":
                width = max(h.shape[1] for h in inputs)
                merged = sum(nn.functional.pad(h, (0, width - h.shape[1])) for h in inputs)
            else:
                merged = torch.cat(inputs, dim=1)
            a = layer(merged)
            pre.append(a if not self.in_place else a.clone())
            post.append(nn.functional.relu(a, inplace=True) if self.in_place else torch.tanh(a))
        return torch.cat([pre[v] for v in self.outputs], dim=1)

    def distances(self) -> Tensor:
        """Shortest undirected paths between layers, over the output too, by Floyd and Warshall."""
        count = len(self.layers)
        lengths = torch.full((count + 1, count + 1), float("inf"))
        lengths.fill_diagonal_(0)
        edges = [(u, v) for v, above in enumerate(self.parents) for u in above] + [(v, count) for v in self.outputs]
        for u, v in edges:
            lengths[u, v] = lengths[v, u] = 1
        for w in range(count + 1):
            lengths = torch.minimum(lengths, lengths[:, w, None] + lengths[None, w])
        return lengths[:count, :count]


def kronecker_band(
    net: nn.Module,
    bandwidth: Bandwidth = 0,
    *,
    parameters: Iterable[Tensor] | None = None,
    curvature: Any = "fisher",
    **options: Any,
) -> KroneckerBand:
    """The engine for all parameters of a network, with options by name."""
    trained = net.parameters() if parameters is None else parameters
    own = kronecker_arguments(**options)
    loss, damping, averages = declared_loss(own.pop("loss")), own.pop("damping"), own.pop("averages")
    assert not own, own
    return KroneckerBand(net, trained, bandwidth, curvature, damping, loss, averages)


def kronecker_arguments(**options: Any) -> dict[str, Any]:
    """Arguments of KroneckerNewton from options by name, in whatever object these are."""
    loss = options.pop("loss", None)
    form = {name: options.pop(name) for name in ("reduction", "class_dim") if name in options}
    unit = options.pop("damping_unit", "loss")
    adaptation = {name: options.pop(name) for name in ("adapt_every", "adapt_rate") if name in options}
    names = [field.name for field in fields(KroneckerAveraging) if field.name in options]
    return {
        "loss": NamedLoss(loss, **form) if form else loss,
        "damping": KroneckerDamping(options.pop("damping", None), unit, **adaptation),
        "averages": KroneckerAveraging(**{name: options.pop(name) for name in names}),
        **options,
    }


def gather(band: KroneckerBand, loss: Tensor) -> None:
    """Back-propagate, and take what is gathered, as a step does."""
    loss.sum().backward(retain_graph=True)
    gradients = [p.grad for p in band.parameters]
    for p in band.parameters:
        p.grad = None
    band.commit(gradients)


def chain(depth: int = 4, width: int = 3, outputs: int = 2, **options: object) -> Dag:
    parents = [[v - 1] if v else [] for v in range(depth)]
    return Dag(parents, [width] * (depth - 1) + [outputs], [depth - 1], **options)  # type: ignore[arg-type]


def skip(**options: object) -> Dag:
    """A chain of four with a skip connection from the first to the last layer: a cycle of four at bandwidth 1."""
    return Dag([[], [0], [1], [2, 0]], [3, 2, 3, 2], [3], **options)  # type: ignore[arg-type]


def branches(**options: object) -> Dag:
    """Two branches from the input, merged; and two heads."""
    return Dag([[], [], [0, 1], [2], [2, 1]], [2, 3, 3, 1, 2], [3, 4], **options)  # type: ignore[arg-type]


def batch(size: int = 6, features: int = 2, outputs: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, real targets, class targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, features, generator=generator, dtype=torch.float64)
    y = torch.randn(size, outputs, generator=generator, dtype=torch.float64)
    return x, y, torch.randint(outputs, (size,), generator=generator)


@dataclass
class Dense:
    """Loss, gradient (P,) and Gauss-Newton matrix (P, P) of all parameters that require grad, in the given order."""

    loss: Tensor
    gradient: Tensor
    ggn: Tensor
    slices: list[slice]


def dense(net: nn.Module, x: Tensor, loss_fn: LossFn, layers: Iterable[nn.Module] | None = None) -> Dense:
    """By torch.func: Jacobian of the output and Hessian of the loss, over the whole batch, nothing per sample."""
    layers = net.layers if layers is None else layers
    names = {p: name for name, p in net.named_parameters()}
    trained, slices, start = [], [], 0
    for layer in layers:
        own = [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
        if not own:
            continue
        trained += own
        size = sum(p.numel() for p in own)
        slices.append(slice(start, start + size))
        start += size

    def output(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(net, {names[p]: t for p, t in zip(trained, tensors, strict=True)}, (x,))

    values = [p.detach().clone() for p in trained]
    z = output(*values)
    jacobians = torch.func.jacrev(output, argnums=tuple(range(len(values))))(*values)
    jacobian = torch.cat([j.reshape(z.numel(), -1) for j in jacobians], dim=1)
    hessian = torch.func.jacrev(torch.func.grad(loss_fn))(z.detach()).reshape(z.numel(), z.numel())
    slope = torch.func.grad(loss_fn)(z.detach()).reshape(-1)
    return Dense(loss_fn(z).detach(), jacobian.T @ slope, jacobian.T @ hessian @ jacobian, slices)


def flat(tensors: Iterable[Iterable[Tensor]]) -> Tensor:
    return torch.cat([t.reshape(-1) for layer in tensors for t in layer])


def unflat(vector: Tensor, like: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    sizes = [t.numel() for layer in like for t in layer]
    parts = iter(vector.split(sizes))
    return [[next(parts).reshape(t.shape) for t in layer] for layer in like]


@dataclass
class Tape:
    """What one evaluation shows: layers, the uses of their parameters, and their graph."""

    layers: tuple[Layer, ...]
    uses: list[Use]
    structure: Structure

    def distances(self) -> Any:
        return self.structure.distances


def record(net: nn.Module, x: Tensor, loss_fn: LossFn) -> tuple[Tape, Tensor, Tensor]:
    """Tape, loss and output of one evaluation."""
    exact = ExactCurvature(net, 2**30)
    recorder = exact.recorder(list(net.parameters()))
    with recorder.recording():
        z = net(x)
        loss = loss_fn(z)
    layers = exact.layers(recorder.uses)
    evaluation = Evaluation(loss, (loss, z), False)
    return Tape(layers, recorder.uses, exact.structure(evaluation, layers, recorder.uses)), loss, z


def factors_of(net: nn.Module, x: Tensor, loss_fn: LossFn) -> tuple[Tape, list[Factor]]:
    tape, loss, z = record(net, x, loss_fn)
    roots = curvature_roots(output_hessians(loss, z))
    return tape, layer_factors(tape.layers, tape.uses, tape.structure.rows, z, roots).factors


def losses(outputs: int) -> dict[str, Callable[[Tensor], Tensor]]:
    _, y, labels = batch(outputs=outputs)
    return {
        "mse": lambda z: functional.mse_loss(z, y),
        "cross entropy": lambda z: functional.cross_entropy(z, labels),
        "least squares": lambda z: (z - y).square().sum() / 2,
    }


def closure_of(net: nn.Module, loss: str) -> Callable[[], Any]:
    x, _, _ = batch()
    outputs = net(x).shape[1]
    y = batch(outputs=outputs)[1]
    if loss == "least squares":
        return lambda: LeastSquares(net(x) - y)
    return lambda: losses(outputs)[loss](net(x))


def trained(net: Dag) -> list[list[Tensor]]:
    return [[p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad] for layer in net.layers]


def step_of(net: Dag, closure: Callable[[], Any], **options: Any) -> Tensor:
    """The change of the trained parameters by one undisturbed step."""
    parameters = [layer for layer in trained(net) if layer]
    before = flat(parameters).detach().clone()
    BandedNewton(net, **{"search": Fixed(LAMBDA), **options}).step(closure)
    return flat(parameters).detach() - before


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def freeze(net: Dag) -> Dag:
    net.layers[0].weight.requires_grad_(False)
    net.layers[1].requires_grad_(False)
    net.layers[2].bias.requires_grad_(False)
    return net


def regression(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    ).to(dtype)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    y = (x[:, :1] * x[:, 1:]).sin()
    return net, lambda: functional.mse_loss(net(x), y)


NETWORKS: dict[str, Callable[[], Dag]] = {
    "chain": chain,
    "in-place relu": lambda: chain(in_place=True),
    "skip": skip,
    "branches": branches,
    "two heads": lambda: Dag([[], []], [2, 3], [0, 1]),  # two apart, although there are only two layers
    "no bias": lambda: skip(bias=[False, True, False, True], merge="add"),
    "frozen": lambda: freeze(branches()),
}


def with_backward(net: nn.Module, closure: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        net.zero_grad()
        result = closure()
        result.backward()
        return result

    return run


@st.composite
def dags(draw: st.DrawFn) -> Dag:
    count = draw(st.integers(1, 5))
    parents = [sorted(draw(st.sets(st.integers(0, v - 1)))) if v else [] for v in range(count)]
    widths = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    outputs = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))
    bias = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    merge, seed = draw(st.sampled_from(["cat", "add"])), draw(st.integers(0, 1000))
    return Dag(parents, widths, outputs, merge=merge, bias=bias, seed=seed, in_place=draw(st.booleans()))


Training: TypeAlias = tuple[nn.Module, Optimizer, Callable[[], Any]]
"""A network, its optimizer and the closure of a step."""


def resumes(first: Training, second: Training, through_file: bool) -> None:
    """Five steps of ``second``, loaded with the state of ``first`` after four, are those of ``first``, bit for bit."""
    net, optimizer, closure = first
    other, resumed, again = second
    for _ in range(4):
        optimizer.step(closure)
    saved = copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(5):
        assert optimizer.step(closure) == resumed.step(again)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert same_state(optimizer.state_dict(), resumed.state_dict())
