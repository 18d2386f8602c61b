"""The banded Kronecker curvature against dense matrices, on random DAGs and on networks with positions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hessopt.averages.averages import Moments
from hessopt.averages.options import due
from hessopt.averages.seeds import hessian_columns
from hessopt.closure.loss_curvature import named_curvature
from hessopt.errors import ClosureError, ModelError
from hessopt.kronecker.band import KroneckerBand
from hessopt.kronecker.inverse import triangular_inverse
from tests.helpers.kronecker_reference import Dag, batch, chain, dags, dense, gather, kronecker_band, skip

EXACT = {"curvature": "ggn", "columns": "exact", "loss": "mse", "reduction": "sum"}
BANDWIDTHS = st.sampled_from([0, 1, 2, "full"])


def order(band: KroneckerBand) -> Tensor:
    """For each entry of the engine's vector its place among the parameters, weight before bias, block by block."""
    assert band.averages.factors is not None
    flat, _ = band.averages.factors.blank()
    views = band.averages.factors.views(band.averages.factors.matrices(flat))
    start = 0
    for block in band.averages.factors.blocks:
        for p in block.parameters:
            views[p].copy_(torch.arange(start, start + p.numel()).view(p.shape))
            start += p.numel()
    return flat.long()


def as_dense(band: KroneckerBand, tapered: bool = True) -> Tensor:
    """``t ∘ M`` in the order of the engine's vector, by Kronecker products of the averages."""
    assert band.averages.factors is not None
    f = band.averages.factors
    sizes = [math.prod(stack.shape) for stack in f.stacks]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    found = torch.zeros(sum(sizes), sum(sizes), dtype=f.dtype)

    def part(stack: int, entry: int) -> slice:
        _, o, a = f.stacks[stack].shape
        start = offsets[stack] + entry * o * a
        return slice(start, start + o * a)

    for number, stack in enumerate(f.stacks):
        for i in range(stack.shape[0]):
            own = part(number, i)
            g = stack.outputs[i].diag() if stack.diagonal[0] else stack.outputs[i]
            a = stack.inputs[i].diag() if stack.diagonal[1] else stack.inputs[i]
            found[own, own] = torch.kron(g, a)
    for pairs in f.pairs:
        for i, (v, w) in enumerate(zip(pairs.left, pairs.right, strict=True)):
            rows, columns = part(pairs.stacks[0], v), part(pairs.stacks[1], w)
            weight = pairs.taper[i].item() if tapered else 1.0
            found[rows, columns] = weight * torch.kron(pairs.outputs[i], pairs.inputs[i])
            found[columns, rows] = found[rows, columns].mT
    return found


def damped(band: KroneckerBand) -> Tensor:
    """``t ∘ M + blockdiag(E_v)``, E_v by its definition."""
    assert band.averages.factors is not None
    f, found, start = band.averages.factors, as_dense(band), 0
    for stack in f.stacks:
        m, o, a = stack.shape
        for i in range(m):
            g = stack.outputs[i].diag() if stack.diagonal[0] else stack.outputs[i]
            x = stack.inputs[i].diag() if stack.diagonal[1] else stack.inputs[i]
            pi = ((x.trace() / a) / (g.trace() / o)).sqrt() if x.trace() > 0 and g.trace() > 0 else 1.0
            root = band.inverse.absolute_damping.value**0.5
            extra_g, extra_x = root / pi, pi * root
            if band.inverse.per_layer:
                extra_g, extra_x = (root * m.diagonal().mean() if m.trace() > 0 else root for m in (g, x))
            one_o, one_a = (torch.eye(n, dtype=f.dtype) for n in (o, a))
            whole = torch.kron(g + extra_g * one_o, x + extra_x * one_a)
            own = slice(start, start + o * a)
            found[own, own] += whole - torch.kron(g, x)
            start += o * a
    return found


def engine(net: nn.Module, x: Tensor, bandwidth: object, **options: object) -> KroneckerBand:
    band = kronecker_band(net, bandwidth, **{**EXACT, **options})  # type: ignore[arg-type]
    gather(band, net(x))
    return band


@given(dags())
@settings(max_examples=30, deadline=None)
def test_full_bandwidth_on_one_sample_is_the_gauss_newton_matrix(net: Dag) -> None:
    x = batch(size=1)[0]
    band = engine(net, x, "full")
    assert band.averages.factors is not None
    expected = dense(
        net, x, lambda z: z.square().sum(), [m for b in band.averages.factors.blocks for m in b.modules]
    ).ggn
    index = order(band)
    assert torch.allclose(as_dense(band), expected[index][:, index], rtol=1e-10, atol=1e-12)


