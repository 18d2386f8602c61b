"""Spectral maps: every way to compute T(σ; α) against singular value decompositions and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessopt.spectral.transfer import Form, NewtonSchulz, spectral_map, transfer

SHAPES = [(5, 9), (9, 5), (6, 6), (3, 7, 4), (2, 3, 4, 8)]


def _matrices(shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def _reference(g: Tensor, alpha: Any, delta: float, form: Form) -> Tensor:
    """By the definition, with singular vectors."""
    u, sigma, vh = torch.linalg.svd(g, full_matrices=False)
    a = alpha.unsqueeze(-1) if isinstance(alpha, Tensor) else alpha
    values = sigma / sigma[..., :1] if form == "scale_free" else sigma
    t = values / (values**a + delta)
    step = (u * t.unsqueeze(-2)) @ vh
    if form == "published":
        return step
    m, n = g.shape[-2:]
    target = (min(m, n) * max(1, m / n)) ** 0.5
    return step * target / step.square().sum((-2, -1), keepdim=True).sqrt()


@pytest.mark.parametrize("form", ["scale_free", "published"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.7, 2.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_methods_are_the_definition(shape: tuple[int, ...], alpha: float, form: Form, device: torch.device) -> None:
    g = _matrices(shape, device)
    expected = _reference(g, alpha, 0.1, form)
    methods: list[Any] = ["auto", "svd", "eigh", *(["cholesky"] if alpha == 2 else [])]
    for method in methods:
        found = spectral_map(g, alpha, 0.1, form=form, method=method)
        assert (found - expected).norm() <= 1e-12 * expected.norm(), method


@pytest.mark.parametrize("form", ["scale_free", "published"])
@pytest.mark.parametrize("method", ["auto", "svd"])
def test_one_exponent_for_each_matrix(form: Form, method: Any) -> None:
    g, alpha = _matrices((3, 7, 4)), torch.tensor([0.5, 1.0, 2.2], dtype=torch.float64)
    together = spectral_map(g, alpha, 0.1, form=form, method=method)
    torch.testing.assert_close(together, _reference(g, alpha, 0.1, form), rtol=1e-11, atol=1e-13)


def test_closed_forms_of_the_published_map() -> None:
    g, d = _matrices((5, 9)), 0.3
    eye = torch.eye(5, dtype=g.dtype)
    torch.testing.assert_close(spectral_map(g, 0.0, d, form="published"), g / (1 + d))
    torch.testing.assert_close(
        spectral_map(g, 2.0, d, form="published"), torch.linalg.solve(g @ g.mT + d * eye, g), rtol=1e-12, atol=1e-13
    )
    values, vectors = torch.linalg.eigh(g @ g.mT)
    p = (vectors * values.sqrt()) @ vectors.mT
    torch.testing.assert_close(
        spectral_map(g, 1.0, d, form="published"), torch.linalg.solve(p + d * eye, g), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
def test_scale_free(alpha: float) -> None:
    g = _matrices((6, 4))
    step = spectral_map(g, alpha)
    for scale in (1e-150, 1e-8, 4.0, 1e150):  # squares of the first and last under- and overflow
        torch.testing.assert_close(spectral_map(scale * g, alpha), step, rtol=1e-10, atol=1e-12)
    assert step.norm() == pytest.approx((4 * 6 / 4) ** 0.5)
    if alpha:
        published = spectral_map(g, alpha, form="published")
        assert not torch.allclose(spectral_map(4 * g, alpha, form="published"), published, rtol=0.05)


def test_published_form_of_small_gradients_is_gradient_descent() -> None:
    g = 1e-4 * _matrices((5, 9))
    torch.testing.assert_close(spectral_map(g, 2.0, 0.1, form="published"), g / 0.1, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["scale_free", "published"])
@pytest.mark.parametrize("delta", [0.0, 0.2])
def test_newton_schulz_that_converges_is_the_polar_form(form: Form, delta: float) -> None:
    schulz = NewtonSchulz(20, (1.875, -1.25, 0.375))
    for shape in SHAPES[:4]:
        g = _matrices(shape)
        found = spectral_map(g, 1.0, delta, form=form, newton_schulz=schulz)
        torch.testing.assert_close(found, _reference(g, 1.0, delta, form), rtol=1e-10, atol=1e-10)


def test_muons_newton_schulz_is_torchs_bit_for_bit() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz as zeropower

    for shape in ((5, 9), (9, 5)):
        g = _matrices(shape).float()
        expected = zeropower(g, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
        schulz = NewtonSchulz(dtype=torch.bfloat16)
        assert torch.equal(spectral_map(g, 1.0, 0.0, form="published", newton_schulz=schulz), expected)
        exact = spectral_map(g.double(), 1.0, 0.0)
        cosine = (exact * expected).sum() / (exact.norm() * expected.norm())
        assert cosine > 0.97  # its iterations do not converge
        values = torch.linalg.svdvals(expected)
        assert 0.5 < values.min() < values.max() < 1.3


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("delta", [0.0, 0.1])
def test_zero_and_rank_one(alpha: float, delta: float) -> None:
    assert not spectral_map(torch.zeros(2, 3, 4), alpha, delta).any()
    a, b = _matrices((5, 1)), _matrices((1, 7))
    step = spectral_map(a @ b, alpha, delta)
    assert bool(step.isfinite().all())
    torch.testing.assert_close(step, 5**0.5 * (a / a.norm()) @ (b / b.norm()), rtol=1e-7, atol=1e-8)


def test_zero_among_others() -> None:
    g = _matrices((3, 4, 6))
    g[1] = 0
    for alpha in (0.5, 1.0, 2.0):
        step = spectral_map(g, alpha)
        assert not step[1].any()
        torch.testing.assert_close(step[2], spectral_map(g[2], alpha))


def test_small_damping_in_float32_takes_singular_values() -> None:
    """The Gram matrix loses σ̂ below √eps, here 1e-5 of the largest."""
    u, _ = torch.linalg.qr(_matrices((6, 6)))
    v, _ = torch.linalg.qr(_matrices((9, 6)) + 1)
    sigma = torch.logspace(0, -5, 6, dtype=torch.float64)
    g = (u * sigma) @ v.mT
    expected = _reference(g, 1.0, 1e-8, "scale_free")
    single = spectral_map(g.float(), 1.0, 1e-8)
    assert single.dtype == torch.float32
    assert (single - expected).norm() < 0.05 * expected.norm()
    lost = spectral_map(g.float(), 1.0, 1e-8, method="eigh")
    assert (lost - expected).norm() > 0.2 * expected.norm()
    damped = _reference(g, 1.0, 0.1, "scale_free")
    assert (spectral_map(g.float(), 1.0, 0.1) - damped).norm() < 1e-3 * damped.norm()


def test_transfer() -> None:
    sigma = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(transfer(sigma, 2.0, 0.5), sigma / (sigma**2 + 0.5))
    assert transfer(sigma, 1.0, 0.0).tolist() == [0, 1, 1]
    assert transfer(sigma, 2.0, 0.0).tolist() == [0, 2, 0.5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"alpha": torch.tensor([1.0, -1.0])}, "alpha must be at least 0"),
        ({"alpha": 1.0, "delta": -1.0}, "delta must be"),
        ({"alpha": 1.0, "form": "free"}, "form must be"),
        ({"alpha": 1.0, "method": "qr"}, "method must be"),
        ({"alpha": 1.0, "method": "cholesky"}, "is for alpha = 2"),
        ({"alpha": 2.0, "newton_schulz": NewtonSchulz()}, "polar factor, of alpha = 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spectral_map(_matrices((2, 3, 4)), **options)


def test_bad_iterations() -> None:
    with pytest.raises(ValueError, match="steps must be"):
        NewtonSchulz(0)
    with pytest.raises(ValueError, match="three numbers"):
        NewtonSchulz(5, (1.0, 2.0))  # type: ignore[arg-type]
