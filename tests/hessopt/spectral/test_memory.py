"""What SpectralNewton holds is what docs/spectral.md says, counted in floating-point numbers of all tensors alive."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from hessopt import KroneckerAveraging, KroneckerCoordinates, SpectralNewton

SCALARS = 12
"""Single numbers, as counts of steps on the device."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    head = nn.Linear(300, 5)
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(72, 300), nn.LayerNorm(300), nn.Tanh(), head, nn.PReLU())


LAYERS = [(2, 4, 19), (1, 300, 73), (1, 5, 301)]
"""Groups, outputs, inputs with the bias."""
OTHERS = 2 * 300 + 1
INPUTS = [4 * 9, 72, 300]
"""Of each layer, for one sample."""
OUTPUTS = [8 * 9, 300, 5]


def powers(n: int) -> int:
    return n * n if n <= 256 else 128 * n + 1


def held(average: bool) -> int:
    matrices = sum(g * o * a for g, o, a in LAYERS)
    factors = sum(g * (o * o + a * a + powers(o) + powers(a)) for g, o, a in LAYERS)
    curvature = len(LAYERS) ** 2 + 3 * len(LAYERS) + sum(g for g, _, _ in LAYERS)
    return 2 * matrices + 2 * OTHERS + average * (matrices + OTHERS) + factors + curvature


def alive() -> dict[int, int]:
    """Numbers in each storage of floating-point numbers."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.is_floating_point() and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() // thing.element_size()
    return found


def step(net: nn.Module, optimizer: SpectralNewton, x: Tensor, y: Tensor, parts: int = 1) -> None:
    for u, v in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (nn.functional.cross_entropy(net(u), v) / parts).backward()
    optimizer.step()


def more(before: dict[int, int]) -> int:
    return sum(numbers for place, numbers in alive().items() if place not in before)


def test_between_steps_the_formula_is_what_is_held() -> None:
    for average in (True, False):
        net = network()
        x, y = torch.randn(6, 4, 3, 3), torch.randint(5, (6,))
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        before = alive()
        optimizer = SpectralNewton(net, "cross_entropy", average=8 if average else None)
        for _ in range(3):
            step(net, optimizer, x, y)
        assert 0 <= more(before) - held(average) <= SCALARS
        del optimizer
        assert more(before) == 0


def test_between_backward_and_step_a_batch_is_kept_where_an_update_is_due() -> None:
    """Inputs but the network's own, two columns of outputs, and the batch's factors, once more with accumulation."""
    averages = KroneckerAveraging(0.95, factor_every=2, columns=2)
    for parts in (1, 3):
        net = network()
        x, y = torch.randn(6, 4, 3, 3), torch.randint(5, (6,))
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        coordinates = KroneckerCoordinates(averages=averages)
        optimizer = SpectralNewton(net, "cross_entropy", coordinates=coordinates, accumulate=parts)
        for _ in range(17):  # from 16 on every other step
            step(net, optimizer, x, y, parts)
        for due in (False, True):
            before = alive()
            for u, v in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(net(u), v) / parts).backward()
            factors = sum(g * (o * o + a * a) for g, o, a in LAYERS) * (1 if parts == 1 else 2)
            batch = 6 * (sum(INPUTS[1:]) + 2 * sum(OUTPUTS))
            expected = factors + batch if due else 0
            assert 0 <= more(before) - expected <= (SCALARS if due else 0) * parts
            optimizer.step()
