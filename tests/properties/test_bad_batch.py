"""One bad batch costs one batch: parameters and state stay, and the message says why."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessopt import (
    BandedNewton,
    KroneckerNewton,
    NewtonCG,
    NullBoost,
    NullProject,
    OnlineExponent,
    PowerLaw,
    SaddleEscape,
    SpectralNewton,
)
from hessopt.errors import ClosureError, HessoptError, ModelError
from tests.properties.test_interrupts import everything, projection, same, sgd


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "exact": lambda net: BandedNewton(net, momentum=0.5),
    "hessian": lambda net: BandedNewton(net, curvature="hessian"),
    "newton-cg": NewtonCG,
    "spectral": SpectralNewton,
    "spectral, online": lambda net: SpectralNewton(
        net, coordinates=PowerLaw("online", online=OnlineExponent(every=1, directions=3))
    ),
    "escape": lambda net: SaddleEscape(sgd(net), model=net),
    "escape, LBFGS": lambda net: SaddleEscape(torch.optim.LBFGS(net.parameters(), max_iter=3), model=net),
    "boost": lambda net: NullBoost(sgd(net), model=net, krylov=4),
    "boost, every step": lambda net: NullBoost(sgd(net), model=net, krylov=4, every=1),
    "project": lambda net: NullProject(sgd(net), model=net),
    "project off a memory": lambda net: projection(net.double()),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("how", ["NaN loss", "infinite loss", "NaN gradient"])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_bad_batch_changes_nothing(kind: str, how: str, backward: bool) -> None:
    net, (x, y) = network(), batch()
    optimizer = MAKERS[kind](net)
    x = x.to(next(net.parameters()).dtype)

    def step(inputs: Tensor, factor: float = 1.0) -> None:
        def closure() -> Tensor:
            if backward:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), y) * factor
            if backward:
                loss.backward()
            return loss

        optimizer.step(closure)

    step(x)
    step(x)
    before = everything(net, optimizer)
    bad = x.clone()
    message = "the closure's loss is (nan|inf) at the current parameters, which were left as they are"
    if how == "NaN gradient":  # tanh(inf) is finite, and 0 times inf is not
        bad[3, 2] = float("inf")
        message = "gradient.* not finite at the current parameters, which were left as they are"
    with pytest.raises(ClosureError, match=message):
        step(bad, {"NaN loss": float("nan"), "infinite loss": float("inf")}.get(how, 1.0))
    assert same(everything(net, optimizer), before)
    step(x)
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert not same(everything(net, optimizer), before)


def test_the_parameter_is_named() -> None:
    net, (x, y) = network(), batch()
    x[3, 2] = float("inf")
    with pytest.raises(ClosureError, match=r"gradient of parameter '0.weight', of shape \(8, 6\), is not finite"):
        SpectralNewton(net, coordinates=PowerLaw()).step(lambda: nn.functional.cross_entropy(net(x), y))
    optimizer = NullProject(torch.optim.SGD(net.parameters()))
    with pytest.raises(ClosureError, match=r"gradient of parameter 0, of shape \(8, 6\), is not finite"):
        optimizer.step(lambda: nn.functional.cross_entropy(net(x), y))


def test_spectral_newton_without_closure() -> None:
    net, (x, y) = network(), batch()
    optimizer = SpectralNewton(net, coordinates=PowerLaw())
    for inputs in (x, x):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), y).backward()
        optimizer.step()
    before = everything(net, optimizer)
    net[2].bias.grad[1] = float("nan")
    with pytest.raises(ClosureError, match=r"'2.bias', of shape \(3,\), is not finite"):
        optimizer.step()
    assert same(everything(net, optimizer), before)


def test_large_gradients_are_finite() -> None:
    """Their squares are not, in float32."""
    w = nn.Parameter(torch.ones(3))
    optimizer = NullProject(torch.optim.SGD([w], lr=1e-25))
    optimizer.step(lambda: (w * 1e25).sum())
    assert torch.allclose(w.detach(), torch.full((3,), 0.0), atol=1e-6)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_line_search_of_the_wrapped_optimizer_that_does_not_end(error: type[BaseException]) -> None:
    """LBFGS runs the closure at other parameters, and changes lists in its state."""
    net, (x, y) = network(), batch()
    optimizer = SaddleEscape(torch.optim.LBFGS(net.parameters(), max_iter=4), model=net)
    runs, fail_at = 0, 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        if runs == fail_at:
            raise error
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = everything(net, optimizer)
    state = optimizer.state[next(net.parameters())]
    directions = [d.clone() for d in state["old_dirs"]]
    fail_at = runs + 3
    with pytest.raises(error):
        optimizer.step(closure)
    assert same(everything(net, optimizer), before)
    now = optimizer.state[next(net.parameters())]["old_dirs"]
    assert same(now, directions)


@pytest.mark.parametrize("kind", [*(name for name in MAKERS if name != "project off a memory"), "kronecker"])
def test_parameters_without_values_are_refused(kind: str) -> None:
    makers = {**MAKERS, "kronecker": lambda net: KroneckerNewton(net, bandwidth="auto")}
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ModelError, match=r"shape \(8, 6\) is on the meta device.*to_empty"):
        makers[kind](net)


@pytest.mark.parametrize("loss", [nn.functional.mse_loss, lambda z, y: (z - y).square().sum()])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_an_empty_batch_changes_nothing_or_is_named(kind: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    net, (x, _) = network(), batch()
    optimizer = MAKERS[kind](net)
    x = x.to(next(net.parameters()).dtype)
    target = x[:, :3]
    optimizer.step(lambda: loss(net(x), target))
    before = everything(net, optimizer)
    message = ""
    try:
        optimizer.step(lambda: loss(net(x[:0]), target[:0]))
    except HessoptError as error:
        message = str(error)
    assert not message or ("empty" in message and same(everything(net, optimizer), before))
    assert all(bool(p.isfinite().all()) for p in net.parameters())