@given(dags(), BANDWIDTHS)
@settings(max_examples=40, deadline=None)
def test_averages_are_second_moments(net: Dag, bandwidth: object) -> None:
    """Factors of layers and of pairs, from rows that are computed here."""
    x = batch()[0]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen[module] = (args[0].detach(), output)
        return output.clone()

    handles = [layer.register_forward_hook(keep) for layer in net.layers]
    z = net(x)
    for handle in handles:
        handle.remove()
    columns = torch.eye(z.shape[1], dtype=z.dtype) * 2**0.5
    moments = {}
    for layer, (inputs, output) in seen.items():
        rows = torch.cat([inputs, torch.ones(len(x), 1)], 1) if layer.bias is not None else inputs
        parts = [
            torch.autograd.grad(z, output, c.expand_as(z), retain_graph=True, allow_unused=True)[0] for c in columns
        ]
        j = torch.stack([torch.zeros_like(output) if p is None else p for p in parts])
        moments[layer] = rows, j.flatten(0, 1)
    band = engine(net, x, bandwidth)
    assert band.averages.factors is not None
    for block, (number, start) in zip(band.averages.factors.blocks, band.averages.factors.place, strict=True):
        rows, j = moments[block.modules[0]]
        if not j.any():
            continue  # the output does not depend on this layer
        stack = band.averages.factors.stacks[number]
        assert torch.allclose(stack.inputs[start], rows.mT @ rows / len(x), rtol=1e-10, atol=1e-13)
        assert torch.allclose(stack.outputs[start], j.mT @ j, rtol=1e-10, atol=1e-13)
    inside = {pair for pairs in band.averages.factors.pairs for pair in pairs.blocks}
    near = net.distances()
    reach = float("inf") if bandwidth == "full" else bandwidth
    positions = [list(net.layers).index(block.modules[0]) for block in band.averages.factors.blocks]
    for v in range(len(positions)):
        for w in range(v):
            if near[positions[v], positions[w]] <= reach:
                assert (w, v) in inside
    for pairs in band.averages.factors.pairs:
        for i, (v, w) in enumerate(pairs.blocks):
            (left, j), (right, k) = (moments[band.averages.factors.blocks[u].modules[0]] for u in (v, w))
            if not (j.any() and k.any()):
                continue
            assert torch.allclose(pairs.inputs[i], left.mT @ right / len(x), rtol=1e-10, atol=1e-13)
            assert torch.allclose(pairs.outputs[i], j.mT @ k, rtol=1e-10, atol=1e-13)


@given(dags(), BANDWIDTHS, st.integers(0, 100), st.sampled_from(["loss", "layer"]))
@settings(max_examples=80, deadline=None)
def test_product_and_solution_against_dense_matrices(net: Dag, bandwidth: object, seed: int, unit: str) -> None:
    damping = 0.05 if unit == "loss" else 0.3
    band = engine(net, batch()[0], bandwidth, damping=damping, damping_unit=unit, iterations=200, factor_every=1)
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in band.parameters]
    whole, tapered = damped(band), as_dense(band)
    rounding = 1e-12 * tapered.diagonal().sum()
    assert torch.linalg.eigvalsh(tapered).min() > -rounding
    if unit == "loss":
        assert torch.linalg.eigvalsh(whole).min() > band.inverse.absolute_damping.value - rounding
    assert band.averages.factors is not None
    direction = band.direction(gradients)
    flat = band.inverse.flat(gradients)
    step = direction.flat[0]
    # In units of each parameter's own curvature: layers may differ by any factor, and so may the rounding errors.
    units = whole.diagonal().sqrt()
    assert ((whole @ step - flat) / units).norm() <= 1e-8 * (flat / units).norm()
    assert not direction.failed
    assert torch.allclose(direction.decrement, flat @ step, rtol=1e-8)
    y = torch.cat([part.flatten() for part in band.averages.factors.product(band.averages.factors.matrices(flat))])
    assert torch.allclose(y, tapered @ flat, rtol=1e-10, atol=1e-10 * y.norm())
    assert torch.allclose(band.quadratic(gradients), flat @ tapered @ flat, rtol=1e-10)


