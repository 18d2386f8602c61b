"""Conjugate gradients in a trust region, beside dense linear algebra."""

import math

import pytest
import torch
from torch import Tensor

from hessopt.newton_cg.truncated_cg import Exit, Path, truncated_cg


def problem(eigenvalues: list[float], seed: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A symmetric matrix of that spectrum, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = q * torch.tensor(eigenvalues, dtype=torch.float64) @ q.mT
    g = torch.randn(n, generator=generator, dtype=torch.float64)
    return ((matrix + matrix.mT) / 2).to(device), g.to(device)


def spd(n: int, seed: int) -> Tensor:
    matrix, _ = problem([0.5 + i for i in range(n)], seed)
    return matrix


def model(matrix: Tensor, g: Tensor, d: Tensor) -> float:
    return float(g @ d + d @ matrix @ d / 2)


def path_of(matrix: Tensor, g: Tensor, **options: object) -> Path:
    return truncated_cg(lambda v: matrix @ v, g, **options)  # type: ignore[arg-type]


def test_interior_solution(device: torch.device) -> None:
    matrix, g = problem([0.1, 1, 3, 3, 50, 80], device=device)
    path = path_of(matrix, g, radius=1e6, tolerance=1e-12)
    cut = path.cut(1e6)
    newton = -torch.linalg.solve(matrix, g)
    assert path.exit is cut.exit is Exit.CONVERGED
    assert torch.allclose(cut.step, newton, rtol=1e-9)
    assert cut.reduction == pytest.approx(-model(matrix, g, newton), rel=1e-12)
    assert cut.curvature == pytest.approx(float(newton @ matrix @ newton), rel=1e-9)
    assert cut.slope == pytest.approx(float(g @ newton), rel=1e-9)
    assert cut.norm == pytest.approx(float(newton.norm()), rel=1e-9)
    few = path_of(matrix, g, radius=1e6, tolerance=1e-9)  # above what rounding leaves after five
    assert few.exit is Exit.CONVERGED
    assert few.products <= 5  # five distinct eigenvalues
    assert path.ritz == pytest.approx((0.1, 80), rel=1e-8)
    assert float(path.residual.norm()) <= 1e-12 * float(g.norm())


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_tolerance_is_the_relative_residual(tolerance: float) -> None:
    matrix, g = problem([10.0 ** (i / 4) for i in range(20)])
    path = path_of(matrix, g, tolerance=tolerance)
    step = path.cut(math.inf).step
    assert torch.allclose(path.residual, g + matrix @ step, atol=1e-12)
    assert float(path.residual.norm()) <= tolerance * float(g.norm())
    shorter = truncated_cg(lambda v: matrix @ v, g, tolerance=0, max_products=path.products - 1)
    assert shorter.exit is Exit.MAX_PRODUCTS
    assert float(shorter.residual.norm()) > tolerance * float(g.norm())


@pytest.mark.parametrize("eigenvalues", [[1, 2, 5, 9], [-3, 1, 2, 5], [-3, -2, -1, -0.5]])
def test_boundary(eigenvalues: list[float]) -> None:
    """As good as the best multiple of the gradient; for small radii, the solution of the trust region itself."""
    matrix, g = problem(eigenvalues)
    for radius in (1e-6, 1e-2, 0.2):
        path = path_of(matrix, g, radius=radius, tolerance=1e-12)
        cut = path.cut(radius)
        assert cut.exit in (Exit.BOUNDARY, Exit.NEGATIVE_CURVATURE)
        assert float(cut.step.norm()) == pytest.approx(radius, rel=1e-12)
        assert cut.norm == pytest.approx(radius, rel=1e-12)
        assert cut.reduction == pytest.approx(-model(matrix, g, cut.step), rel=1e-10)
        assert torch.allclose(path.residual, g + matrix @ cut.step, rtol=1e-12)
        ts = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None] * radius
        cauchy = min(model(matrix, g, -t * g / g.norm()) for t in ts)
        assert cut.reduction >= -cauchy * (1 - 1e-12)
        exact = exact_solution(matrix, g, radius)
        assert cut.reduction <= -model(matrix, g, exact) * (1 + 1e-10)
        assert cut.reduction >= 0.5 * -model(matrix, g, exact) or min(eigenvalues) < 0  # Yuan 2000
    limit = path_of(matrix, g, radius=1e-9, tolerance=1e-12).cut(1e-9).step
    assert torch.allclose(limit, exact_solution(matrix, g, 1e-9), atol=1e-16)


