"""Symmetric eigenproblems: those that LAPACK fails at in float32 are solved, and what is not finite is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.symmetric_eigen import eigh, eigvalsh


def _saturated_softmax(seed: int, classes: int = 50, logits: float = 100.0) -> Tensor:
    """diag(p) − ppᵀ in float32, with entries down to denormal ones."""
    z = torch.randn(classes, generator=torch.Generator().manual_seed(seed)) * logits
    p = z.softmax(0)
    return p.diag() - p.outer(p)


def _check(matrix: Tensor, values: Tensor, vectors: Tensor) -> None:
    exact = scipy.linalg.eigh(matrix.double().numpy(), eigvals_only=True, driver="ev")
    norm = abs(exact).max()
    assert abs(values.double().numpy() - exact).max() <= 1e-5 * norm
    rebuilt = (vectors * values) @ vectors.mT
    assert (rebuilt - matrix).abs().max().item() <= 1e-5 * norm
    assert (vectors.mT @ vectors - torch.eye(len(matrix))).abs().max() < 1e-5


def test_float32_matrices_with_denormal_entries_are_decomposed() -> None:
    matrices = torch.stack([_saturated_softmax(seed) for seed in range(30)])  # LAPACK gives up or returns NaN on some
    values, vectors = eigh(matrices)
    for matrix, of_batch, vectors_of_batch in zip(matrices, values, vectors, strict=True):
        _check(matrix, of_batch, vectors_of_batch)
        _check(matrix, *eigh(matrix))
        assert (eigvalsh(matrix) - of_batch).abs().max() <= 1e-5 * of_batch.abs().max()


@pytest.mark.parametrize("failing", ["float32", "float64"])
def test_where_divide_and_conquer_fails_the_next_method_answers(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    matrix = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    matrix = 1e30 * (matrix + matrix.mT)  # its squares overflow
    original = torch.linalg.eigh

    def fails(m: Tensor) -> tuple[Tensor, ...]:
        if failing == "float64" or m.dtype == torch.float32:
            raise torch.linalg.LinAlgError("does not converge")  # type: ignore[attr-defined]
        return tuple(original(m))

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    for one, of_one, vectors_of_one in zip(matrix, values, vectors, strict=True):
        _check(one, of_one, vectors_of_one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    matrix = torch.eye(4)
    matrix[2, 1] = matrix[1, 2] = bad
    with pytest.raises(DiagnosticsError, match="not finite"):
        eigh(matrix)
    with pytest.raises(DiagnosticsError, match="not finite"):
        eigvalsh(matrix)


def test_zero_and_empty_matrices_have_their_eigenvalues() -> None:
    assert not eigvalsh(torch.zeros(2, 3, 3)).any()
    values, vectors = eigh(torch.zeros(0, 0))
    assert values.shape == (0,)
    assert vectors.shape == (0, 0)


def test_no_module_of_either_package_goes_around_it() -> None:
    root = Path(__file__).parents[3]
    sources = [path for package in ("diagnostics", "hessopt") for path in (root / package).rglob("*.py")]
    around = [str(p) for p in sources if re.search(r"(linalg|torch)\.(eigh|eigvalsh)\(", p.read_text(encoding="utf-8"))]
    assert [Path(p).name for p in around] == ["symmetric_eigen.py"]
