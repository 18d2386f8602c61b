"""The results of :func:`diagnostics.curvature_exponents`: they print, plot, and convert to dicts and frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diagnostics.alignment.kronecker import KroneckerAlignment
from diagnostics.errors import DiagnosticsError
from diagnostics.results.power_law import ExponentFits, ExponentIdentity, PowerLaw
from diagnostics.results.text_table import format_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class LayerExponents:
    """Singular values of one layer's gradient, the curvature along them, and their power laws.

    Attributes:
        name: Of the weight.
        shape: (m, n), as a matrix.
        type: What the layer is called in :meth:`ExponentTable.by_type`.
        sigma: σ, descending, ``(k,)``.
        h: ``⟨u_k v_kᵀ, H[u_k v_kᵀ]⟩``, ``(k,)``.
        fits: α, γ, s over the directions with h > 0.
        dropped: Number of directions with h ≤ 0.
        participation: ``(Σh)² / Σh²`` over those with h > 0.
        zeta_reference: ``ζ(s)² / ζ(2s)``, what an infinite exact power law would have; not a bound.
        kronecker: The Kronecker reading, for linear layers and convolutions if asked for.
        control: The same for the sign-flipped gradient, if asked for.
    """

    name: str
    shape: tuple[int, int]
    type: str
    sigma: Tensor
    h: Tensor
    fits: ExponentFits
    dropped: int
    participation: float
    zeta_reference: float
    kronecker: KroneckerAlignment | None = None
    control: LayerExponents | None = None

    @property
    def alpha(self) -> PowerLaw:
        """``h ∝ σ^α``."""
        return self.fits.alpha

    @property
    def gamma(self) -> PowerLaw:
        """``σ_k ∝ k^(−γ)``."""
        return self.fits.gamma

    @property
    def s(self) -> PowerLaw:
        """``h_(k) ∝ k^(−s)``, sorted."""
        return self.fits.s

    @property
    def identity(self) -> ExponentIdentity:
        """Error of s = αγ, and its bound."""
        return self.fits.identity

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, ready for JSON (but for NaN)."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "type": self.type,
            "sigma": self.sigma.tolist(),
            "h": self.h.tolist(),
            "alpha": self.alpha.to_dict(),
            "gamma": self.gamma.to_dict(),
            "s": self.s.to_dict(),
            "s_ranked": self.fits.s_ranked.to_dict(),
            "identity": self.identity.to_dict(),
            "dropped": self.dropped,
            "participation": self.participation,
            "zeta_reference": self.zeta_reference,
            "kronecker": None if self.kronecker is None else self.kronecker.to_dict(),
            "control": None if self.control is None else self.control.to_dict(),
        }

    def __repr__(self) -> str:
        return f"LayerExponents({self.name!r}, alpha {self.alpha}, dropped {self.dropped})"


@dataclass(frozen=True)
class TypeExponents:
    """α of the layers of one type: mean and standard deviation (n − 1) over layers, and the control's mean."""

    type: str
    layers: int
    mean: float
    deviation: float
    control: float


