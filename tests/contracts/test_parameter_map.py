"""What every map of parameters does, against the dense derivatives of its layer in float64, to 1e-12 of their norm.

The layer f reads ``q = tanh(x)``. Its derivatives are taken sample by sample by ``torch.func``, without any of the
structure that maps know: D = ∂f/∂θ, and of the scalar ``δᵀf`` the curvatures K[θ, q] and K[θ, θ].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import diagnostics
from diagnostics.parametric.dense_map import DenseMap
from diagnostics.parametric.maps import ParameterMap
from diagnostics.parametric.patch_map import PatchMap
from diagnostics.parametric.recognise import parameter_map
from tests.contracts.coverage import uncovered

SAMPLES = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-12 * expected.norm())


@dataclass
class Made:
    """A map, and what it stands for.

    Attributes:
        map: Of the node ``"1"``.
        jacobian: D by parameter, ``(S, d, p)``.
        bends: K[θ, q] by parameter, ``(S, p, d_q)``.
        curvature: K[θ, θ] of pairs of parameters, summed over samples.
    """

    map: ParameterMap
    jacobian: dict[str, Tensor]
    bends: dict[str, Tensor]
    curvature: dict[tuple[str, str], Tensor]


class ParameterMapContract(ABC):
    """Properties of a map; a subclass says of which layer."""

    kind: ClassVar[type[ParameterMap]]
    shape: ClassVar[tuple[int, ...]] = (3,)

    @abstractmethod
    def layer(self) -> nn.Module:
        """What the map is of."""

    @pytest.fixture
    def made(self) -> Made:
        torch.manual_seed(0)
        layer = self.layer().double()
        with torch.no_grad():
            for i, p in enumerate(layer.parameters()):
                p.copy_(normal(*p.shape, seed=i))
        model = nn.Sequential(nn.Tanh(), layer, nn.Tanh())
        x = normal(SAMPLES, *self.shape, seed=5).requires_grad_()
        graph = diagnostics.capture(model, x, lambda z: z.square().sum(), ["0", "1"], reduction="sum")
        node = graph["1"]
        signal = normal(SAMPLES, graph.size(node), seed=6)
        found = parameter_map(graph, node, signal)
        assert type(found) is self.kind
        values = {name: p.detach() for name, p in layer.named_parameters()}
        trained = {name: v for name, v in values.items() if layer.get_parameter(name).requires_grad}

        def f(parameters: dict[str, Tensor], q: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(layer, {**values, **parameters}, (q.unsqueeze(0),))
            return out.reshape(-1)

        def of_samples(derivative: Callable[[int, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
            each = [derivative(s, torch.tanh(x[s].detach())) for s in range(SAMPLES)]
            return {f"1.{name}": torch.stack([sample[name] for sample in each]) for name in trained}

        def slope(s: int, q: Tensor) -> dict[str, Tensor]:
            return torch.func.grad(lambda p: f(p, q) @ signal[s])(trained)

        jacobian = of_samples(lambda s, q: {n: d.flatten(1) for n, d in torch.func.jacrev(f)(trained, q).items()})
        bends = of_samples(
            lambda s, q: {
                n: d.reshape(trained[n].numel(), q.numel())
                for n, d in torch.func.jacrev(lambda q: slope(s, q))(q).items()
            }
        )
        curvature: dict[tuple[str, str], Tensor] = {}
        for s in range(SAMPLES):
            q = torch.tanh(x[s].detach())
            second = torch.func.hessian(lambda p, q=q, s=s: f(p, q) @ signal[s])(trained)
            for v, row in second.items():
                for w, block in row.items():
                    key = f"1.{v}", f"1.{w}"
                    part = block.reshape(trained[v].numel(), trained[w].numel())
                    curvature[key] = curvature.get(key, torch.zeros_like(part)) + part
        return Made(found, jacobian, bends, curvature)

    def test_its_size_is_that_of_its_trained_parameters(self, made: Made) -> None:
        assert made.map.size == sum(d.shape[2] for d in made.jacobian.values())

    def test_parts_by_parameter_are_those_of_the_whole(self, made: Made) -> None:
        """Every entry is in one part; parts are flat, in either dimension."""
        for dim in (0, 1):
            numbers = torch.arange(made.map.size).unsqueeze(1 - dim).repeat_interleave(2, 1 - dim)
            parts = dict(made.map.split(numbers, dim))
            assert {name: part.shape[dim] for name, part in parts.items()} == {
                name: d.shape[2] for name, d in made.jacobian.items()
            }
            joined = torch.cat(list(parts.values()), dim).select(1 - dim, 0)
            assert torch.equal(joined.sort().values, torch.arange(made.map.size))

    def test_push_is_the_product_with_the_transposed_jacobian(self, made: Made) -> None:
        block = normal(SAMPLES, next(iter(made.jacobian.values())).shape[1], 2, seed=7)
        parts = dict(made.map.split(made.map.push(block), 1))
        assert all(close(parts[name], d.mT @ block) for name, d in made.jacobian.items())

    def test_contract_is_the_sum_of_products_with_the_jacobian(self, made: Made) -> None:
        left = normal(SAMPLES, 2, next(iter(made.jacobian.values())).shape[1], seed=8)
        parts = dict(made.map.split(made.map.contract(left), 1))
        assert all(close(parts[name], (left @ d).sum(0)) for name, d in made.jacobian.items())

    def test_bend_is_the_curvature_between_parameters_and_inputs(self, made: Made) -> None:
        move = normal(SAMPLES, torch.Size(self.shape).numel(), 2, seed=9)
        found = made.map.bend(lambda q: move if q == "0" else None)
        expected = {name: k @ move for name, k in made.bends.items()}
        if found is None:
            assert not any(bool(k.any()) for k in expected.values())
            return
        parts = dict(made.map.split(found, 1))
        scale = torch.cat(list(expected.values()), 1).norm()
        assert all((parts[name] - k).norm() <= 1e-12 * scale for name, k in expected.items())

    def test_where_nothing_moves_nothing_bends(self, made: Made) -> None:
        assert made.map.bend(lambda q: None) is None

    def test_the_curvature_of_the_parameters_alone(self, made: Made) -> None:
        own = made.map.own_curvature()
        scale = torch.stack([block.norm() for block in made.curvature.values()]).norm()
        for v, rows in made.map.split(torch.zeros(made.map.size, made.map.size) if own is None else own, 0):
            for w, block in made.map.split(rows, 1):
                assert (block - made.curvature[v, w]).norm() <= 1e-12 * scale

    def test_some_samples_have_the_map_of_those_samples(self, made: Made) -> None:
        some = slice(1, 3)
        part = made.map.samples(some)
        width = next(iter(made.jacobian.values())).shape[1]
        block, move = normal(SAMPLES, width, 2), normal(SAMPLES, torch.Size(self.shape).numel(), 2, seed=1)
        assert part.size == made.map.size
        assert close(part.push(block[some]), made.map.push(block)[some])
        rest = made.map.samples(slice(0, 1)).contract(block[:1].mT)
        assert close(part.contract(block[some].mT) + rest, made.map.contract(block.mT))
        whole = made.map.bend(lambda q: move)
        bent = part.bend(lambda q: move[some])
        assert (whole is None) == (bent is None)
        if whole is not None and bent is not None:
            assert close(bent, whole[some])


class TestPatchMapOfALinearLayer(ParameterMapContract):
    kind = PatchMap

    def layer(self) -> nn.Module:
        return nn.Linear(3, 2)


class TestPatchMapOfTokens(ParameterMapContract):
    """A linear layer at two positions, without a bias."""

    kind = PatchMap
    shape = (2, 3)

    def layer(self) -> nn.Module:
        return nn.Linear(3, 2, bias=False)


class TestPatchMapOfABias(ParameterMapContract):
    """The weight is not trained."""

    kind = PatchMap

    def layer(self) -> nn.Module:
        layer = nn.Linear(3, 2)
        layer.weight.requires_grad_(False)
        return layer


class TestPatchMapOfAConvolution(ParameterMapContract):
    kind = PatchMap
    shape = (2, 4, 3)

    def layer(self) -> nn.Module:
        return nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=1)


class Bilinear(nn.Module):
    """``(A q) ∘ (b ∘ q)``: quadratic in its parameters together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3))

    def forward(self, q: Tensor) -> Tensor:
        return (q @ self.a.mT) * (self.b * q)


class TestDenseMap(ParameterMapContract):
    kind = DenseMap

    def layer(self) -> nn.Module:
        return Bilinear()


class TestDenseMapOfANormalization(ParameterMapContract):
    """Linear in its parameters, which a dense map finds by itself."""

    kind = DenseMap
    shape = (4,)

    def layer(self) -> nn.Module:
        return nn.LayerNorm(4)


def test_every_implementation_is_covered() -> None:
    assert uncovered(ParameterMap, ParameterMapContract) == set()
