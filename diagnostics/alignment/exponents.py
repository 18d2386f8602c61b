"""Curvature exponents: how the curvature along a gradient's singular directions grows with the singular values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from diagnostics.alignment.kronecker import KroneckerFactors, kronecker_factors
from diagnostics.alignment.tables import ExponentTable, LayerExponents
from diagnostics.autograd.refusals import check_model
from diagnostics.errors import DiagnosticsError
from diagnostics.operators.curvature import HessianOperator
from diagnostics.operators.curvature_tape import JointTape, SplitTape
from diagnostics.results.power_law import fit_exponents, participation_ratio, zeta_reference

LayerSelection: TypeAlias = Iterable[str] | Callable[[str, nn.Parameter], bool] | None
Types: TypeAlias = Mapping[str, str] | Callable[[str], str] | None
Kronecker: TypeAlias = Literal["gauss_newton", "empirical"] | None


def curvature_exponents(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    k: int = 20,
    *,
    layers: LayerSelection = None,
    types: Types = None,
    control: bool = True,
    kronecker: Kronecker = "gauss_newton",
    generator: torch.Generator | None = None,
) -> ExponentTable:
    r"""The curvature exponent α of every weight matrix and convolution, with its checks and its control.

    With the gradient ``G = U Σ Vᵀ`` of a weight, a convolution's flattened to (out, in·kh·kw), and the Hessian H of the
    loss in that weight alone,

    .. math::
        h_k = \langle u_k v_k^\top, H[u_k v_k^\top] \rangle,\quad
        h \propto \sigma^{\alpha},\quad \sigma_k \propto k^{-\gamma},\quad h_{(k)} \propto k^{-s} ,

    for the k largest σ that are not zero to rounding (of cross-entropy's last layer one is). Products are exact double
    back-propagation, all of a layer together where that is faster, over one tape. Directions with h ≤ 0 have no
    logarithm: they are counted and left out of all fits, which then number the rest 1, 2, ….

    **What it says.** ``s = αγ`` holds for any numbers to within the bound of
    :class:`diagnostics.results.power_law.ExponentIdentity`, which stands beside the error. The *control* measures the
    same along the singular directions of a matrix without the gradient's information: of the same samples with random
    signs, ``Σ_i ε_i ∂ℓ_i/∂W`` with ε_i = ±1 (``Σ ε_i δ_i a_iᵀ / B`` for a linear layer; in general the signal
    ``∂L/∂z`` of sample i is multiplied by ε_i and carried back). What the control shows too is no property of the
    gradient.

    **Kronecker reading.** See :class:`diagnostics.alignment.kronecker.KroneckerAlignment`: where the Hessian is about
    ``C_δ ⊗ C_A``, α is ``dlogΛ/dlogσ + dlogΦ/dlogσ``; it is 2 plus the second only where the eigenvectors are aligned.

    Args:
        model: The network; see :class:`diagnostics.HessianOperator`, also for the errors.
        batch: One batch ``(inputs, targets)``, or a source of several, over which the loss is averaged.
        loss_fn: ``loss_fn(z, targets) -> scalar``, a mean over the samples.
        k: Most directions of a layer.
        layers: None: every parameter with two or more dimensions that requires grad, but not those of embeddings.
            Names or shell patterns of parameters, or of the modules whose ``weight`` they are; or a predicate ``(name,
            parameter) -> bool``.
        types: What a layer is called in :meth:`ExponentTable.by_type`: by layer name, or ``name -> type``; the rest
            is ``"conv"``, ``"linear"``, ``"head"`` (the last linear layer of the model) or ``"other"``.
        control: Measure the control as well; the output's first dimension must be that of the samples.
        kronecker: ``"gauss_newton"``: C_δ of the Gauss-Newton matrix, by a backward pass for each output of a sample.
            ``"empirical"``: C_δ of ``δδᵀ``, one pass; far from the curvature of a trained network. None: leave it out.
        generator: For the signs. None: seeded with 0.

    Returns:
        The table, in the order of the parameters.

    Raises:
        DiagnosticsError: nothing is chosen, a name matches nothing, the output has no sample dimension, …
        ValueError: an argument is out of range.

    Source:
        arXiv 2606.02596; the bound, the control and the corrected reading are this package's.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 3:
        raise ValueError(f"k must be an integer of at least 3, of which a slope has an error; got {k!r}.")
    if kronecker not in ("gauss_newton", "empirical", None):
        raise ValueError(f'kronecker must be "gauss_newton", "empirical" or None, got {kronecker!r}.')
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    check_model(model)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    chosen = _choose(model, layers)
    named = _types(model, types, chosen)
    op = LayerCurvature(model, batch, loss_fn, parameters=chosen)
    factors: dict[str, KroneckerFactors] = {}
    if kronecker is not None:
        factors = kronecker_factors(model, batch, loss_fn, chosen, kronecker, generator)
    _, flat = op.loss_and_gradient()
    rows = _measure(op, flat, k, named, factors)
    if control:
        controls = _measure(op, op.sign_flipped_gradient(generator), k, named, factors)
        rows = [replace(row, control=c) for row, c in zip(rows, controls, strict=True)]
    return ExponentTable(tuple(rows))


class LayerCurvature(HessianOperator):
    """The Hessian's diagonal blocks of single parameters, beside :class:`diagnostics.HessianOperator` itself."""

    def quadratic_forms(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """``⟨u_j v_jᵀ, H[u_j v_jᵀ]⟩`` with H the block of one parameter, by its name, ``(k,)`` each.

        A product goes only through what lies between the parameter and the loss.

        Args:
            pairs: The columns u ``(m, k)`` and v ``(n, k)`` by parameter name.
        """
        where = {name: i for i, name in enumerate(self.space.parameters)}
        parameters = list(self.space.parameters.values())

        def forms(tape: JointTape) -> tuple[Tensor, ...]:
            found = []
            for name, (u, v) in pairs.items():
                i = where[name]
                directions = rank_one(u, v, parameters[i].shape)  # of one layer at a time: they are large
                (bent,) = tape.vjps([tape.gradients[i]], [parameters[i]], [directions])
                found.append((bent * directions).flatten(1).sum(1))
            return tuple(found)

        return dict(zip(pairs, self._sum(JointTape, forms), strict=True))

    def sign_flipped_gradient(self, generator: torch.Generator) -> Tensor:
        """The gradient with the signal ``∂L/∂z`` of each sample times a random sign, ``(P,)``.

        Raises:
            DiagnosticsError: the first dimension of the output is not that of the samples.
        """

        def flipped(tape: SplitTape) -> tuple[Tensor]:
            signs = torch.randint(0, 2, (tape.size,), generator=generator).mul_(2).sub_(1)
            seeds = []
            for z, slope in zip(tape.outputs, tape.slopes, strict=True):
                if z.ndim == 0 or len(z) != tape.size:
                    raise DiagnosticsError(
                        f"the model's output has shape {tuple(z.shape)} for {tape.size} samples, so that their signs "
                        "cannot be flipped one by one: return (samples, …), or pass control=False."
                    )
                by_sample = signs.to(z.device, z.dtype).view(-1, *(1,) * (z.ndim - 1))
                seeds.append((torch.zeros_like(z) if slope is None else by_sample * slope).detach().unsqueeze(0))
            pulled = tape.pull_back(seeds)
            return (torch.cat([part.reshape(-1) for part in pulled]),)

        (flat,) = self._sum(SplitTape, flipped)
        return flat


def rank_one(u: Tensor, v: Tensor, shape: torch.Size) -> Tensor:
    """The matrices ``u_k v_kᵀ`` of columns ``(m, k)``, ``(n, k)`` as directions of a weight, ``(k, *shape)``."""
    return torch.einsum("mk,nk->kmn", u, v).reshape(-1, *shape)


def top_directions(gradient: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular values of a gradient flattened to (m, n), with their vectors ``(m, j)`` and ``(n, j)``.

    Those below ``max(m, n) · eps · σ_max`` are zero to rounding, and left out.
    """
    matrix = gradient.flatten(1)
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    floor = max(matrix.shape) * torch.finfo(sigma.dtype).eps * sigma[0]
    count = min(k, int((sigma > floor).sum()))
    return u[:, :count], sigma[:count], vh[:count].mT


def _measure(
    op: LayerCurvature, flat: Tensor, k: int, types: Mapping[str, str], factors: Mapping[str, KroneckerFactors]
) -> list[LayerExponents]:
    gradients = op.unflatten(flat)
    top = {name: top_directions(g, k) for name, g in gradients.items()}
    curvatures = op.quadratic_forms({name: (u, v) for name, (u, _, v) in top.items()})
    rows = []
    for name, (u, sigma, v) in top.items():
        h = curvatures[name]
        kept = h > 0
        fits = fit_exponents(sigma[kept], h[kept])
        m, *rest = gradients[name].shape
        row = LayerExponents(
            name=name,
            shape=(m, torch.Size(rest).numel()),
            type=types[name],
            sigma=sigma,
            h=h,
            fits=fits,
            dropped=int((~kept).sum()),
            participation=participation_ratio(h[kept]),
            zeta_reference=zeta_reference(fits.s.exponent),
            kronecker=factors[name].align(u, sigma, v, h) if name in factors else None,
        )
        rows.append(row)
    return rows


def _choose(model: nn.Module, layers: LayerSelection) -> list[str]:
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    matrices = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim >= 2}
    if not matrices:
        raise DiagnosticsError(
            f"no parameter of {type(model).__name__} with two or more dimensions requires grad: there is no gradient "
            "matrix to take apart."
        )
    listed = ", ".join(map(repr, list(matrices)[:12])) + (" …" if len(matrices) > 12 else "")
    if layers is None:
        chosen = [name for name, p in matrices.items() if id(p) not in embedded]
    elif callable(layers):
        chosen = [name for name, p in matrices.items() if layers(name, p)]
    else:
        wanted: set[str] = set()
        for pattern in [layers] if isinstance(layers, str) else layers:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"layers must be None, names or patterns (strings), or a predicate (name, parameter) -> bool; got "
                    f"an entry of type {type(pattern).__name__}."
                )
            found = {
                n for n in matrices if fnmatchcase(n, pattern) or fnmatchcase(re.sub(r"\.weight$", "", n), pattern)
            }
            if not found:
                raise DiagnosticsError(
                    f"no weight with two or more dimensions that requires grad is called or matches {pattern!r}; there "
                    f"are {listed}."
                )
            wanted |= found
        chosen = [name for name in matrices if name in wanted]
    if not chosen:
        raise DiagnosticsError(f"layers chose none of the weights, which are {listed}.")
    return chosen


def _types(model: nn.Module, types: Types, chosen: Iterable[str]) -> dict[str, str]:
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    found = {}
    for name in chosen:
        given = types(name) if callable(types) else None if types is None else _lookup(types, name)
        owner = owners[id(model.get_parameter(name))]
        if given is not None:
            found[name] = given
        elif isinstance(owner, nn.modules.conv._ConvNd):
            found[name] = "conv"
        elif isinstance(owner, nn.Linear):
            found[name] = "head" if owner is linear[-1] and len(linear) > 1 else "linear"
        else:
            found[name] = "other"
    return found


def _lookup(types: Mapping[str, str], name: str) -> str | None:
    return types.get(name, types.get(re.sub(r"\.weight$", "", name)))