@given(dags(), BANDWIDTHS, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_every_iterate_descends(net: Dag, bandwidth: object, iterations: int) -> None:
    band = engine(net, batch()[0], bandwidth, damping=1e-3, iterations=iterations)
    gradients = [
        torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0)) for p in band.parameters
    ]
    direction = band.direction(gradients)
    inner = sum((g * d).sum() for g, d in zip(gradients, direction.steps, strict=True))
    assert inner > 0
    assert not direction.failed
    # x' P x = g' x for iterates of conjugate gradients from zero: what the trust region relies on.
    step = direction.flat[0]
    assert torch.allclose(direction.decrement, torch.as_tensor(inner), rtol=1e-9)
    assert torch.allclose(step @ damped(band) @ step, direction.decrement, rtol=1e-7)


@pytest.mark.parametrize("unit", ["loss", "layer"])
@pytest.mark.parametrize("bandwidth", [0, 1, "full"])
def test_rescaled_layers_take_the_rescaled_step(bandwidth: object, unit: str) -> None:
    """``c W_1, c b_1, W_2 / c`` is the same function of a ReLU network, also after a step in units of the layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)).double()
    twin, c = copy.deepcopy(net), 100.0
    with torch.no_grad():
        for p, factor in ((twin[0].weight, c), (twin[0].bias, c), (twin[2].weight, 1 / c)):
            p.mul_(factor)
    x, probe = torch.randn(7, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    outputs = []
    for model in (net, twin):
        band = engine(model, x, bandwidth, damping=0.1, damping_unit=unit, iterations=200, factor_every=1)
        gradients = torch.autograd.grad(model(x).cos().sum(), band.parameters)
        direction = band.direction(list(gradients))
        with torch.no_grad():
            for p, d in zip(band.parameters, direction.steps, strict=True):
                p.sub_(0.1 * d)
        band.detach()
        outputs.append(model(probe).detach())
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-6) == (unit == "layer")


@pytest.mark.parametrize("unit", ["loss", "layer"])
def test_penalty_is_the_dampings_share_of_the_diagonal(unit: str) -> None:
    """``Σ λ_v ‖d_v‖²``, with λ_v the number given or that times the mean of the layer's diagonal."""
    band = engine(chain(), batch()[0], 0, damping=0.1, damping_unit=unit)
    assert band.averages.factors is not None
    flat, _ = band.averages.factors.blank()
    flat.normal_(generator=torch.Generator().manual_seed(0))
    expected, start = 0.0, 0
    for stack in band.averages.factors.stacks:
        m, o, a = stack.shape
        for i in range(m):
            part = flat[start : start + o * a]
            means = stack.outputs[i].diagonal().mean() * stack.inputs[i].diagonal().mean()
            expected += band.inverse.absolute_damping.value * (1 if unit == "loss" else means) * part.square().sum()
            start += o * a
    found = band.inverse.factored.penalty(flat, band.inverse.absolute_damping)
    assert torch.allclose(found, torch.as_tensor(expected), rtol=1e-10)


def test_limits() -> None:
    net, x = chain(depth=5), batch()[0]
    whole = as_dense(engine(net, x, "full"), tapered=False)
    for bandwidth in (4, 17, "full"):
        assert torch.equal(as_dense(engine(net, x, bandwidth)), whole)
    diagonal = engine(net, x, 0)
    assert diagonal.averages.factors is not None
    assert not diagonal.averages.factors.pairs
    found = as_dense(diagonal)
    assert torch.equal(found, torch.where(found != 0, whole, 0.0))
    tapered = as_dense(engine(net, x, 1))
    assert 0 < torch.count_nonzero(tapered) < torch.count_nonzero(whole)


def test_cutting_instead_of_tapering_is_indefinite() -> None:
    """The taper is needed: the band of these factors alone is not positive semidefinite."""
    net = chain(depth=5)
    band = engine(net, batch(size=2)[0], 1)
    assert torch.linalg.eigvalsh(as_dense(band, tapered=False)).min() < -1e-3 * as_dense(band).diagonal().max()


