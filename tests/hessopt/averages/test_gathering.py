"""Which passes the Kronecker averages are of, what they take, and what is said where nothing was gathered."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from hessopt import KroneckerAveraging, KroneckerBandwidth, KroneckerNewton, NamedLoss
from hessopt.errors import ClosureError, ModelError
from tests.helpers.kronecker_reference import kronecker_arguments, kronecker_band

KINDS = ["name", "module", "empirical", "empirical, module"]


class UsersError(Exception):
    """Raised in a closure."""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(
        dtype
    )


def data(seed: int, size: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, :3] * x[:, 1:]).argmax(1)


def build(net: nn.Module, kind: str, **options: Any) -> tuple[KroneckerNewton, nn.Module]:
    criterion = nn.CrossEntropyLoss()
    loss: Any = criterion if "module" in kind else None if kind == "empirical" else "cross_entropy"
    options = {"bandwidth": 1, "factor_every": 2, "inverse_every": 4, "loss": loss, **options}
    options["curvature"] = "empirical" if "empirical" in kind else "fisher"
    return KroneckerNewton(net, **kronecker_arguments(**options)), criterion


def averages(optimizer: KroneckerNewton) -> list[Tensor]:
    found = optimizer.band.averages
    assert found.factors is not None
    return [*found.factors.tensors, *found.diagonals.values()]


def train(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module, seed: int) -> None:
    x, y = data(seed)
    optimizer.zero_grad()
    criterion(net(x), y).backward()
    optimizer.step()


def validation(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module) -> None:
    x, y = data(1000)
    criterion(net(x), y)


def noise(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module) -> None:
    criterion(net(100 * data(1001)[0]), data(1001)[1])


def part(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module) -> None:
    assert isinstance(net, nn.Sequential)
    net[:3](data(1002)[0])


def adversarial(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module) -> None:
    x, y = data(1003)
    torch.autograd.grad(criterion(net(x.requires_grad_()), y), x)


def abandoned(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module) -> None:
    x, y = data(1004)
    optimizer.zero_grad()
    criterion(net(x), y).backward()
    optimizer.zero_grad()


def measured(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module) -> None:
    x, y = data(1005)
    torch.autograd.grad(criterion(net(x), y), list(net.parameters()))


def without_gradients(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module) -> None:
    x, y = data(1006)
    with torch.no_grad():
        criterion(net(x), y)


def failed(optimizer: KroneckerNewton, criterion: nn.Module, net: nn.Module) -> None:
    def closure() -> Tensor:
        x, y = data(1007)
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        raise UsersError

    grads = [p.grad for p in net.parameters()]
    with pytest.raises(UsersError):
        optimizer.step(closure)
    for p, g in zip(net.parameters(), grads, strict=True):
        p.grad = g


OTHERS = [validation, noise, part, adversarial, abandoned, measured, without_gradients, failed]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", OTHERS, ids=lambda f: f.__name__)
def test_passes_that_no_step_follows_leave_no_trace(
    kind: str, other: Callable[[KroneckerNewton, nn.Module, nn.Module], None]
) -> None:
    net = network()
    twin = copy.deepcopy(net)
    optimizer, criterion = build(net, kind)
    plain, loss = build(twin, kind)
    for i in range(9):
        other(optimizer, criterion, net)
        train(optimizer, criterion, net, i)
        train(plain, loss, twin, i)
        other(optimizer, criterion, net)
    assert all(torch.equal(a, b) for a, b in zip(averages(optimizer), averages(plain), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["name", "module"])
def test_of_several_passes_in_one_backward_the_first_counts(kind: str) -> None:
    net = network()
    twin = copy.deepcopy(net)
    optimizer, criterion = build(net, kind)
    plain, loss = build(twin, kind)
    for i in range(5):
        (x, y), (u, v) = data(i), data(i + 50, size=11)
        optimizer.zero_grad()
        plain.zero_grad()
        (criterion(net(x), y) + 0.3 * criterion(net(u), v)).backward()
        loss(twin(x), y).backward()
        (0.3 * functional.cross_entropy(twin(u), v)).backward()
        optimizer.step()
        plain.step()
    for a, b in zip(averages(optimizer), averages(plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["name", "module", "empirical, module"])
def test_of_accumulated_micro_batches_the_first_counts(kind: str) -> None:
    net = network()
    twin = copy.deepcopy(net)
    optimizer, criterion = build(net, kind)
    plain, loss = build(twin, kind)
    for i in range(4):
        x, y = data(i)
        train(plain, loss, twin, i)
        with torch.no_grad():
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                p.copy_(q)  # the first micro-batch sees what the plain loop's next batch sees
        if i:
            continue
        net.load_state_dict(network().state_dict())
        optimizer.zero_grad()
        for seed in (0, 7, 8, 9):
            x, y = data(seed)
            (criterion(net(x), y) / 4).backward()
        optimizer.step()
        for a, b in zip(averages(optimizer), averages(plain), strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("kind", ["name", "module", "empirical, module", "auto"])
def test_accumulated_micro_batches_count_together_where_that_is_asked_for(kind: str) -> None:
    """Exact columns, or gradients of samples; with a choice of the bandwidth up to its first decision."""
    nets, criterion = [network(), network()], nn.CrossEntropyLoss()
    empirical = "empirical" in kind
    optimizers = [
        KroneckerNewton(
            net,
            bandwidth=KroneckerBandwidth(6) if kind == "auto" else 1,
            loss=criterion if "module" in kind else "cross_entropy",
            curvature="empirical" if empirical else "ggn",
            averages=KroneckerAveraging(factor_every=2, columns=None if empirical else "exact", accumulate=n),
        )
        for net, n in zip(nets, (1, 3), strict=True)
    ]
    for i in range(7 if kind == "auto" else 5):
        x, y = data(i, size=15)
        for net, optimizer, size in zip(nets, optimizers, (15, 5), strict=True):
            optimizer.zero_grad()
            for u, v in zip(x.split(size), y.split(size), strict=True):
                (criterion(net(u), v) * (size / 15)).backward()
            optimizer.step()
        if kind == "auto" and i == 6:  # a decision, from the columns of the last micro-batch or of all
            break
        for a, b in zip(*map(averages, optimizers), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


class Token:
    """Something to hold weakly."""


@pytest.mark.parametrize("kind", [*KINDS, "closure"])
def test_tapes_that_no_step_follows_are_freed(kind: str) -> None:
    net = network()
    if kind == "closure":
        optimizer, criterion = KroneckerNewton(net, bandwidth="auto"), nn.CrossEntropyLoss()
    else:
        optimizer, criterion = build(net, kind)
    x, y = data(0)
    tokens = []
    for call in (lambda: net(x), lambda: net[:4](x), lambda: criterion(net(x), y)):
        z = call()
        token = Token()
        tokens.append(weakref.ref(token))
        z.grad_fn.metadata["token"] = token
        del token, z
    gc.collect()
    assert [ref() for ref in tokens] == [None] * 3
    assert optimizer.band.gathering.active


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("at", [0, 4])
def test_one_bad_batch_costs_one_batch(kind: str, value: float, at: int) -> None:
    """Neither averages nor parameters take what is not finite, and they go on with the next batch."""
    net = network(torch.float32)
    optimizer, criterion = build(net, kind, weight_decay=0.1)
    for i in range(9):
        x, y = data(i, dtype=torch.float32)
        if i == at:
            x[3, 2] = value
        state = copy.deepcopy([[*averages(optimizer)], net.state_dict(), optimizer._kronecker.momentum]) if i else None
        before = copy.deepcopy(net.state_dict())
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()
        finite = all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
        if i == at and at:
            assert state is not None
            assert all(torch.equal(a, b) for a, b in zip(averages(optimizer), state[0], strict=True))
            if not finite:
                for a, b in zip(optimizer._kronecker.momentum.values(), state[2].values(), strict=True):
                    assert torch.equal(a, b)
        if i == at and (not finite or not at):
            assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
        if i != at:
            assert not torch.equal(before["0.weight"], net.state_dict()["0.weight"])
        assert all(p.isfinite().all() for p in net.parameters())
    assert all(t.isfinite().all() for t in averages(optimizer))
    assert "not finite" in optimizer.band.report()["left out"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["name", "module", "empirical, module"])
@pytest.mark.parametrize("sizes", [(0,), (4, 0), (0, 4)])
@pytest.mark.parametrize("at", [0, 2])
def test_an_empty_batch_is_refused_at_the_step_and_leaves_everything(
    kind: str, sizes: tuple[int, ...], at: int, reduction: str
) -> None:
    net, criterion = network(), nn.CrossEntropyLoss(reduction=reduction)
    optimizer = KroneckerNewton(
        net,
        loss=NamedLoss("cross_entropy", reduction) if kind == "name" else criterion,  # type: ignore[arg-type]
        curvature="empirical" if "empirical" in kind else "fisher",
        averages=KroneckerAveraging(factor_every=2, accumulate=len(sizes)),
    )
    for i in range(at):
        train(optimizer, criterion, net, i)
    before, parameters = state_of(optimizer, net), copy.deepcopy(list(net.parameters()))
    optimizer.zero_grad()
    for size in sizes:
        x, y = data(7, size)
        criterion(net(x), y).backward()
    with pytest.raises(ClosureError, match="the batch is empty"):
        optimizer.step()
    if at:  # before the first step, a state has zeros in the shapes that are known
        assert alike(before, state_of(optimizer, net))
    assert all(map(torch.equal, parameters, net.parameters()))
    train(optimizer, criterion, net, 8)
    assert not alike(before, state_of(optimizer, net))


def test_nothing_is_left_out_of_sound_batches() -> None:
    net = network()
    optimizer, criterion = build(net, "name")
    for i in range(5):
        train(optimizer, criterion, net, i)
    assert "left out" not in optimizer.band.report()


@pytest.mark.parametrize("kind", ["name", "module", "empirical, module"])
def test_overflow_in_half_precision_is_the_scalers(kind: str) -> None:
    net = network(torch.float32)
    optimizer, criterion = build(net, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for i in range(7):
        x, y = data(i, dtype=torch.float32)
        before = copy.deepcopy(net.state_dict())
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            z = net(x * (1e6 if i in (0, 4) else 1))
        scaler.scale(criterion(z.float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(before["0.weight"], net.state_dict()["0.weight"])
        assert moved == (i not in (0, 4))
    assert scaler.get_scale() == 64
    assert all(t.isfinite().all() for t in averages(optimizer))


def state_of(optimizer: KroneckerNewton, net: nn.Module) -> list[Any]:
    return copy.deepcopy(tree_leaves([optimizer.state_dict(), net.state_dict()]))


def alike(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(s, t) if isinstance(s, Tensor) else s == t for s, t in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("kind", [*KINDS, "closure"])
def test_a_closure_whose_gradient_is_not_finite_leaves_everything(kind: str) -> None:
    """An infinite feature into tanh: the loss is finite."""
    net = network()
    optimizer, criterion = build(net, "name" if kind == "closure" else kind)
    if kind == "closure":
        optimizer = KroneckerNewton(net, bandwidth="auto", averages=KroneckerAveraging(factor_every=2))
    for i in range(4):
        x, y = data(i)
        optimizer.step(lambda x=x, y=y: criterion(net(x), y))
    x, y = data(9)
    x[3, 2] = float("inf")
    before = state_of(optimizer, net)
    with pytest.raises(ClosureError, match=r"the gradient.* is not finite"):
        optimizer.step(lambda: criterion(net(x), y))
    assert alike(before, state_of(optimizer, net))
    x, y = data(10)
    optimizer.step(lambda: criterion(net(x), y))
    assert not alike(before, state_of(optimizer, net))


class Labelled(nn.Module):
    """Returns the loss beside the logits, as networks of Hugging Face do."""

    def __init__(self, body: nn.Module, form: type) -> None:
        super().__init__()
        self.body, self.form = body, form

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.body(x)
        loss = functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if self.form is dict else (loss, logits)


@pytest.mark.parametrize("way", ["scaled", "divided", "tuple", "dict", "scaled tuple"])
def test_empirical_curvature_does_not_depend_on_factors_of_the_loss(way: str) -> None:
    """Against the second moments of the gradients of the samples, one at a time."""
    body = network()
    x, y = data(0)
    net = Labelled(body, dict if way == "dict" else tuple) if way[-4:] in ("uple", "dict") else body
    optimizer, criterion = build(net, "empirical" if net is not body else "empirical, module", bandwidth=0)
    scale = 2.0**16 if "scaled" in way else 0.25 if way == "divided" else 1.0
    if isinstance(net, Labelled):
        result = net(x, y)
        loss = result["loss"] if isinstance(result, dict) else result[0]
    else:
        loss = criterion(net(x), y)
    (scale * loss).backward()
    for p in net.parameters():
        p.grad = p.grad / scale  # type: ignore[operator]
    optimizer.band.commit([p.grad for p in optimizer.band.parameters])
    factors = optimizer.band.averages.factors
    assert factors is not None
    for block, (number, start) in zip(factors.blocks, factors.place, strict=True):
        if block.kind != "linear":
            continue
        layer = block.modules[0]
        (j,) = torch.autograd.grad(
            functional.cross_entropy(body[body_index(body, layer) :](seen := inputs_of(body, layer, x)), y),
            [layer.bias],
        )
        rows = []
        for b in range(len(x)):
            sample = functional.cross_entropy(body[body_index(body, layer) :](seen[b : b + 1]), y[b : b + 1])
            rows.append(torch.autograd.grad(sample, [layer.bias])[0])
        g = torch.stack(rows)
        assert torch.allclose(g.mean(0), j, rtol=1e-10)
        found = factors.stacks[number].outputs[start]
        assert torch.allclose(found, g.mT @ g / len(x), rtol=1e-9, atol=1e-14)


def body_index(body: nn.Sequential, layer: nn.Module) -> int:
    return list(body).index(layer)


def inputs_of(body: nn.Sequential, layer: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = body[: body_index(body, layer)](x).detach()
    return found


def test_empirical_curvature_is_refused_where_the_factor_is_not_seen() -> None:
    net = network(torch.float32)
    optimizer, _ = build(net, "empirical")
    x, y = data(0, dtype=torch.float32)
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        (functional.cross_entropy(net(x), y) / 2).backward()
    with pytest.raises(ClosureError, match=r"several backward passes were accumulated.*declare the module"):
        optimizer.step()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(functional.cross_entropy(net(x), y)).backward()
    with pytest.raises(ClosureError, match=r"under a GradScaler.*declare the module"):
        scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    optimizer.zero_grad()
    functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    assert not torch.equal(before["0.weight"], net.state_dict()["0.weight"])


class Own(nn.Module):
    """A linear layer of no known class."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a) / a**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_known_layers_trains_with_a_diagonal(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Own(4, 6), nn.Tanh(), Own(6, 3)).double()
    optimizer, criterion = build(net, kind, bandwidth=0)
    x, y = data(0, size=64)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert set(optimizer.band.report().values()) == {"diagonal: no rule for Own"}


