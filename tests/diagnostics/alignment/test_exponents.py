"""Curvature exponents against dense Hessians, per-sample gradients and explicit Kronecker factors."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.alignment.exponents import LayerCurvature, curvature_exponents, top_directions
from diagnostics.alignment.kronecker import kronecker_factors
from diagnostics.autograd.patches import input_rows
from diagnostics.errors import DiagnosticsError
from diagnostics.training.exponent_recorder import ExponentRecorder


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 4))


def _convolutions(norm: bool = False) -> nn.Sequential:
    middle = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), *middle, nn.Tanh(), nn.Conv2d(4, 3, 2, bias=False), nn.GELU(),
        nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(6, 5), nn.MultiheadAttention(5, 1), nn.Linear(5, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mixed: Tensor = self.head(torch.tanh(x + self.mix(x, x, x, need_weights=False)[0]))
        return mixed


def _token_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def _case(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor], Callable[[Any, Any], Tensor]]:
    torch.manual_seed(0)
    y = torch.randint(0, 4, (9,))
    if name == "tokens":
        return _Tokens().double(), (torch.randint(0, 6, (9, 3)), torch.randint(0, 6, (9, 3))), _token_loss
    if name == "mlp":
        return _mlp().double(), (torch.randn(9, 5).double(), y), F.cross_entropy
    return _convolutions(name == "batch norm").double(), (torch.randn(9, 2, 6, 6).double(), y), F.cross_entropy


CASES = ["mlp", "convolutions", "batch norm", "tokens"]


def _dense(model: nn.Module, batch: tuple[Tensor, Tensor], loss_fn: Any, name: str) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian ``(n, n)`` in one parameter, by double back-propagation, entry by entry."""
    weight = model.get_parameter(name).detach()

    def loss(flat: Tensor) -> Tensor:
        value: Tensor = loss_fn(torch.func.functional_call(model, {name: flat.view_as(weight)}, (batch[0],)), batch[1])
        return value

    flat = weight.flatten()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        return gradient, torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("case", CASES)
def test_curvature_is_the_dense_hessians(case: str) -> None:
    model, batch, loss_fn = _case(case)
    table = curvature_exponents(model, batch, loss_fn, kronecker=None)
    assert len(table) >= 3
    for layer in table.layers:
        gradient, hessian = _dense(copy.deepcopy(model), batch, loss_fn, layer.name)
        shape = model.get_parameter(layer.name).shape
        u, sigma, vh = torch.linalg.svd(gradient.view(shape[0], -1), full_matrices=False)
        count = len(layer.sigma)
        assert count == int((sigma > 1e-12 * sigma[0]).sum())
        torch.testing.assert_close(layer.sigma, sigma[:count], rtol=1e-10, atol=1e-14)
        assert layer.shape == (shape[0], shape[1:].numel())
        for i in range(count):
            d = torch.outer(u[:, i], vh[i]).flatten()
            expected = d @ hessian @ d
            assert abs(layer.h[i] - expected) <= 1e-10 * hessian.norm()
        assert layer.dropped == int((layer.h <= 0).sum())
        assert layer.alpha.points == count - layer.dropped


