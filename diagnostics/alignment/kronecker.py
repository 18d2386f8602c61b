"""The Kronecker reading of curvature exponents: how aligned singular vectors are with the factors' eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diagnostics.autograd.patches import input_rows
from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.symmetric_eigen import eigh, eigvalsh
from diagnostics.operators.curvature_tape import SplitTape
from diagnostics.operators.data import Batches
from diagnostics.operators.parameter_space import ParameterSpace
from diagnostics.operators.replay import Replay, along_the_tape
from diagnostics.results.power_law import PowerLaw, fit_power_law


@dataclass(frozen=True, eq=False)
class KroneckerAlignment:
    r"""One layer's curvature read as ``H ≈ C_δ ⊗ C_A``.

    .. math::
        \rho^\delta_k = \frac{u_k^\top C_\delta u_k}{\lambda_k(C_\delta)},\quad
        \rho^A_k = \frac{v_k^\top C_A v_k}{\lambda_k(C_A)},\quad
        \Phi_k = \rho^\delta_k \rho^A_k,\quad \Lambda_k = \lambda_k(C_\delta)\,\lambda_k(C_A),\quad
        h_k \approx \Phi_k \Lambda_k ,

    with eigenvalues in descending order. As slopes on the same log σ add,
    ``dlogΛ/dlogσ + dlogΦ/dlogσ`` is the exponent of the approximation: exactly α where ``H = C_δ ⊗ C_A``. The published
    "α = 2 + dlogΦ/dlogσ" takes ``Λ ∝ σ²`` for granted, which needs the gradient and the factors to have the same
    singular vectors.

    Attributes:
        phi: Φ, ``(k,)``; NaN where an eigenvalue is zero to rounding.
        lam: Λ, ``(k,)``.
        rho_delta: ρ^δ, ``(k,)``.
        rho_a: ρ^A, ``(k,)``.
        approximation: ``u_kᵀC_δu_k · v_kᵀC_Av_k = Φ_k Λ_k``, ``(k,)``, without dividing.
        eigenvalue_slope: dlogΛ/dlogσ.
        alignment_slope: dlogΦ/dlogσ.
        alpha: Their sum, the fit of the approximation itself (over the same directions).
        error: ``alpha`` minus the exact α of the same directions; NaN where the fits have too few points.
        ratio: Median of h / (ΦΛ).
    """

    phi: Tensor
    lam: Tensor
    rho_delta: Tensor
    rho_a: Tensor
    approximation: Tensor
    eigenvalue_slope: PowerLaw
    alignment_slope: PowerLaw
    alpha: PowerLaw
    error: float
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers, ready for JSON (but for NaN)."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: v.tolist() if isinstance(v, Tensor) else v.to_dict() if isinstance(v, PowerLaw) else v
            for name, v in values.items()
        }


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """Factors of one weight, seen as a matrix (m, n).

    Attributes:
        delta: C_δ, ``(m, m)``: of a Gauss-Newton matrix the mean over samples of ``∂²ℓ/∂e²`` at the layer's output e,
            summed over positions; or of the ``δδᵀ``.
        inputs: C_A, ``(n, n)``: the second moment of the layer's inputs (patches), over samples and positions.
    """

    delta: Tensor
    inputs: Tensor

    def align(self, u: Tensor, sigma: Tensor, v: Tensor, h: Tensor) -> KroneckerAlignment:
        """Read curvatures h ``(k,)`` along the singular directions u ``(m, k)``, v ``(n, k)`` of values σ ``(k,)``."""
        ends = [(self.delta, u), (self.inputs, v)]
        forms = [torch.einsum("ik,ij,jk->k", w, c, w) for c, w in ends]
        tops = []
        for c, _ in ends:
            values = eigvalsh(c).flip(0)
            zero = values <= len(values) * torch.finfo(values.dtype).eps * values[0].clamp_min(0)
            tops.append(values.masked_fill(zero, math.nan)[: len(sigma)])
        rho_delta, rho_a = (form / top for form, top in zip(forms, tops, strict=True))
        phi, lam, approximation = rho_delta * rho_a, tops[0] * tops[1], forms[0] * forms[1]
        good = (phi > 0) & (lam > 0) & (approximation > 0) & (h > 0)
        alpha = fit_power_law(sigma[good], approximation[good])
        positive = (h > 0) & (approximation > 0)
        return KroneckerAlignment(
            phi=phi,
            lam=lam,
            rho_delta=rho_delta,
            rho_a=rho_a,
            approximation=approximation,
            eigenvalue_slope=fit_power_law(sigma[good], lam[good]),
            alignment_slope=fit_power_law(sigma[good], phi[good]),
            alpha=alpha,
            error=alpha.exponent - fit_power_law(sigma[good], h[good]).exponent,
            ratio=float((h / approximation)[positive].median()) if bool(positive.any()) else math.nan,
        )


def kronecker_factors(
    model: nn.Module,
    batches: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    names: Iterable[str],
    kind: Literal["gauss_newton", "empirical"] = "gauss_newton",
    generator: torch.Generator | None = None,
) -> dict[str, KroneckerFactors]:
    """C_δ and C_A of the weights of linear and (ungrouped) convolution layers; the others are left out.

    With ``"gauss_newton"``, the loss's curvature in the output z, ``∂²L/∂z² = S Sᵀ``, is a block for every vector z
    (the last dimension), and the columns of S are carried back to each layer, each vector's with a random sign. Exact
    where samples do not meet in the network and each has one vector; else (batch normalisation in train mode, tokens)
    without bias. Convolutions are taken to have positions that do not correlate (Grosse and Martens 2016).

    Raises:
        DiagnosticsError: the loss ties entries of different output vectors, or is not convex in them.

    Source:
        Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015).
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    modules = {name: owners[id(model.get_parameter(name))] for name in names}
    modules = {name: m for name, m in modules.items() if _is_plain(m) and m.weight is model.get_parameter(name)}
    if not modules:
        return {}
    space = ParameterSpace(model, list(modules))
    replay = Replay(model, loss_fn, space.device)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    samples = 0
    with replay.replayed():
        for batch in Batches(batches):
            private = batch.private(space.device)
            with _recorded(modules) as calls:
                tape = SplitTape.of_batch(replay, private, space)
            slopes = [s.detach() for s in tape.slopes if s is not None]
            seeds = _roots(tape, generator) if kind == "gauss_newton" else [slopes]
            scale = 1.0 if kind == "gauss_newton" else float(batch.size)
            with along_the_tape(space.device):
                found = _batch_factors(tape, modules, calls, seeds, scale, batch.size)
            for name, pair in found.items():
                weighted = tuple(batch.size * part for part in pair)
                known = sums.get(name)
                sums[name] = weighted if known is None else (known[0] + weighted[0], known[1] + weighted[1])  # type: ignore[assignment]
            samples += batch.size
    return {name: KroneckerFactors(delta / samples, inputs / samples) for name, (delta, inputs) in sums.items()}