def exact_solution(matrix: Tensor, g: Tensor, radius: float) -> Tensor:
    """By bisection on the multiplier (Moré and Sorensen, without the hard case)."""
    values, vectors = torch.linalg.eigh(matrix)
    coefficients = vectors.mT @ g
    low = max(0.0, -float(values[0]))
    high = low + float(g.norm()) / radius
    if low == 0 and float((coefficients / values).norm()) <= radius:
        return -vectors @ (coefficients / values)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((coefficients / (values + middle)).norm()) > radius else (low, middle)
    return -vectors @ (coefficients / (values + high))


def test_negative_curvature_goes_to_the_better_end() -> None:
    matrix, g = problem([-5, 1, 2, 3])
    radius = 2.0
    path = path_of(matrix, g, radius=radius, tolerance=1e-12)
    cut = path.cut(radius)
    assert path.exit is cut.exit is Exit.NEGATIVE_CURVATURE
    last = path.segments[-1]
    assert last.curvature < 0
    assert last.curvature == pytest.approx(float(last.direction @ matrix @ last.direction), rel=1e-10)
    vertex = sum(s.length * s.direction for s in path.segments[:-1])
    ends = [vertex + t * last.direction for t in last.crossings(radius)]
    assert [float(end.norm()) for end in ends] == pytest.approx([radius, radius], rel=1e-12)
    assert -cut.reduction == pytest.approx(min(model(matrix, g, end) for end in ends), rel=1e-12)
    assert path.ritz is not None
    assert -5 <= path.ritz[0] < 0


@pytest.mark.parametrize("eigenvalues", [[1, 2, 5, 9, 20], [-3, 1, 2, 5, 9], [-1, -2, 1, 7, 9]])
def test_cut_equals_a_new_run_with_the_smaller_radius(eigenvalues: list[float]) -> None:
    matrix, g = problem(eigenvalues, seed=3)
    path = path_of(matrix, g, radius=10.0, tolerance=1e-12)
    for radius in (9.0, 2.0, 0.5, 0.1, 1e-3):
        again = path_of(matrix, g, radius=radius, tolerance=1e-12)
        new, cut = again.cut(radius), path.cut(radius)
        assert torch.allclose(cut.step, new.step, rtol=1e-12)
        assert (cut.exit, cut.norm) == (new.exit, pytest.approx(new.norm, rel=1e-12))
        assert cut.reduction == pytest.approx(new.reduction, rel=1e-12)


@pytest.mark.parametrize("radius", [0.05, 1.0, 100.0])
def test_preconditioning_is_a_change_of_variables(radius: float) -> None:
    matrix, g = problem([-1, 0.2, 1, 4, 30])
    m = spd(5, seed=7)
    root = torch.linalg.cholesky(m)  # M = LLᵀ; with u = Lᵀd the norm of M is that of u
    inverse = torch.linalg.inv(root)
    plain = path_of(inverse @ matrix @ inverse.mT, inverse @ g, radius=radius, tolerance=1e-10)
    path = path_of(
        matrix, g, radius=radius, tolerance=1e-10, solve=lambda v: torch.cholesky_solve(v[:, None], root)[:, 0]
    )
    cut, expected = path.cut(radius), plain.cut(radius)
    assert torch.allclose(root.mT @ cut.step, expected.step, rtol=1e-8, atol=1e-10)
    assert cut.norm == pytest.approx(float(torch.sqrt(cut.step @ m @ cut.step)), rel=1e-10)
    assert (cut.exit, path.products) == (expected.exit, plain.products)
    assert path.ritz == pytest.approx(plain.ritz, rel=1e-8)


