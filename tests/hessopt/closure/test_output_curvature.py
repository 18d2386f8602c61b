"""The loss's second derivative, sample by sample, and its root."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.errors import MemoryBudgetError
from hessopt.closure.hessian_rounding import formation_rounding
from hessopt.closure.output_curvature import (
    check_hessian_memory,
    curvature_roots,
    loss_roots,
    output_hessians,
    residual_roots,
)
from hessopt.errors import NotConvexError

CLASSES = torch.tensor([0, 2, 1, 1, 2])
LOSSES = {
    "mse": lambda z: functional.mse_loss(z, torch.ones_like(z)),
    "sum of squares": lambda z: z.square().sum(),
    "cross entropy": lambda z: functional.cross_entropy(z, CLASSES.to(z.device)),
    "label smoothing": lambda z: functional.cross_entropy(
        z, CLASSES.to(z.device), label_smoothing=0.1, reduction="sum"
    ),
    "bernoulli": lambda z: functional.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.3)),
    "poisson": lambda z: functional.poisson_nll_loss(z, torch.ones_like(z)),
    "huber": lambda z: functional.huber_loss(z, torch.zeros_like(z)),
    "softplus": lambda z: functional.softplus(z).mean(),
    "kl": lambda z: functional.kl_div(z.log_softmax(1), torch.full_like(z, 1 / 3), reduction="batchmean"),
    "absolute": lambda z: z.abs().mean(),
    "linear": lambda z: z.mean(),
}


def output(device: torch.device | str = "cpu") -> Tensor:
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z.to(device).requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
def test_against_the_dense_hessian(device: torch.device, name: str) -> None:
    z, loss_fn = output(device), LOSSES[name]
    found = output_hessians(loss_fn(z), z)
    joint = torch.func.jacrev(torch.func.grad(loss_fn))(z.detach())  # (B, K, B, K)
    assert torch.allclose(torch.stack([joint[b, :, b] for b in range(5)]), found, rtol=1e-12, atol=1e-15)
    roots = curvature_roots(found)
    assert torch.allclose(torch.einsum("kbi,kbj->bij", roots, roots), found, rtol=1e-12, atol=1e-15)
    rank = {"cross entropy": 2, "label smoothing": 2, "kl": 2, "absolute": 0, "linear": 0}.get(name, 3)
    assert roots.shape == (rank, 5, 3)


def test_outputs_of_any_shape() -> None:
    z = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.equal(output_hessians(z.square().sum(), z), 2 * torch.eye(6, dtype=torch.float64).expand(4, 6, 6))
    assert residual_roots(z).shape == (6, 4, 6)
    one = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(output_hessians(one.square().sum(), one), torch.full((4, 1, 1), 2.0, dtype=torch.float64))


def saturated(dtype: torch.dtype, factor: float) -> tuple[Tensor, Tensor]:
    """Logits of 64 samples and 10 classes, to be multiplied by the factor, and labels: most samples are certain."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 10, generator=generator, dtype=torch.float64)
    z[:32] += 4 * functional.one_hot(z[:32].argmax(1), 10)  # certain ones
    return z.to(dtype).requires_grad_(), torch.randint(10, (64,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 14.3, 1e2, 1e3, 1e4])
def test_softmax_with_a_temperature_is_convex(dtype: torch.dtype, factor: float) -> None:
    z, labels = saturated(dtype, factor)
    for smoothing in (0.0, 0.1):
        loss = functional.cross_entropy(z * factor, labels, label_smoothing=smoothing)
        roots = loss_roots(loss, z)
        assert roots.isfinite().all()
        expected = output_hessians(loss, z)
        error = (torch.einsum("kbi,kbj->bij", roots, roots) - expected).norm()
        # Of the size of what cancels: p (1 - p) s² / B, with a margin for the sums over classes.
        assert error <= 64 * torch.finfo(dtype).eps * (factor**2 / 64 + expected.norm())


def test_written_out_log_sum_exp_is_convex() -> None:
    z, labels = saturated(torch.float32, 100.0)
    own = (100 * z).gather(1, labels[:, None]).squeeze(1)
    assert loss_roots(((100 * z).logsumexp(1) - own).mean(), z).isfinite().all()