def test_several_batches_are_averaged() -> None:
    model, (x, y), loss_fn = _case("mlp")
    whole = curvature_exponents(model, (x, y), loss_fn, control=False)
    parts = curvature_exponents(model, [(x[:2], y[:2]), (x[2:], y[2:])], loss_fn, control=False)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(a.h, b.h, rtol=1e-10, atol=1e-14)
        assert a.kronecker is not None
        assert b.kronecker is not None
        torch.testing.assert_close(a.kronecker.approximation, b.kronecker.approximation, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", ["mlp", "convolutions", "tokens"])
def test_control_flips_the_signs_of_samples(case: str) -> None:
    model, (x, y), loss_fn = _case(case)
    op = LayerCurvature(model, (x, y), loss_fn)
    flipped = op.unflatten(op.sign_flipped_gradient(torch.Generator().manual_seed(3)))
    signs = torch.randint(0, 2, (len(x),), generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert signs.abs().sum() != signs.sum().abs()  # both signs occur
    if case == "tokens":
        z = model(x)  # attention is over the first dimension here, so that samples meet
        z.retain_grad()
        loss_fn(z, y).backward(inputs=[z])
        z.backward(signs.view(-1, 1, 1) * z.grad, inputs=list(model.parameters()))
        expected = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
    else:
        loss = sum(s * loss_fn(model(x[i : i + 1]), y[i : i + 1]) for i, s in enumerate(signs)) / len(x)
        found = torch.autograd.grad(loss, list(model.parameters()))
        expected = dict(zip(dict(model.named_parameters()), found, strict=True))
    for name, value in flipped.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-14)


def test_control_is_measured_with_the_gradients_hessian() -> None:
    model, batch, loss_fn = _case("mlp")
    table = curvature_exponents(model, batch, loss_fn, generator=torch.Generator().manual_seed(3))
    op = LayerCurvature(model, batch, loss_fn)
    flipped = op.unflatten(op.sign_flipped_gradient(torch.Generator().manual_seed(3)))  # not after the factors' signs
    assert any(
        layer.control is not None and not torch.allclose(layer.control.sigma[:3], layer.sigma[:3])
        for layer in table.layers
    )
    plain = curvature_exponents(model, batch, loss_fn, kronecker=None, generator=torch.Generator().manual_seed(3))
    for layer in plain.layers:
        assert layer.control is not None
        u, sigma, v = top_directions(flipped[layer.name], 20)
        torch.testing.assert_close(layer.control.sigma, sigma)
        _, hessian = _dense(copy.deepcopy(model), batch, loss_fn, layer.name)
        d = torch.einsum("mk,nk->kmn", u, v).flatten(1)
        torch.testing.assert_close(layer.control.h, torch.einsum("ki,ij,kj->k", d, hessian, d), rtol=1e-8, atol=1e-12)


def test_kronecker_is_exact_for_a_linear_least_squares_layer() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 5, bias=False).double(), torch.randn(40, 6).double(), torch.randn(40, 5).double()
    weight = torch.linspace(1, 3, 5).double()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (weight * (z - y).square()).sum(1).mean()

    (layer,) = curvature_exponents(model, (x, y), loss).layers
    found = layer.kronecker
    assert found is not None
    torch.testing.assert_close(found.approximation, layer.h, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.phi * found.lam, layer.h, rtol=1e-10, atol=0)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.ratio == pytest.approx(1, abs=1e-10)
    total = found.eigenvalue_slope.exponent + found.alignment_slope.exponent
    assert total == pytest.approx(layer.alpha.exponent, abs=1e-9)
    top = torch.linalg.eigvalsh(x.mT @ x / 40).flip(0)[:5] * 2 * weight.flip(0)
    torch.testing.assert_close(found.lam, top, rtol=1e-10, atol=0)
    u, *_ = top_directions(torch.autograd.grad(loss(model(x), y), [model.weight])[0], 20)
    rho = torch.einsum("ik,i,ik->k", u, 2 * weight, u) / (2 * weight.flip(0))
    torch.testing.assert_close(found.rho_delta, rho, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.rho_a, found.phi / rho, rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", ["mlp", "convolutions"])
def test_factors_are_those_of_the_definition(case: str) -> None:
    model, (x, y), loss_fn = _case(case)
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    exact = kronecker_factors(model, (x, y), loss_fn, names)
    empirical = kronecker_factors(model, (x, y), loss_fn, names, "empirical")
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        seen: list[tuple[Tensor, Tensor]] = []
        handle = module.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0].detach(), out)))
        z = model(x)
        handle.remove()
        a, e = seen[0]
        p = z.softmax(1).detach()
        positions = e.shape[2:].numel()
        gauss_newton, squares = 0.0, 0.0
        for i in range(len(x)):
            rows = torch.stack([torch.autograd.grad(z[i, c], e, retain_graph=True)[0][i] for c in range(4)])
            jacobian = rows.reshape(4, e.shape[1], positions)
            curvature = p[i].diag() - torch.outer(p[i], p[i])
            gauss_newton = gauss_newton + torch.einsum("cmt,cd,dnt->mn", jacobian, curvature, jacobian) / len(x)
            delta = torch.einsum("cmt,c->mt", jacobian, p[i] - F.one_hot(y[i], 4))
            squares = squares + delta @ delta.mT / len(x)
        patches = a
        if isinstance(module, nn.Conv2d):
            unfolded = F.unfold(a, module.kernel_size, padding=module.padding, stride=module.stride)  # type: ignore[arg-type]
            patches = unfolded.mT.flatten(0, 1)
        torch.testing.assert_close(exact[name].delta, gauss_newton, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(empirical[name].delta, squares, rtol=1e-9, atol=1e-13)
        for found in (exact, empirical):
            torch.testing.assert_close(found[name].inputs, patches.mT @ patches / len(patches), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 2, "same"])
