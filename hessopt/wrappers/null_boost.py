"""Experimental: strengthen the gradient along null vectors, or other parts of a Krylov space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.estimators.null_vectors import Inertia, inertia, pair_spectrally
from diagnostics.operators.null_cones import RitzPairs, krylov_space
from hessopt.checks import check_choice, check_count
from hessopt.closure.loss_hessian import LossHessian, random_basis
from hessopt.closure.protocol import Closure, Evaluation
from hessopt.closure.step_curvature import StepCurvature
from hessopt.errors import ClosureError
from hessopt.network.saved_state import asks_for_state, check_shape
from hessopt.wrappers.base import OptimizerWrapper

Mode: TypeAlias = Literal["null", "low_curvature", "negative_curvature", "random", "random_krylov"]
"""Which subspace is boosted; the last two are controls."""

_SIGNIFICANT = 100
"""Ritz values of so many eps · ‖H‖ count as zero."""


@dataclass(frozen=True)
class BoostReport:
    """What a refresh of the subspace found.

    Attributes:
        mode: The mode.
        rank: Dimension of the subspace; 0 where there is none of this kind.
        inertia: Signs of the Ritz values; None for ``"random"``, which needs no curvature.
        gradient_share: ``‖Qᵀg‖ / ‖g‖``.
        products: Hessian-vector products.
    """

    mode: Mode
    rank: int
    inertia: Inertia | None
    gradient_share: float
    products: int


class NullBoost(OptimizerWrapper):
    r"""Experimental: wraps an optimizer and multiplies the part of the gradient in a subspace by β.

    .. math::
        g \leftarrow g + (\beta - 1)\, Q Q^\top g ,

    with orthonormal Q, found every ``every`` steps from ``krylov`` Lanczos steps that start at the gradient. ``mode``
    says which subspace of that Krylov space, with Ritz pairs (θ, u):

    - ``"low_curvature"``: the u of smallest ``|θ|``. Where the learning rate is bounded by ``‖H‖``, these are the
      directions that could take a larger one.
    - ``"null"``: vectors with ``vᵀHv = 0`` that pair positive with negative θ, see :func:`diagnostics.null_vectors`.
    - ``"negative_curvature"``: the u of most negative θ.
    - ``"random_krylov"``: a random subspace of the Krylov space: the control that is fair, since the Krylov space of
      the gradient holds all of the gradient.
    - ``"random"``: a random subspace of all parameters: it holds next to nothing of the gradient.

    With β = 1 every step is the wrapped optimizer's, bit for bit. Gradients in ``.grad`` are the user's again after the
    step; ``requires_grad`` is never changed (the published code freezes the boosted matrices with it, and what it
    reports is the effect of that). Weight decay of the wrapped optimizer is not boosted.

    Null vectors have shown no gain over the controls that holds on more than one problem; see the documentation first.

    Args:
        base: The optimizer to wrap.
        model: The network: its buffers belong to the loss, outputs are recorded. None: the closure alone is used.
        mode: See above. Default: ``"low_curvature"``.
        beta: β. Default: 3.
        every: Steps between refreshes of Q. None: only by :meth:`refresh`. Default: 20.
        krylov: Lanczos steps k of a refresh, one Hessian-vector product each; fewer where the Krylov space is
            exhausted. Default: 20.
        rank: Largest dimension of Q. None: half of ``krylov``.
        seed: Of random subspaces.

    Attributes:
        last_refresh: A :class:`BoostReport`, or None before the first.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: an argument is out of range.

    Source:
        "Neural Null Cones", v6, for the idea; the modes beside ``"null"`` are its missing controls.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = NullBoost(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        >>> x = torch.eye(3)
        >>> loss = optimizer.step(lambda: (model(x) - 1).square().mean())
        >>> optimizer.last_refresh.rank
        2
    """

    _OWN = ("mode", "beta", "every", "krylov", "rank", "seed", "last_refresh", "_basis", "_members", "_steps", "_drawn")
    _KEY = "null_boost"

    def __init__(
        self,
        base: Optimizer,
        *,
        model: nn.Module | None = None,
        mode: Mode = "low_curvature",
        beta: float = 3.0,
        every: int | None = 20,
        krylov: int = 20,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("mode", mode, get_args(Mode))
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be a finite factor of at least 0, got {beta}.")
        for name, value in (("every", every), ("krylov", krylov), ("rank", rank)):
            if value is not None or name == "krylov":
                check_count(name, value)
        if rank is not None and rank > krylov:
            raise ValueError(f"rank must be at most krylov ({krylov}), got {rank}.")
        self._begin(base, model)
        self.mode: Mode = mode
        self.beta = beta
        self.every = every
        self.krylov = krylov
        self.rank = rank
        self.seed = seed
        self.last_refresh: BoostReport | None = None
        self._basis: Tensor | None = None
        self._members: list[int] = []  # positions of the parameters that the basis has rows for
        self._steps = 0
        self._drawn = 0
        self._finish()

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Refresh the subspace if that is due, boost the gradient, and take a step of the wrapped optimizer.

        Args:
            closure: Evaluates the loss of this step's batch, see :mod:`hessopt.closure.protocol`. None: the gradient
                is in ``.grad``, and the subspace that was found last is used.

        Returns:
            What the wrapped optimizer returned: the loss before its step; None without a closure.

        Raises:
            ClosureError: a refresh is due without a closure; or the closure does not give a finite, differentiable
                loss with a finite gradient.
            ModelError: a gradient is sparse; or several processes train together, and their parameters differ at the
                first step.

        In these cases parameters and the wrapped optimizer's state are as they were. Without a closure ``.grad`` is not
        looked at, as in :mod:`torch.optim`.
        """
        if asks_for_state(self, closure):
            self.base.step()
            return None
        due = self.beta != 1 and self.every is not None and self._steps % self.every == 0
        own: list[tuple[Tensor, Tensor | None]] = []

        def before_base(evaluation: Evaluation | None, _: float = 0.0) -> None:
            nonlocal due
            if due and evaluation is not None:
                self._refresh(evaluation)
                due = False  # once a step, also where the wrapped optimizer runs the closure several times
            self._boost(own)

        def give_back() -> None:
            for p, gradient in own:
                p.grad = gradient

        if closure is None and due:
            raise ClosureError(
                "NullBoost.step() needs a closure at steps that refresh its subspace: curvature cannot be had from "
                "`.grad` alone. Pass one, or construct it with every=None and call refresh(closure) yourself, on "
                "whatever batch, before steps without a closure."
            )
        guard = self._guard(changed=False, names=("_basis", "_members", "_drawn", "last_refresh"))
        try:
            with guard:
                if closure is not None:
                    loss: Any = self.base.step(self._for_base(closure, before_base, curvature=due))
                else:
                    before_base(None)
                    loss = self.base.step()
            give_back()
            self._steps += 1
        except BaseException:
            give_back()
            raise
        result: Tensor | None = loss
        return result

    def refresh(self, closure: Closure) -> BoostReport:
        """Find the subspace anew, on the batch of this closure; ``.grad`` is left as it was.

        Raises:
            ClosureError: the closure does not give a finite, differentiable loss.
        """
        gradients = [(p, None if p.grad is None else p.grad.clone()) for p in self._parameters()]
        try:
            self._for_base(closure, lambda evaluation, _: self._refresh(evaluation), curvature=True)()
        finally:
            for p, gradient in gradients:
                p.grad = gradient
        assert self.last_refresh is not None
        return self.last_refresh

    def _refresh(self, evaluation: Evaluation) -> None:
        listed = self._parameters()
        self._members = [i for i, p in enumerate(listed) if p.requires_grad]
        maximize = bool(self.param_groups[0].get("maximize"))
        members = [listed[i] for i in self._members]
        curvature = StepCurvature(evaluation.loss, members, verify=True, ranks=self._ranks())
        op = LossHessian(curvature, maximize=maximize)
        norm = torch.linalg.vector_norm(op.gradient)
        if not norm > 0:  # nothing to boost, and no direction to start from
            self._basis = None
            self.last_refresh = BoostReport(self.mode, 0, None, 0.0, 0)
            return
        self._drawn += 1
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self._drawn)
        most = min(self.rank or max(1, self.krylov // 2), op.shape[0])
        ritz = None if self.mode == "random" else krylov_space(op, self.krylov, op.gradient, stop_early=True)
        signs = None if ritz is None else inertia(ritz.values, _SIGNIFICANT * torch.finfo(op.dtype).eps)
        if ritz is None or signs is None:
            basis = random_basis(op.shape[0], most, op.gradient, generator)
        else:
            basis = ritz.vectors @ coefficients(self.mode, ritz, signs, most, generator).to(ritz.vectors)
        self._basis = basis if basis.shape[1] else None
        share = float(torch.linalg.vector_norm(basis.mT @ op.gradient) / norm)
        self.last_refresh = BoostReport(self.mode, basis.shape[1], signs, share, 0 if ritz is None else ritz.products)

    @torch.no_grad()
    def _boost(self, own: list[tuple[Tensor, Tensor | None]]) -> None:
        """Put boosted gradients in ``.grad``, having noted what was there."""
        own.clear()
        if self._basis is None or self.beta == 1:
            return
        listed = self._parameters()
        chosen = [listed[i] for i in self._members]
        if self._basis.device != chosen[0].device:  # loaded from elsewhere
            self._basis = self._basis.to(chosen[0].device)
        rows = self._basis.split([p.numel() for p in chosen])
        parts = [(p, q, p.grad) for p, q in zip(chosen, rows, strict=True) if p.grad is not None]
        inside = sum((q.mT @ g.reshape(-1).to(q.dtype) for _, q, g in parts), self._basis.new_zeros(()))
        own += [(p, g) for p, _, g in parts]
        for p, q, g in parts:
            p.grad = g + ((self.beta - 1) * (q @ inside)).view(g.shape).to(g.dtype)

    def _own_state(self) -> dict[str, Any]:
        return {"basis": self._basis, "members": list(self._members), "steps": self._steps, "drawn": self._drawn}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        listed = self._parameters()
        wrong = [i for i in own["members"] if not 0 <= i < len(listed)]
        if own["basis"] is not None and not wrong:
            size = sum(listed[i].numel() for i in own["members"])
            check_shape("the basis of the subspace", own["basis"], (size, own["basis"].shape[-1]))
        elif wrong:
            raise ValueError(f"the state's subspace is of parameter {wrong[0]}, which there is not. Nothing is loaded.")

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self._basis, self._members = own["basis"], list(own["members"])
        self._steps, self._drawn = own["steps"], own["drawn"]


def coefficients(mode: Mode, ritz: RitzPairs, signs: Inertia, most: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns ``(k, ≤ most)``, in Ritz vectors, of the subspace of a mode."""
    k = len(ritz.values)
    eye = torch.eye(k, dtype=ritz.values.dtype)
    if mode == "null":
        return pair_spectrally(ritz.values, signs)[0][:, :most]
    if mode == "low_curvature":
        return eye[:, ritz.values.abs().argsort()[:most]]
    if mode == "negative_curvature":
        return eye[:, : min(signs.negative, most)]
    return random_basis(k, min(most, k), ritz.values, generator)
