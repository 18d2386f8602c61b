"""The loss's second derivative, sample by sample, and its root."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.errors import MemoryBudgetError
from hessopt.errors import NotConvexError
from hessopt.output_curvature import (
    check_hessian_memory,
    curvature_roots,
    output_hessians,
    residual_roots,
)

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


def test_certain_predictions_in_float32_are_not_called_concave() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 5.0, 10.0, 15.0, 20.0, 40.0):
        logits = torch.randn(64, 10, generator=generator) * 0.1
        labels = torch.randint(10, (64,), generator=generator)
        z = (logits + scale * functional.one_hot(labels, 10)).requires_grad_()
        roots = curvature_roots(output_hessians(functional.cross_entropy(z, labels), z))
        assert roots.isfinite().all()


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