@dataclass(frozen=True, eq=False, repr=False)
class ExponentTable:
    """Curvature exponents of all chosen layers; made by :func:`diagnostics.curvature_exponents`."""

    layers: tuple[LayerExponents, ...]

    def __getitem__(self, name: str) -> LayerExponents:
        """The layer of that name; ``".weight"`` may be left out."""
        for layer in self.layers:
            if name in (layer.name, layer.name.removesuffix(".weight")):
                return layer
        raise KeyError(f"no layer {name!r}; there are {', '.join(layer.name for layer in self.layers)}.")

    def __len__(self) -> int:
        return len(self.layers)

    def by_type(self) -> dict[str, TypeExponents]:
        """Mean α by layer type; layers without a fit are left out."""
        found = {}
        for kind in dict.fromkeys(layer.type for layer in self.layers):
            mine = [layer for layer in self.layers if layer.type == kind]
            alphas = torch.tensor([layer.alpha.exponent for layer in mine], dtype=torch.float64)
            alphas = alphas[alphas.isfinite()]
            controls = [layer.control.alpha.exponent for layer in mine if layer.control is not None]
            found[kind] = TypeExponents(
                kind,
                len(alphas),
                float(alphas.mean()) if len(alphas) else math.nan,
                float(alphas.std()) if len(alphas) > 1 else math.nan,
                float(torch.tensor(controls, dtype=torch.float64).nanmean()) if controls else math.nan,
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """The layers' dicts, by name."""
        return {layer.name: layer.to_dict() for layer in self.layers}

    def to_pandas(self) -> pd.DataFrame:
        """One row a layer, the columns of the printed table in full; needs pandas."""
        import pandas as pd

        return pd.DataFrame([_row(layer) for layer in self.layers])

    def plot(self, axes: Axes | None = None, layers: Sequence[str] | None = None) -> Axes:
        """Plot h against σ of each layer on logarithmic axes, with the fitted lines; needs matplotlib.

        Args:
            axes: Where to draw. None: a new figure.
            layers: Names of the layers. None: all.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(layout="constrained")
        chosen = self.layers if layers is None else [self[name] for name in layers]
        if not chosen:
            raise DiagnosticsError("there is no layer to plot.")
        for layer in chosen:
            sigma, h = layer.sigma.double().cpu(), layer.h.double().cpu()
            kept = h > 0
            label = f"{layer.name.removesuffix('.weight')}: α = {layer.alpha.exponent:.2f}"
            (points,) = axes.plot(sigma[kept].numpy(), h[kept].numpy(), "o", ms=3, label=label)
            line = math.exp(layer.alpha.intercept) * sigma[kept] ** layer.alpha.exponent
            axes.plot(sigma[kept].numpy(), line.numpy(), lw=1, color=points.get_color())
        axes.set(xscale="log", yscale="log", xlabel="singular value σ of the gradient", ylabel="curvature h")
        axes.legend(fontsize="small")
        return axes

    def __str__(self) -> str:
        header = ["layer", "type", "shape", "k", "h≤0", "α", "R²", "γ", "R²", "s", "R²", "αγ", "error", "bound"]
        header += ["PR", "ζ²/ζ", "α (K)", "α control", "error"]
        rows = []
        for layer in self.layers:
            i, c = layer.identity, layer.control
            row = [layer.name.removesuffix(".weight"), layer.type, f"{layer.shape[0]}×{layer.shape[1]}"]
            row += [str(layer.alpha.points), str(layer.dropped)]
            for law in (layer.alpha, layer.gamma, layer.s):
                row += [f"{law.exponent:.2f} ± {law.standard_error:.2f}", f"{law.r2:.2f}"]
            row += [f"{layer.alpha.exponent * layer.gamma.exponent:.2f}"]
            row += [f"{i.relative_error:.1%}", f"{i.relative_bound:.1%}"]
            row += [f"{layer.participation:.2f}", f"{layer.zeta_reference:.2f}"]
            row += ["" if layer.kronecker is None else f"{layer.kronecker.alpha.exponent:.2f}"]
            row += ["", ""] if c is None else [f"{c.alpha.exponent:.2f}", f"{c.identity.relative_error:.1%}"]
            rows.append(row)
        return "\n".join([format_table(header, rows), *self._summary()])

    __repr__ = __str__

    def _summary(self) -> list[str]:
        lines = []
        kinds: list[tuple[str, list[LayerExponents]]] = [("gradient", list(self.layers))]
        controls = [layer.control for layer in self.layers if layer.control is not None]
        if controls:
            kinds.append(("sign-flipped control", controls))
        for name, layers in kinds:
            fitted = [layer for layer in layers if math.isfinite(layer.identity.error)]
            if not fitted:
                continue
            error = median(layer.identity.relative_error for layer in fitted)
            mean = sum(layer.alpha.exponent for layer in fitted) / len(fitted)
            inside = sum(layer.identity.inside for layer in fitted) / len(fitted)
            lines.append(
                f"{name}: mean α {mean:.2f}; |s − αγ| / s in the median {error:.2%}, inside the bound that least "
                f"squares forces for {inside:.0%} of {len(fitted)} layers"
            )
        return lines


def _row(layer: LayerExponents) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer.name, "type": layer.type, "m": layer.shape[0], "n": layer.shape[1]}
    for name in ("alpha", "gamma", "s"):
        law: PowerLaw = getattr(layer, name)
        row |= {name: law.exponent, f"{name}_error": law.standard_error, f"{name}_r2": law.r2}
    row |= {"points": layer.alpha.points, "dropped": layer.dropped, **layer.identity.to_dict()}
    row |= {"participation": layer.participation, "zeta_reference": layer.zeta_reference}
    if layer.kronecker is not None:
        row |= {"kronecker_alpha": layer.kronecker.alpha.exponent, "kronecker_error": layer.kronecker.error}
    if layer.control is not None:
        row |= {f"control_{k}": v for k, v in _row(layer.control).items() if k not in ("layer", "type", "m", "n")}
    return row