class Positions(nn.Module):
    """Convolutions at two resolutions, a norm, a sequence, and a linear layer on the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.GroupNorm(1, 2)
        self.three = nn.Conv2d(2, 3, 2, stride=2)
        self.mix, self.head = nn.Linear(3, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.three(torch.tanh(self.norm(self.two(torch.tanh(self.one(x)))))))
        return self.head(torch.tanh(self.mix(h.flatten(2).mT)).flatten(1))


@pytest.mark.parametrize("bandwidth", [1, 2, "full"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_positive_semidefinite_with_positions(bandwidth: object, sharing: str) -> None:
    torch.manual_seed(0)
    net = Positions().double()
    band = engine(net, torch.randn(3, 1, 4, 4, dtype=torch.float64), bandwidth, sharing=sharing, iterations=300)
    tapered = as_dense(band)
    assert band.averages.excluded == []
    assert torch.linalg.eigvalsh(tapered).min() > -1e-12 * tapered.diagonal().sum()
    assert band.averages.factors is not None
    assert all(pairs.inputs.abs().sum() > 0 for pairs in band.averages.factors.pairs)
    gradients = [torch.ones_like(p) for p in band.parameters]
    direction = band.direction(gradients)
    assert torch.allclose(damped(band) @ direction.flat[0], band.inverse.flat(gradients), atol=1e-7)


def test_running_averages_and_windows_stay_positive_semidefinite() -> None:
    net = chain(depth=4)
    band = engine(net, batch(seed=0)[0], "full", decay=0.5, factor_every=1)
    assert band.averages.factors is not None
    gradients = [torch.ones_like(p) for p in band.parameters]
    first = as_dense(band)
    band.direction(gradients)
    gather(band, net(batch(seed=5)[0]))
    second = as_dense(band)
    whole = engine(net, batch(seed=5)[0], "full", decay=0.5).averages.factors
    assert whole is not None
    a, b = band.averages.factors.stacks[0], whole.stacks[0]
    assert not torch.equal(first, second)
    # The first update has weight one, the second one half.
    previous = engine(net, batch(seed=0)[0], "full").averages.factors.stacks[0]  # type: ignore[union-attr]
    assert torch.allclose(a.inputs, (previous.inputs + b.inputs) / 2, rtol=1e-12)
    # Cross factors that a batch does not show decay, as if they were zero.
    kept = [pairs.inputs.clone() for pairs in band.averages.factors.pairs]
    own, cross = whole.split(whole.tensors)
    moments = Moments([*own, *map(torch.zeros_like, cross)], [1.0] * len(whole.stacks), [], 6)
    band.averages.factors.average(moments, 0.5, torch.tensor(True))
    for pairs, before in zip(band.averages.factors.pairs, kept, strict=True):
        assert torch.allclose(pairs.inputs, before / 2, rtol=1e-12)
    third = as_dense(band)
    assert torch.linalg.eigvalsh(third).min() > -1e-12 * third.diagonal().sum()


def test_in_place_activations_and_frozen_parts() -> None:
    x = batch()[0]
    found = as_dense(engine(chain(in_place=True), x, 1))
    torch.manual_seed(0)

    class Relu(Dag):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:-1]:
                x = functional.relu(layer(x))
            return self.layers[-1](x)

    net = chain(in_place=True)
    net.__class__ = Relu
    assert torch.allclose(found, as_dense(engine(net, x, 1)), rtol=1e-12)


def test_distances_are_those_of_the_tape() -> None:
    net = skip()
    band = engine(net, batch()[0], 1)
    structure = band.gathering.structure
    assert structure is not None
    assert torch.equal(torch.from_numpy(structure.distances), net.distances().double())
    assert sorted(p for pairs in band.averages.factors.pairs for p in pairs.blocks) != []  # type: ignore[union-attr]


def test_empirical_fisher_from_the_ordinary_backward() -> None:
    net, (x, y, _) = chain(in_place=True), batch()
    band = kronecker_band(net, "full", curvature="empirical")
    functional.mse_loss(net(x), y).backward()
    direction = band.direction([p.grad for p in band.parameters])
    assert direction.decrement > 0
    assert band.averages.factors is not None
    last = net.layers[-1]
    residual = (net(x) - y).detach()
    j = 2 / residual.numel() * residual * len(x) ** 0.5
    number, start = band.averages.factors.place[[b.modules[0] for b in band.averages.factors.blocks].index(last)]
    assert torch.allclose(band.averages.factors.stacks[number].outputs[start], j.mT @ j, rtol=1e-10)
    tapered = as_dense(band)
    assert torch.linalg.eigvalsh(tapered).min() > -1e-12 * tapered.diagonal().sum()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_with_logits", "poisson_nll"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2)])
@pytest.mark.parametrize("kind", ["exact", "sketched", "sampled"])
def test_columns_have_the_output_curvature_as_second_moment(loss: str, shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    if loss == "cross_entropy":
        target = target.argmax(1)
    names = {
        "bce_with_logits": "binary_cross_entropy_with_logits", "mse": "mse_loss", "poisson_nll": "poisson_nll_loss",
    }  # fmt: skip
    name = names.get(loss, loss)
    hessian = torch.autograd.functional.hessian(lambda t: getattr(functional, name)(t, target), z)
    hessian = hessian.reshape(z.numel(), -1)
    columns = "exact" if kind == "exact" else 20000
    found = named_curvature(loss, "mean", z).columns(columns, kind == "sampled", generator)  # type: ignore[arg-type]
    moment = torch.einsum("kbi,kbj->bij", found.flatten(2), found.flatten(2))
    for b in range(shape[0]):
        width = z[0].numel()
        expected = hessian[b * width : (b + 1) * width, b * width : (b + 1) * width]
        tolerance = 1e-12 if kind == "exact" else 0.05 * float(expected.abs().max())
        assert torch.allclose(moment[b], expected, atol=tolerance)


def test_undeclared_loss() -> None:
    net, (x, _, labels) = chain(), batch()
    declared = engine(net, x, 1, loss="cross_entropy", reduction="mean")
    given_loss = kronecker_band(net, 1, curvature="ggn", columns="exact")
    z = net(x)
    given_loss.gather(functional.cross_entropy(z, labels), z)
    given_loss.commit()
    assert torch.allclose(as_dense(given_loss), as_dense(declared), rtol=1e-9, atol=1e-13)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    loss = functional.cross_entropy(z, torch.tensor([0, 2]), weight=torch.tensor([1.0, 2.0, 3.0]).double())
    columns = hessian_columns(loss, z, 20000, torch.Generator().manual_seed(0))
    exact = hessian_columns(loss, z, "exact", torch.Generator())
    moments = [torch.einsum("kbi,kbj->bij", c, c) for c in (columns, exact)]
    assert torch.allclose(*moments, atol=0.02)


@pytest.mark.parametrize("columns", ["exact", 2])
@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_dimension_of_the_classes(columns: Any, curvature: Any) -> None:
    """Classes last, as in language models, against the same network with the classes second."""
    if (columns, curvature) == ("exact", "fisher"):
        pytest.skip("exact columns are the GGN's")
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7)).double()

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(body)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(tokens).mT

    tokens = torch.randint(0, 7, (3, 6))
    twin = Second()
    options = {"curvature": curvature, "columns": columns, "loss": "cross_entropy"}
    last = kronecker_band(body, 1, class_dim=-1, **options)
    second = kronecker_band(twin, 1, **options)
    gather(last, body(tokens)), gather(second, twin(tokens))
    assert last.averages.factors is not None
    assert second.averages.factors is not None
    assert last.scale == pytest.approx(second.scale, rel=1e-12)
    for a, b in zip(last.averages.factors.tensors, second.averages.factors.tensors, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("place", [0, -3, 3])
def test_dimension_that_is_not_of_the_classes(place: int) -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    band = kronecker_band(net, 0, loss="cross_entropy", class_dim=place)
    with pytest.raises(ModelError, match=rf"class_dim={place} is no dimension of the classes"):
        gather(band, net(torch.zeros(2, 3, dtype=torch.long)))
    band.detach()


@pytest.mark.parametrize("columns", [1, 3])
def test_random_state_is_untouched_and_columns_reproducible(columns: int, device: torch.device) -> None:
    net = chain().to(device)
    x = batch()[0].to(device)
    torch.manual_seed(3)
    expected = torch.rand(3), torch.rand(3, device=device)
    torch.manual_seed(3)
    bands = [kronecker_band(net, 1, loss="cross_entropy", columns=columns, seed=s) for s in (0, 0, 1)]
    net(x).sum().backward()
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, device=device), expected[1])
    for band in bands:
        band.commit()
    found = [band.averages.factors.tensors[1] for band in bands if band.averages.factors is not None]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("bandwidth", [0, 1, "full"])
def test_memory_is_as_stated(bandwidth: object) -> None:
    torch.manual_seed(0)

    class Net(Positions):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.grouped = nn.Conv2d(2, 2, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(self.grouped(x)[:, :1])

    net = Net()
    band = engine(net, torch.randn(3, 2, 4, 4), bandwidth, max_size=9)
    assert band.averages.factors is not None
    held = [*band.averages.factors.tensors, *band.inverse.factored.tensors, *band.averages.diagonals.values()]
    assert band.memory() == sum(t.numel() * t.element_size() for t in held)
    assert all(t.dtype == torch.float32 for t in held)
    coupled = {name: "not coupled" not in text for name, text in band.report().items()}
    assert not coupled["grouped.weight"] or bandwidth == 0
    assert not coupled["one.weight"] or bandwidth == 0  # ten inputs, more than max_size
    assert coupled["mix.weight"]


def test_bfloat16_parameters_have_float32_factors() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
    band = kronecker_band(net, 1, loss="mse")
    net(torch.randn(5, 3).bfloat16()).square().mean().backward()
    direction = band.direction([p.grad for p in band.parameters])
    assert all(d.dtype == torch.float32 for d in direction.steps)
    assert direction.decrement > 0


def test_hooks_do_nothing_when_nothing_is_due() -> None:
    net, (x, y, _) = chain(), batch()
    band = kronecker_band(net, 0, loss="mse", factor_every=4)
    with torch.no_grad():
        net(x)
    assert band.averages.factors is None
    updates = []
    for _ in range(9):
        functional.mse_loss(net(x), y).backward()
        band.direction([p.grad for p in band.parameters])
        assert band.averages.factors is not None
        updates.append(band.averages.factors.updates)
    assert updates == [1, 2, 3, 3, 4, 4, 4, 4, 5]
    assert [step for step in range(20) if due(step, 8)] == [0, 1, 2, 4, 8, 16]
    band.detach()
    net(x)
    assert band.averages.factors.updates == 5


def test_triangular_inverse() -> None:
    torch.manual_seed(0)
    lower = (torch.randn(2, 150, 150, dtype=torch.float64) / 20).tril() + torch.eye(150)
    assert torch.allclose(
        triangular_inverse(lower) @ lower, torch.eye(150, dtype=torch.float64).expand(2, -1, -1), atol=1e-10
    )


def test_nonfinite_factors_keep_the_inverse() -> None:
    net = chain()
    band = engine(net, batch()[0], 1)
    assert band.averages.factors is not None
    band.inverse.refresh()
    before = [t.clone() for t in band.inverse.factored.tensors]
    for stack in band.averages.factors.stacks:
        stack.inputs.fill_(float("nan"))
    band.inverse.refresh()
    assert torch.equal(before[0], band.inverse.factored.tensors[0])


def test_conjugate_gradients_that_fail_give_the_block_diagonal_step() -> None:
    """With cross factors that belong to no positive definite matrix."""
    net = chain(depth=2)
    band = engine(net, batch()[0], 1)
    block = engine(net, batch()[0], 0)
    gradients = [torch.ones_like(p) for p in band.parameters]
    expected = block.direction(gradients)
    band.direction(gradients)
    for cross in band.inverse.factored.cross:
        cross.outputs.mul_(-1e3)
    band.steps = 3  # no refresh
    band.inverse.factored.iterations = 20
    found = band.direction(gradients)
    assert found.failed
    for a, b in zip(found.steps, expected.steps, strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bandwidth": -1}, "bandwidth must be"),
        ({"curvature": "hessian"}, "curvature must be one of"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"sharing": "both"}, "sharing must be one of"),
        ({"columns": 0}, "columns must be an integer"),
        ({"columns": "exact"}, 'is curvature="ggn"'),
        ({"damping": 0.0}, "damping must be a positive"),
        ({"decay": 1.0}, "decay must lie"),
        ({"factor_every": 0}, "factor_every must be"),
        ({"inverse_every": 1.5}, "inverse_every must be"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    net = chain()
    with pytest.raises(ValueError, match=message):
        kronecker_band(net, **options)  # type: ignore[arg-type]


def test_bad_use() -> None:
    net = chain()
    band = kronecker_band(net)
    with pytest.raises(ClosureError, match="declare the loss"):
        band.direction([None for _ in band.parameters])
    z = torch.randn(2, 300, requires_grad=True)
    with pytest.raises(ModelError, match="300 outputs"):
        hessian_columns(z.square().sum(), z, 1, torch.Generator())
    with pytest.raises(ModelError, match="nothing to train"):
        kronecker_band(net, parameters=[])

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), x

    pair = Pair()
    band = kronecker_band(pair, loss="mse")
    pair(torch.randn(3, 2))[0].sum().backward()
    with pytest.raises(ModelError, match="the network returns tuple"):
        band.direction([p.grad for p in band.parameters])
    band.detach()
    band = kronecker_band(pair, curvature="empirical")
    pair(torch.randn(3, 2))[0].sum().backward()
    assert band.direction([p.grad for p in band.parameters]).decrement > 0
