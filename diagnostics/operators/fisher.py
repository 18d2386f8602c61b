"""The Fisher information matrix of a model with respect to its parameters, exact, sampled or empirical."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from diagnostics.autograd.sample_mixing import mixes_samples
from diagnostics.errors import DiagnosticsError
from diagnostics.operators.curvature import CurvatureOperator
from diagnostics.operators.curvature_tape import Columns, SplitTape, Tape
from diagnostics.operators.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from diagnostics.operators.parameter_space import ParameterSelection

T = TypeVar("T", bound=Tape)

KINDS = ("type-2", "monte-carlo", "empirical")
LIKELIHOODS = ("categorical", "gaussian", "bernoulli", "poisson")


class FisherOperator(CurvatureOperator):
    r"""A Fisher information matrix of the loss's likelihood, ``(P, P)``, positive semidefinite, by its products.

    The loss is a sum over samples (or their mean) of negative log-likelihoods, up to factors, of targets y given the
    model's output z. With the network's Jacobian J, the score ``s(y) = -∂ log p(y | z)/∂z`` and the factor c of the
    loss (1/B for a mean over B samples; 2/d on top for ``mse_loss`` with d outputs):

    - ``"type-2"``: ``Σ c Jᵀ E_{y∼p}[s(y) s(y)ᵀ] J``, the expectation over the model's own distribution in closed form.
      For these likelihoods it equals the Gauss-Newton matrix of the loss.
    - ``"monte-carlo"``: the same with the expectation replaced by the mean over ``samples`` draws of y for each unit
      (position of a categorical output; sample with all of its entries otherwise). Its expectation is type 2. The
      draws are made once: all products are of one matrix.
    - ``"empirical"``: ``(1/B) Σ_b g_b g_bᵀ`` with the gradients ``g_b = J_bᵀ ∂ℓ_b/∂z_b`` of the losses of the samples,
      with their actual targets (``Σ_b g_b g_bᵀ`` for a sum). It needs no likelihood, any loss that is a sum or mean of
      losses of samples will do; it is not an estimate of type 2 (Kunstner et al. 2019).

    The factor c is read off the loss: its second derivative in z must be c times the Fisher information of the
    likelihood, with a c of its own for each unit (class weights, ignored targets and shifted positions are fine);
    anything else is refused. Terms of the loss that depend on parameters directly (a weight penalty) are no likelihood
    of an output: they are left out.

    Args:
        model: As in :class:`diagnostics.CurvatureOperator`; so are the arguments that are not listed here.
        batches: Batches ``(inputs, targets)``.
        loss_fn: ``loss_fn(z, targets) -> scalar``.
        kind: ``"type-2"``, ``"monte-carlo"`` or ``"empirical"``.
        likelihood: ``"categorical"`` (cross-entropy; classes along the last dimension of z, or the second where that
            fits the loss), ``"gaussian"`` (½‖z − y‖² and its multiples), ``"bernoulli"`` (binary cross-entropy with
            logits) or ``"poisson"`` (counts whose rates have the logarithms z). For the first two kinds.
        samples: Draws for each unit, for ``"monte-carlo"``.
        generator: Source of the draws, for ``"monte-carlo"``; it is advanced by one number.
        parameters: Which parameters.
        reduction: ``"mean"`` or ``"sum"``.
        progress: Show a bar over batches.

    Raises:
        DiagnosticsError: the loss is not a negative log-likelihood of this kind, or (``"empirical"``) not a sum over
            samples; the model has several outputs (other than ``"empirical"``).

    Source: Kunstner, Balles and Hennig 2019; Martens 2020.
    """

    _tape_kind = SplitTape

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        kind: Literal["type-2", "monte-carlo", "empirical"] = "type-2",
        likelihood: Literal["categorical", "gaussian", "bernoulli", "poisson"] | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        parameters: ParameterSelection = None,
        reduction: Literal["mean", "sum"] = "mean",
        progress: bool = True,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
        if likelihood not in (None, *LIKELIHOODS):
            raise ValueError(f"likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}, got {likelihood!r}.")
        if kind != "empirical" and likelihood is None:
            raise ValueError(
                f"kind={kind!r} is an expectation over the targets' distribution: say which it is, likelihood="
                f'"categorical", "gaussian", "bernoulli" or "poisson".'
            )
        if kind == "monte-carlo" and generator is None:
            raise ValueError(
                'kind="monte-carlo" draws targets: pass a source, generator=torch.Generator().manual_seed(0).'
            )
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        self.kind = kind
        self.likelihood = likelihood
        self._draws = samples
        self._seed = int(torch.randint(2**62, (), generator=generator, device=generator.device)) if generator else 0
        self._checked = False
        super().__init__(
            model, batches, loss_fn,
            parameters=parameters, reduction=reduction, progress=progress, positive_semidefinite=True,
        )  # fmt: skip

    def _product(self, tape: SplitTape, columns: Columns) -> Columns:
        assert tape.output_metric is not None
        return tape.pull_back(tape.output_metric(tape.jvp(columns)))

    def _start(self) -> None:
        self._sampler = self._new_sampler()
        super()._start()

    def _sum(self, kind: type[T], measure: Callable[[T], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        self._sampler = self._new_sampler()  # every pass draws the same
        return super()._sum(kind, measure)

    def _new_sampler(self) -> torch.Generator:
        """Of the draws, which are others in every process."""
        return torch.Generator(self.device).manual_seed(self._seed + 1_000_003 * self._ranks.rank)

    def _attach(self, tape: Tape) -> None:
        if not isinstance(tape, SplitTape):
            return
        if self.kind == "empirical":
            self._check_samples(tape)
            tape.output_metric = _empirical(tape, mean=self.reduction == "mean")
            return
        likelihood, factor = self._fit(tape)
        z = _only(tape.used_outputs()).detach()
        if self.kind == "type-2":

            def expected(u: Columns) -> Columns:
                return [factor * likelihood.information(z, part) for part in u]

            tape.output_metric = tape.on_used(expected)
            return
        scores = factor.sqrt() * likelihood.scores(z, self._draws, self._sampler)

        def sampled(u: Columns) -> Columns:
            (part,) = u
            product = torch.zeros_like(part)
            for score in scores:
                product += score * likelihood.unit_sum(score * part)
            return [product / len(scores)]

        tape.output_metric = tape.on_used(sampled)

    def _fit(self, tape: SplitTape) -> tuple[Likelihood, Tensor]:
        """The likelihood, and the factor c on ``-log p`` that the loss has."""
        z = _only(tape.used_outputs())
        generator = torch.Generator().manual_seed(0)
        # The factor does not depend on z: read off where the information is far from singular.
        point, u, other = (torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device) for _ in range(3))
        curvature = tape.loss_curvature_at(point, torch.stack([u, other]))
        if not curvature.any():
            raise DiagnosticsError(f"the loss has no curvature in z, so it is no {self.likelihood} likelihood of it.")
        error = torch.inf
        for likelihood in self._candidates(z):
            information = likelihood.information(point, torch.stack([u, other]))
            factor = likelihood.factor(curvature[:1], information[:1]).squeeze(0)
            error = min(error, ((curvature - factor * information).norm() / curvature.norm()).item())
            if error < torch.finfo(z.dtype).eps ** 0.5 and factor.min() >= -error * factor.max():
                return likelihood, factor.clamp_min(0.0)
        raise DiagnosticsError(
            f"the loss is not the negative log-likelihood of a {self.likelihood} distribution with natural parameters "
            f"z, up to a factor for each {'position' if self.likelihood == 'categorical' else 'entry'}: its second "
            f"derivative in z differs from that by {error:.1e} of its norm. Choose another likelihood, let the model "
            "return logits, or use GaussNewtonOperator, which is of any loss."
        )

    def _candidates(self, z: Tensor) -> list[Likelihood]:
        match self.likelihood:
            case "categorical":
                return [Categorical(dim) for dim in ([-1] if z.ndim < 3 else [-1, 1])]
            case "gaussian":
                return [Gaussian()]
            case "poisson":
                return [Poisson()]
            case _:
                return [Bernoulli()]

    def _check_samples(self, tape: SplitTape) -> None:
        """Refuse a loss that is no sum over samples; tested on the first batch."""
        used = tape.used_outputs()
        shapes = [tuple(z.shape) for z in used]
        if any(not shape or shape[0] != tape.size for shape in shapes):
            raise DiagnosticsError(
                f"the empirical Fisher matrix takes the gradients of {tape.size} samples apart, but the model's output "
                f"has shape {', '.join(map(str, shapes))}: samples must be along the first dimension."
            )
        if self._checked or tape.size == 1:
            return
        slopes = [slope for slope in tape.slopes if slope is not None and slope.requires_grad]
        if slopes and mixes_samples(slopes, [c for c, s in zip(tape.cut, tape.slopes, strict=True) if s is not None]):
            raise DiagnosticsError(
                "the loss is not a sum of losses of samples (a contrastive loss, a root or a logarithm of a sum?), so "
                "samples have no gradients of their own."
            )
        self._checked = True


def _only(outputs: list[Tensor]) -> Tensor:
    if len(outputs) != 1:
        raise DiagnosticsError(
            f"the loss uses {len(outputs)} output tensors of the model, and a likelihood is of one. Use "
            "GaussNewtonOperator, which takes any number."
        )
    return outputs[0]


def _empirical(tape: SplitTape, *, mean: bool) -> Callable[[Columns], Columns]:
    """``Σ_b s_b s_bᵀ u`` with the slopes ``s_b = ∂L/∂z_b`` of the batch's loss, times B for a mean."""
    slopes = [None if slope is None else slope.detach() for slope in tape.slopes]
    scale = tape.size if mean else 1

    def metric(u: Columns) -> Columns:
        along = sum(
            (slope * part).flatten(2).sum(2) if part.ndim > 2 else slope * part
            for slope, part in zip(slopes, u, strict=True)
            if slope is not None
        )
        assert isinstance(along, Tensor)  # (k, B)
        along = along * scale
        return [
            torch.zeros_like(part) if slope is None else slope * along.view(*along.shape, *[1] * (part.ndim - 2))
            for slope, part in zip(slopes, u, strict=True)
        ]

    return metric
