"""Ends of the spectrum and negative curvature of the diagonal blocks of groups of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.estimators.lanczos import extreme_eigenpairs
from diagnostics.estimators.spectral_density import spectral_density
from diagnostics.operators.curvature import CurvatureOperator
from diagnostics.operators.parameter_groups import GroupBlock, GroupSelection, ParameterGroups
from diagnostics.results.estimate import Estimate
from diagnostics.results.text_table import format_table


@dataclass(frozen=True, eq=False, repr=False)
class GroupSpectra:
    """Ends of the spectrum and negative curvature of the diagonal block of each group; made by :func:`group_spectra`.

    Attributes:
        groups: Names.
        sizes: Entries of each.
        smallest: λ_min, ``(n,)``.
        largest: λ_max, ``(n,)``.
        smallest_error: Residual of λ_min's Ritz vector: an eigenvalue lies within it.
        largest_error: Of λ_max.
        negative_mass: m⁻, the sum of the absolute values of negative eigenvalues, ``(n,)``, with standard errors.
        products: Matrix-vector products used.
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    smallest: Tensor
    largest: Tensor
    smallest_error: Tensor
    largest_error: Tensor
    negative_mass: Estimate
    products: int

    def __str__(self) -> str:
        mass = self.negative_mass
        columns = [
            (self.smallest, self.smallest_error), (self.largest, self.largest_error), (mass.value, mass.standard_error)
        ]  # fmt: skip
        rows = [
            [name, str(size), *(f"{value[i].item():.4g} ± {error[i].item():.1g}" for value, error in columns)]
            for i, (name, size) in enumerate(zip(self.groups, self.sizes, strict=True))
        ]
        return format_table(["group", "entries", "λ_min", "λ_max", "m⁻"], rows)

    __repr__ = __str__


def group_spectra(
    op: CurvatureOperator,
    groups: GroupSelection = None,
    *,
    probes: int = 10,
    steps: int = 50,
    rtol: float | None = None,
    max_products: int = 300,
    generator: torch.Generator | None = None,
    memory_limit: int = 8 * 2**30,
) -> GroupSpectra:
    """λ_min, λ_max and negative-curvature mass of the diagonal block of each group of parameters.

    By :func:`diagnostics.extreme_eigenpairs` and :func:`diagnostics.spectral_density` of the blocks; those of at most
    ``steps`` entries are computed whole, and exact. Of a :class:`diagnostics.GaussNewtonOperator` of a convex loss m⁻
    is 0 to rounding.

    Args:
        op: A Hessian, Gauss-Newton, tensor or Fisher operator.
        groups: As in :func:`estimate_parameter_metrics`.
        probes: Random vectors of the quadrature for m⁻, at least 2.
        steps: Lanczos steps of each. What too few of them get wrong is not in the standard error.
        rtol: As in :func:`diagnostics.extreme_eigenpairs`.
        max_products: For the two eigenvalues of a group.
        generator: Source of randomness. None: a new one with seed 0 for each group.
        memory_limit: Bytes for the Lanczos vectors.

    Raises:
        TypeError: ``op`` is not an operator of parameters.
        ValueError: an argument is out of range.
        DiagnosticsError: as from :func:`estimate_parameter_metrics`.
        MemoryBudgetError: Lanczos vectors do not fit.
    """
    chosen = ParameterGroups(op, groups)
    ends, bounds, masses, products = [], [], [], 0
    for name in chosen.names:
        block = GroupBlock(op, chosen, name)
        density = spectral_density(block, probes=probes, steps=steps, memory_limit=memory_limit, generator=generator)
        products += density.products
        masses.append(density.negative_mass())
        if density.is_exact:
            ends.append(density.nodes[0, [0, -1]].to(op.device, op.dtype))
            bounds.append(torch.zeros_like(ends[-1]))
            continue
        pairs = extreme_eigenpairs(
            block, 1, "both", rtol=rtol, max_products=max_products, generator=generator, memory_limit=memory_limit
        )
        products += pairs.products
        ends.append(pairs.values)
        bounds.append(pairs.residuals)
    (smallest, largest), (smallest_error, largest_error) = torch.stack(ends, 1), torch.stack(bounds, 1)
    mass, error = (torch.stack([getattr(m, field) for m in masses]) for field in ("value", "standard_error"))
    return GroupSpectra(
        groups=chosen.names,
        sizes=tuple(chosen.size(name) for name in chosen.names),
        smallest=smallest,
        largest=largest,
        smallest_error=smallest_error,
        largest_error=largest_error,
        negative_mass=Estimate(mass, error, probes, products, bool((error == 0).all())),
        products=products,
    )