class Inside(nn.Module):
    """Computes its loss itself, by a criterion of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = self.body(x)
        return nn.CrossEntropyLoss()(z, labels), z


def not_called(net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    functional.cross_entropy(x[:, :3].requires_grad_(), y).backward()


def no_gradients(net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        criterion(net(x), y)


def functional_form(net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    functional.cross_entropy(net(x), y).backward()


def detached(net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    criterion(net(x).detach(), y)


def parts(net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    functional.cross_entropy(net[3:](net[:3](x)), y).backward()  # type: ignore[index]


def no_backward(net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    criterion(net(x), y)


def in_place(net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    criterion(net(x).sub_(1), y).backward()


def inside(net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    net(x, y)[0].backward()


@pytest.mark.parametrize(
    ("kind", "net", "act", "error", "message"),
    [
        ("name", network, not_called, ClosureError, "the network was not called"),
        ("name", network, no_gradients, ClosureError, "called with gradients disabled only"),
        ("module", network, no_gradients, ClosureError, "called with gradients disabled only"),
        ("empirical", network, no_gradients, ClosureError, "called with gradients disabled only"),
        ("module", network, functional_form, ClosureError, "CrossEntropyLoss was not called.*not its functional form"),
        ("module", Inside, inside, ClosureError, "CrossEntropyLoss was not called.*`labels=`"),
        ("name", Inside, inside, ModelError, "the network returns tuple"),
        ("module", network, detached, ClosureError, "on nothing that depends on the network's parameters"),
        ("name", network, parts, ClosureError, "layers of the network were called, but not the network itself"),
        ("name", network, no_backward, ClosureError, r"no backward\(\) went from the loss"),
        ("module", network, no_backward, ClosureError, r"no backward\(\) went from the loss"),
        ("empirical", network, no_backward, ClosureError, r"no backward\(\) went from the loss"),
        ("name", network, in_place, ModelError, "changed in place"),
    ],
)
def test_every_cause_has_its_own_message(
    kind: str, net: Callable[[], nn.Module], act: Callable[..., None], error: type[Exception], message: str
) -> None:
    model = net()
    optimizer, criterion = build(model, kind)
    x, y = data(0)
    act(model, criterion, x, y)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    if isinstance(model, nn.Sequential):  # what follows is as if nothing had been
        train(optimizer, criterion, model, 0)


@pytest.mark.parametrize("kind", ["name", "module"])
@pytest.mark.parametrize("columns", [1, 3])
def test_gathering_in_another_thread_twice_and_with_double_backward(kind: str, columns: int) -> None:
    """The tape is left as it was found, whatever thread runs over it."""
    found = []
    for way in ("plain", "thread", "twice", "create_graph"):
        net = network()
        optimizer, criterion = build(net, kind, columns=columns)
        x, y = data(0)
        loss = criterion(net(x), y)
        if way == "thread":
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        elif way == "twice":
            loss.backward(retain_graph=True)
            loss.backward()
        elif way == "create_graph":
            slopes = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
            sum(g.square().sum() for g in slopes).backward()  # type: ignore[union-attr]
        else:
            loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.band.commit()
        found.append(averages(optimizer))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", ["name", "module"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_have_the_averages_of_their_rounding(kind: str, dtype: torch.dtype) -> None:
    found = []
    for precision in (torch.float64, dtype):
        net = network(precision)
        band = kronecker_band(
            net, 1, curvature="ggn", columns="exact",
            loss=nn.CrossEntropyLoss() if kind == "module" else "cross_entropy",
        )  # fmt: skip
        criterion = band.seeds.loss if isinstance(band.seeds.loss, nn.Module) else nn.CrossEntropyLoss()
        x, y = data(0, dtype=precision)
        criterion(net(x), y).backward()
        band.commit()
        assert band.averages.factors is not None
        found.append([t.double() for t in band.averages.factors.tensors])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=30 * torch.finfo(dtype).eps * float(a.abs().max()))