def test_exact_preconditioner_takes_one_product() -> None:
    matrix, g = problem([0.1, 1, 10, 100])
    path = path_of(matrix, g, tolerance=1e-10, solve=lambda v: torch.linalg.solve(matrix, v))
    assert path.products == 1
    assert torch.allclose(path.cut(math.inf).step, -torch.linalg.solve(matrix, g), rtol=1e-10)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_start(preconditioned: bool) -> None:
    matrix, g = problem([0.5, 1, 2, 7, 30])
    solution = -torch.linalg.solve(matrix, g)
    m = spd(5, seed=7) if preconditioned else torch.eye(5, dtype=torch.float64)
    options = {"solve": lambda v: torch.linalg.solve(m, v), "metric": lambda v: m @ v}
    path = path_of(matrix, g, tolerance=1e-8, start=3 * solution, **options)
    assert path.products == 1  # the best multiple
    assert torch.allclose(path.cut(math.inf).step, solution, rtol=1e-8)
    path = path_of(matrix, g, radius=1e3, tolerance=1e-10, start=solution + g, **options)
    cut = path.cut(1e3)
    assert torch.allclose(cut.step, solution, rtol=1e-6)
    assert cut.norm == pytest.approx(float(torch.sqrt(solution @ m @ solution)), rel=1e-6)
    assert cut.reduction == pytest.approx(-model(matrix, g, cut.step), rel=1e-10)
    uphill = path_of(matrix, g, tolerance=1e-8, start=g, **options)  # the multiple is negative
    assert uphill.segments[0].length < 0
    assert torch.allclose(uphill.cut(math.inf).step, solution, rtol=1e-6)
    small = path_of(matrix, g, radius=1e-3, start=solution, **options).cut(1e-3)
    assert float(torch.sqrt(small.step @ m @ small.step)) == pytest.approx(1e-3, rel=1e-10)


def test_start_of_negative_curvature_is_not_used() -> None:
    matrix, g = problem([-2, -1, -0.5])
    path = path_of(matrix, g, radius=1.0, start=torch.ones(3, dtype=torch.float64))
    assert path.segments[0].direction.equal(-g)


def test_codes() -> None:
    matrix, g = problem([1, 2, 3])
    assert path_of(matrix, 0 * g).exit is Exit.STATIONARY
    assert not path_of(matrix, 0 * g).cut(1.0).step.any()
    assert path_of(matrix, g, max_products=1, tolerance=1e-12).exit is Exit.MAX_PRODUCTS
    assert path_of(matrix * math.nan, g).exit is Exit.NOT_FINITE
    assert path_of(matrix, g * math.inf).exit is Exit.NOT_FINITE
    calls = []

    def breaks(v: Tensor) -> Tensor:
        calls.append(v)
        return matrix @ v * (math.nan if len(calls) == 2 else 1.0)

    path = truncated_cg(breaks, g, tolerance=1e-12)
    assert path.exit is Exit.NOT_FINITE
    assert torch.allclose(path.cut(math.inf).step, -g * float(g @ g) / float(g @ matrix @ g))  # what it had


def test_without_radius_negative_curvature_counts_by_its_absolute_value() -> None:
    matrix = torch.diag(torch.tensor([-2.0, -2.0], dtype=torch.float64))
    g = torch.tensor([1.0, 3.0], dtype=torch.float64)
    path = path_of(matrix, g)
    assert path.exit is Exit.NEGATIVE_CURVATURE
    assert torch.allclose(path.cut(math.inf).step, -g / 2, rtol=1e-12)


def test_singular_curvature() -> None:
    matrix, g = problem([0, 0, 1, 2])
    g = matrix @ g
    step = path_of(matrix, g, radius=1e8, tolerance=1e-10).cut(1e8).step
    assert torch.allclose(matrix @ step, -g, atol=1e-9)
    zero = path_of(0 * matrix, g, radius=2.0)
    assert torch.allclose(zero.cut(2.0).step, -2 * g / g.norm())
    assert zero.exit is Exit.NEGATIVE_CURVATURE