def test_patches(dilation: int, padding: Any) -> None:
    stride = 1 if padding == "same" else 2
    kernel = (3, 3 if padding == "same" else 2)
    conv = nn.Conv2d(3, 4, kernel, stride=stride, padding=padding, dilation=dilation, bias=False).double()
    x = torch.randn(2, 3, 9, 8).double()
    out = input_rows(conv, x) @ conv.weight.flatten(1).mT
    torch.testing.assert_close(out, conv(x).movedim(1, -1).flatten(0, -2), rtol=1e-12, atol=1e-12)


def test_wrapping_padding_and_one_dimension() -> None:
    conv = nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular", bias=False).double()
    x = torch.randn(2, 3, 9).double()
    out = input_rows(conv, x) @ conv.weight.flatten(1).mT
    torch.testing.assert_close(out, conv(x).movedim(1, -1).flatten(0, -2), rtol=1e-12, atol=1e-12)


def test_factors_of_tokens_are_unbiased() -> None:
    """Positions meet in attention, so that single draws of signs differ, about the mean of the definition."""
    model, (x, y), loss_fn = _case("tokens")
    draws = [
        kronecker_factors(model, (x, y), loss_fn, ["head.weight"], generator=torch.Generator().manual_seed(i))
        for i in range(2)
    ]
    p = model(x).softmax(-1).flatten(0, 1).detach()
    expected = (p.mean(0).diag() - p.mT @ p / len(p)) / 1  # the mean loss over tokens
    for draw in draws:  # the head comes after all mixing: exact
        torch.testing.assert_close(draw["head.weight"].delta, expected, rtol=1e-9, atol=1e-13)


def test_losses_that_have_no_gauss_newton_factor() -> None:
    model, (x, y), _ = _case("mlp")
    with pytest.raises(DiagnosticsError, match="ties different output vectors"):
        curvature_exponents(model, (x, y), lambda z, y: (z @ z.mT).square().mean())
    with pytest.raises(DiagnosticsError, match="not convex"):
        curvature_exponents(model, (x, y), lambda z, y: -z.square().mean())
    table = curvature_exponents(model, (x, y), lambda z, y: (z @ z.mT).square().mean(), kronecker="empirical")
    assert all(layer.kronecker is not None for layer in table.layers)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(training: bool) -> None:
    model, batch, loss_fn = _case("batch norm")
    model.train(training)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = curvature_exponents(model, batch, loss_fn)
    again = curvature_exponents(model, batch, loss_fn)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert all(module.training == training for module in model.modules())
    assert str(first) == str(again)
    assert not any(module._forward_hooks for module in model.modules())


def test_devices_and_dtypes(device: torch.device) -> None:
    model, (x, y), loss_fn = _case("convolutions")
    exact = curvature_exponents(model, (x, y), loss_fn)
    single = curvature_exponents(model.float().to(device), (x.float(), y), loss_fn)
    for a, b in zip(exact.layers, single.layers, strict=True):
        assert b.h.dtype == torch.float32
        assert b.h.device.type == device.type
        torch.testing.assert_close(b.h[:2].cpu().double(), a.h[:2], rtol=1e-3, atol=1e-4 * float(a.h.abs().max()))


def test_selection_and_types() -> None:
    model, batch, loss_fn = _case("convolutions")

    def names(layers: Any, **options: Any) -> list[str]:
        table = curvature_exponents(model, batch, loss_fn, layers=layers, control=False, kronecker=None, **options)
        return [layer.name for layer in table.layers]

    assert names(None) == ["0.weight", "2.weight", "5.weight"]
    assert names(["5", "0.weight"]) == ["0.weight", "5.weight"]
    assert names("[02]*") == ["0.weight", "2.weight"]
    assert names(lambda name, p: p.ndim == 4) == ["0.weight", "2.weight"]
    table = curvature_exponents(model, batch, loss_fn, types={"2": "middle"}, kronecker=None)
    assert [layer.type for layer in table.layers] == ["conv", "middle", "linear"]
    model, batch, loss_fn = _case("mlp")
    table = curvature_exponents(model, batch, loss_fn, types=lambda name: "middle" if name[0] == "0" else "rest")
    assert [layer.type for layer in table.layers] == ["middle", "rest", "rest"]
    by_type = table.by_type()
    assert by_type["middle"].mean == table["0"].alpha.exponent
    assert table["0"].control is not None
    assert by_type["middle"].control == table["0"].control.alpha.exponent
    assert math.isnan(by_type["middle"].deviation)
    rest = [table[name].alpha.exponent for name in ("2", "4")]
    assert by_type["rest"].mean == pytest.approx(sum(rest) / 2)
    assert by_type["rest"].deviation == pytest.approx(abs(rest[0] - rest[1]) / 2**0.5)
    assert [layer.type for layer in curvature_exponents(model, batch, loss_fn).layers] == ["linear", "linear", "head"]
    tokens, batch, loss_fn = _case("tokens")
    assert "embed.weight" not in [layer.name for layer in curvature_exponents(tokens, batch, loss_fn).layers]
    assert curvature_exponents(tokens, batch, loss_fn, layers=["embed"], kronecker=None).layers[0].type == "other"