NOT_CONVEX = {
    "minus squares": lambda z: -z.square().mean(),
    "small minus squares": lambda z: -1e-6 * z.square().mean(),
    "cosine": lambda z: z.cos().sum(),
    "of probabilities": lambda z: (z.softmax(1) - functional.one_hot(z.argmin(1), z.shape[1])).square().mean(),
    "focal": lambda z: ((1 - z.softmax(1)).square() * -z.log_softmax(1))[:, 0].mean(),
    "convex plus a little concave": lambda z: functional.cross_entropy(z, z.argmin(1)) - 1e-3 * z.square().mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 20.0])
@pytest.mark.parametrize("name", NOT_CONVEX)
def test_non_convex_losses_are_refused_at_any_scale(name: str, factor: float, dtype: torch.dtype) -> None:
    z, _ = saturated(dtype, factor)
    loss = NOT_CONVEX[name](factor * z)
    joint = torch.func.jacrev(torch.func.grad(lambda row: NOT_CONVEX[name](factor * row.unsqueeze(0))))
    # The share of the most negative curvature in all of it, in double precision, is far from rounding.
    eigenvalues = torch.stack([torch.linalg.eigvalsh(joint(row)) for row in z.detach().double()])
    assert eigenvalues.min() < -1e-4 * eigenvalues.abs().max()
    with pytest.raises(NotConvexError, match="not convex in the network's output"):
        loss_roots(loss, z)


def test_one_sample_that_is_not_convex_among_saturated_ones() -> None:
    z, labels = saturated(torch.float32, 100.0)
    weight = torch.zeros(64)
    weight[40] = 1e-2
    loss = functional.cross_entropy(100 * z, labels) - (weight * z.square().sum(1)).sum()
    with pytest.raises(NotConvexError):
        loss_roots(loss, z)


def test_hessians_that_lapack_fails_at() -> None:
    """Entries of a saturated softmax over 100 classes span the range of float32."""
    generator = torch.Generator().manual_seed(0)
    z = (30 * torch.randn(128, 100, generator=generator)).requires_grad_()
    loss = functional.cross_entropy(z, torch.randint(100, (128,), generator=generator))
    hessians = output_hessians(loss, z)
    roots = loss_roots(loss, z)
    error = (torch.einsum("kbi,kbj->bij", roots, roots) - hessians).abs().max()
    assert error <= 8 * 100 * torch.finfo(torch.float32).eps * hessians.abs().max()  # what is left out as rounding


def test_rounding_estimate_bounds_the_error_of_the_formation() -> None:
    """Against the same second derivatives in float64, at the same logits; and it is not vacuous."""
    for factor in (1.0, 10.0, 100.0, 1e3):
        z, labels = saturated(torch.float32, factor)
        hessians = output_hessians(functional.cross_entropy(factor * z, labels), z)
        fine = z.detach().double().requires_grad_()
        # The product with the factor rounds before the softmax does: of the same logits.
        logits = (factor * z.detach()).double() + factor * (fine - fine.detach())
        exact = output_hessians(functional.cross_entropy(logits, labels), fine)
        error = (hessians.double() - exact).flatten(1).norm(dim=1)
        estimate = formation_rounding(functional.cross_entropy(factor * z, labels), z, hessians)
        assert (error <= 4 * estimate).all()
        assert estimate.max() <= 1e-3 * factor**2 / 64


def test_half_precision_outputs_are_treated_in_float32() -> None:
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    found = output_hessians(z.float().square().sum(), z)
    assert found.dtype == torch.float32
    assert residual_roots(z).dtype == torch.float32


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda z: -z.square().mean(),
        lambda z: z.cos().sum(),
        lambda z: functional.nll_loss(z.sigmoid().log2(), CLASSES) * -1,
    ],
)
def test_loss_that_is_not_convex(loss_fn: nn.Module) -> None:
    z = output()
    with pytest.raises(NotConvexError, match=r"not convex in the network's output.*\(loss, output\).*LeastSquares"):
        curvature_roots(output_hessians(loss_fn(z), z))


def test_memory_is_refused_with_the_size() -> None:
    check_hessian_memory(torch.empty(8, 10), 8 * 100 * 4 * 3)
    with pytest.raises(MemoryBudgetError, match=r"1000 samples with 1000 outputs each need 11.2 GiB.*memory_limit"):
        check_hessian_memory(torch.empty(1000, 1000), 2**30)