Calls = dict[str, list[tuple[Tensor, Tensor]]]
"""Input (detached) and output (on the tape) of every call of a module."""


class _recorded(ExitStack):
    """Records the calls of modules while it is entered."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules = modules

    def __enter__(self) -> Calls:  # type: ignore[override]
        calls: Calls = {name: [] for name in self._modules}

        def hook(name: str) -> Callable[..., Tensor]:
            def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                calls[name].append((args[0].detach(), output))
                return output.clone()  # what follows may work in place

            return record

        for name, module in self._modules.items():
            self.callback(module.register_forward_hook(hook(name)).remove)
        return calls


def _batch_factors(
    tape: SplitTape,
    modules: Mapping[str, nn.Module],
    calls: Calls,
    seeds: Sequence[Sequence[Tensor]],
    scale: float,
    size: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    where = [(name, a, e) for name, found in calls.items() for a, e in found if e.requires_grad]
    deltas: dict[str, Tensor] = {}
    used = tape.used_outputs()
    for seed in seeds:
        pulled = torch.autograd.grad(used, [e for *_, e in where], seed, retain_graph=True, allow_unused=True)
        for (name, _, e), g in zip(where, pulled, strict=True):
            rows = _positions(modules[name], torch.zeros_like(e) if g is None else g)
            deltas[name] = deltas.get(name, 0) + scale * rows.mT @ rows
    result = {}
    for name, delta in deltas.items():
        patches = [input_rows(modules[name], a) for a, _ in calls[name]]
        count = sum(map(len, patches))
        result[name] = (delta, sum((p.mT @ p for p in patches), torch.zeros((), dtype=delta.dtype)) / count)
    return result


def _roots(tape: SplitTape, generator: torch.Generator) -> list[list[Tensor]]:
    """Columns of S with ``S Sᵀ = ∂²L/∂z²``, all vectors of z together, each with a random sign."""
    used = tape.used_outputs()
    if len(used) != 1 or used[0].ndim < 2:
        raise DiagnosticsError(
            f"the loss uses {len(used)} tensors of the output; Gauss-Newton factors are for one of shape (samples, …, "
            'classes). Pass kronecker="empirical" or kronecker=None.'
        )
    z = used[0]
    full = [torch.zeros_like(t) for t in tape.outputs]
    position = next(i for i, t in enumerate(tape.outputs) if t is z)

    def curved(columns: Tensor) -> Tensor:
        u = [t.expand(len(columns), *t.shape) for t in full]
        u[position] = columns
        return tape.output_hessian(u)[position]

    width = z.shape[-1]
    unit = torch.eye(width, dtype=z.dtype, device=z.device).view(width, *(1,) * (z.ndim - 1), width)
    blocks = curved(unit.expand(width, *z.shape).contiguous()).movedim(0, -1)  # (…, i, j)
    probe = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    straight = curved(probe.unsqueeze(0))[0]
    if (straight - torch.einsum("...ij,...j->...i", blocks, probe)).norm() > 1e-3 * straight.norm():
        raise DiagnosticsError(
            "the loss ties different output vectors to each other (a contrastive loss, or classes that are not in the "
            'last dimension?), so that its curvature has no block for each. Pass kronecker="empirical" or None.'
        )
    values, vectors = eigh((blocks + blocks.mT) / 2)
    if bool((values < -1e-4 * values.abs().amax()).any()):
        raise DiagnosticsError(
            "the loss is not convex in the model's output, so that its Gauss-Newton matrix has no factor S Sᵀ. Pass "
            'kronecker="empirical" or kronecker=None.'
        )
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    signs = torch.randint(0, 2, (width, *z.shape[:-1]), generator=generator).mul_(2).sub_(1).to(z.device, z.dtype)
    return [[signs[c].unsqueeze(-1) * root[..., c]] for c in range(width)]


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return not module.transposed and module.groups == 1
    return isinstance(module, nn.Linear)


def _positions(module: nn.Module, e: Tensor) -> Tensor:
    """Outputs as rows ``(samples · positions, out)``."""
    return e.movedim(1, -1).flatten(0, -2) if isinstance(module, nn.modules.conv._ConvNd) else e.flatten(0, -2)