def test_results_are_shown_and_exported() -> None:
    model, batch, loss_fn = _case("mlp")
    table = curvature_exponents(model, batch, loss_fn)
    text = str(table)
    assert "sign-flipped control" in text
    assert "bound" in text
    exported = json.loads(json.dumps(table.to_dict()))
    assert exported["0.weight"]["alpha"]["exponent"] == table["0"].alpha.exponent
    assert exported["0.weight"]["control"]["identity"]["bound"] >= 0
    frame = table.to_pandas()
    assert list(frame["layer"]) == ["0.weight", "2.weight", "4.weight"]
    assert frame["control_alpha"][0] == exported["0.weight"]["control"]["alpha"]["exponent"]
    axes = table.plot(layers=["0", "2"])
    lines = axes.get_lines()
    assert len(lines) == 4
    assert "α" in lines[0].get_label()
    with pytest.raises(KeyError, match=r"0\.weight"):
        table["1"]


def test_recorder_measures_over_training() -> None:
    model, (x, y), loss_fn = _case("mlp")
    recorder = ExponentRecorder(model, (x, y), loss_fn, every=2, kronecker=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    other = copy.deepcopy(model)
    for step in range(4):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        if step == 2:
            other.load_state_dict(model.state_dict())
        recorder.step()
    assert recorder.steps == [0, 2]
    expected = curvature_exponents(other, (x, y), loss_fn, kronecker=None)
    assert recorder.alpha("2")[1] == expected["2"].alpha.exponent
    assert recorder.alpha("2")[0] != recorder.alpha("2")[1]
    assert recorder.by_type()["head"].tolist() == recorder.alpha("4").tolist()
    with pytest.raises(ValueError, match="every"):
        ExponentRecorder(model, (x, y), loss_fn, every=0)
    with pytest.raises(TypeError, match="recorder's own"):
        ExponentRecorder(model, (x, y), loss_fn, generator=torch.Generator())


def test_bad_input() -> None:
    model, (x, y), loss_fn = _case("mlp")
    for options, error, says in (
        ({"k": 2}, ValueError, "k must be"),
        ({"kronecker": "kfac"}, ValueError, "kronecker must be"),
        ({"layers": ["nowhere"]}, DiagnosticsError, r"'nowhere'; there are '0\.weight'"),
        ({"layers": []}, DiagnosticsError, "chose none"),
        ({"layers": [3]}, TypeError, "entry of type int"),
    ):
        with pytest.raises(error, match=says):
            curvature_exponents(model, (x, y), loss_fn, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Module"):
        curvature_exponents(lambda x: x, (x, y), loss_fn)  # type: ignore[arg-type]
    with pytest.raises(DiagnosticsError, match="two or more dimensions"):
        curvature_exponents(nn.BatchNorm1d(5).double(), (x, y), loss_fn)
    pooled = nn.Sequential(_mlp().double(), nn.Flatten(0))
    with pytest.raises(DiagnosticsError, match="control=False"):
        curvature_exponents(pooled, (x, y), lambda z, y: z.square().mean(), kronecker=None)
    curvature_exponents(pooled, (x, y), lambda z, y: z.square().mean(), kronecker=None, control=False)


def test_diagnostics_does_not_import_hessopt() -> None:
    code = (
        "import sys, diagnostics.training.exponent_recorder; "
        "assert 'hessopt' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exported() -> None:
    assert diagnostics.curvature_exponents is curvature_exponents
