"""Random rows of a least-squares problem: which of them a step takes, what each counts, and when they become more."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessopt.checks import check_count
from hessopt.closure.protocol import ClosureResult, LeastSquares
from hessopt.closure.result import kind_of
from hessopt.errors import ClosureError

RowClosure: TypeAlias = Callable[[Tensor], LeastSquares]
AnyClosure: TypeAlias = Callable[..., ClosureResult]
"""Of rows, or of no argument."""

FEWEST = 100
"""Rows of the first step, and the least that a size is chosen from."""
STALLED = 0.9
"""The subset grows unless the objective on all rows has fallen to this part of its least."""
SLOW, FAR = 1 / 3, 1e-2
"""Draws follow the residuals once the objective on all rows is more than the one part of its least of the looks before,
and more than the other part of what it was at first."""
MOST_SHARE = 1 / 4
"""Part of all rows, n / N, beyond which draws stay uniform."""
ROWS_FOR_ONE = 32
"""Where draws follow the residuals: rows evaluated for each row of a step, at most, as the residuals change."""
NO_BACKWARD = (
    "the closure called backward(), and with rows= the gradient is that of the rescaled residuals, which the optimizer "
    "differentiates itself. Leave zero_grad() and backward() out of the closure, and return hessopt.LeastSquares."
)


@dataclass(frozen=True)
class Rows:
    r"""Random rows: each step takes S of the N rows of a least-squares problem, and all of them in the end.

    The rows are in strata, such as the conditions of a boundary-value problem: stratum s has :math:`N_s` rows, of which
    :math:`S_s`, :math:`n_s = \lceil n N_s / N \rceil` in number, are drawn without replacement. The step's objective,

    .. math:: f_S = \tfrac12 \sum_s \frac{N_s}{n_s} \sum_{i \in S_s} r_i^2,

    has the expectation :math:`f = \frac12 \sum_i r_i^2`, and so have its gradient and its Gauss-Newton matrix.

    Rows are numbered 0 … N-1, stratum after stratum, and ``closure(rows)`` gets those of the step in ascending order.
    Draws depend on ``seed``, the number of the step and the optimizer's state: torch's global generator is not used,
    and a run that is resumed draws what the first one would have. When n reaches N, steps are those without ``rows``.

    *Draws by residuals.* A solution with steep parts, a shock, leaves most of the objective to a handful of rows, which
    uniform draws miss or exaggerate. With ``residuals=True``, no search asked for and n ≤ N/4 that is presumed
    where, at a look at all rows, the objective has not fallen to a third of its least of the looks before, and is still
    more than 1e-2 of the first step's. From then on row i is drawn with probability

    .. math:: \pi_i = \min\Big(1, \; c\, \Big(\frac{1}{2 N} + \frac{r_i^2}{2 \sum_j r_j^2}\Big)\Big),
        \quad \sum_i \pi_i = n,

    by systematic sampling in random order, and counts :math:`1/\pi_i`, so that the expectations above stay exact. The
    residuals are those of all rows after the last step, or after one of ⌈N / 32n⌉ steps; n grows by the least objective
    that was seen since the last decision. ``Damped()`` takes over from the line search, with its own λ to start from,
    and momentum is :math:`\mu = 1 - n/N`, which remembers about as many steps as see every row once.

    Args:
        counts: N, or the list of all :math:`N_s`; kept as a tuple.
        first: n to start with. Default: None, where the operations of a step are three times those of the gradient of
            the same rows, or 5e7 if that is more; 100 at least, and else N/2 at most, since other rows at every step
            lead past minima where all rows end. What a gradient takes is seen at the first step, which has 100 rows.
        growth: What n is multiplied by when the objective on all rows stops falling; 1: n stays. Default: 2.
        every: Steps from one evaluation of the objective on all rows to the next; n grows unless it is at most 0.9
            times the least one before. Each costs one evaluation of the loss on all rows, without its gradient, and
            there are none where n stays. Default: 10.
        seed: Of the draws, at least 0. Default: 0.
        residuals: Whether draws may come to follow the residuals. Default: False.

    Raises:
        ValueError: an option is out of range.
    """

    counts: int | Sequence[int]
    first: int | None = None
    growth: float = 2.0
    every: int = 10
    seed: int = 0
    residuals: bool = False

    def __post_init__(self) -> None:
        strata = tuple(self.counts) if isinstance(self.counts, Sequence) else (self.counts,)
        if not strata:
            raise ValueError("counts of rows must be a number or a list of at least one, got none.")
        for count in strata:
            check_count("a count of rows", count)
        object.__setattr__(self, "counts", strata)
        if self.first is not None:
            check_count("first", self.first)
        if not 1 <= self.growth < math.inf:
            raise ValueError(f"growth must be a finite number of at least 1, got {self.growth!r}.")
        check_count("every", self.every)
        check_count("seed", self.seed, 0)

    @property
    def strata(self) -> tuple[int, ...]:
        """The counts as they are kept."""
        return self.counts  # type: ignore[return-value]

    @property
    def total(self) -> int:
        """N."""
        return sum(self.strata)


class RowChoice:
    """The rows of every step, by what the optimizer's state says.

    In there are ``"step"``, steps so far, ``"subset"``, n, once it is known, ``"start"``, the first step's objective,
    ``"whole"``, the least objective on all rows that a decision was made by, and ``"lately"``, the least since then.
    Where draws follow the residuals there are ``"squares"``, the rows' squared residuals, ``(N,)``.

    Args:
        options: How they are drawn.
        adapts: Whether draws may come to follow the residuals.
    """

    def __init__(self, options: Rows, adapts: bool = False) -> None:
        self._options, self._adapts = options, adapts

    def size(self, state: dict[str, Any]) -> int:
        """This step's n."""
        first: int = state.get("subset", FEWEST if self._options.first is None else self._options.first)
        return min(first, self._options.total)

    def subset(self, closure: AnyClosure, state: dict[str, Any], device: torch.device) -> Subset:
        """The closure of this step's rows."""
        size, step = self.size(state), state.get("step", 0)
        scale: Tensor | None
        if self.follows(state) and size < self._options.total:
            rows, scale = draw_by_residuals(self._options, size, step, state["squares"])
        else:
            rows, scale = draw(self._options, size, step)
        return Subset(closure, rows.to(device), scale, self._options.total)

    def follows(self, state: dict[str, Any]) -> bool:
        """Whether draws follow the residuals."""
        return "squares" in state

    def momentum(self, state: dict[str, Any]) -> float:
        """μ of this step: ``1 − n/N`` where draws follow the residuals, else 0."""
        return 1 - self.size(state) / self._options.total if self.follows(state) else 0.0

    def settled(self, state: dict[str, Any]) -> bool:
        """Whether n is known, as it is after the first step."""
        return "subset" in state

    def settle(self, state: dict[str, Any], objective: Tensor, affordable: Callable[[int], bool]) -> None:
        """Choose n after the first step, unless it was given.

        Args:
            state: The optimizer's.
            objective: The first step's; read where draws may come to follow the residuals.
            affordable: Whether a step with so many rows costs no more than it may, true up to some number of rows.
        """
        if self.settled(state):
            return
        size = self.size(state)
        beyond = max(size, self._options.total // 2) + 1
        while self._options.first is None and beyond - size > 1:
            middle = (size + beyond) // 2
            size, beyond = (middle, beyond) if affordable(middle) else (size, middle)
        state["subset"] = size
        if self._adapts:
            state["start"] = float(objective)

    def whole(self, closure: AnyClosure, state: dict[str, Any], device: torch.device) -> Subset | None:
        """The closure of all rows, if the objective on them is to be evaluated after this step."""
        options, size = self._options, self.size(state)
        if options.growth == 1 or size == options.total:
            return None
        often = -(-options.total // (ROWS_FOR_ONE * size)) if self.follows(state) else options.every
        if state["step"] % often and state["step"] % options.every:
            return None
        return Subset(closure, torch.arange(options.total, device=device), None, options.total)

    def learn(self, state: dict[str, Any], objective: float, squares: Tensor) -> bool:
        """Decide about the draws from here on.

        Take more rows if the objective on all of them has stopped falling, but draw by the residuals first if that may
        be of use.

        Args:
            state: The optimizer's.
            objective: On all rows, after this step.
            squares: Squared residuals of all rows, ``(N,)``.

        Returns:
            Whether draws follow the residuals for the first time.
        """
        begins = False
        if self.follows(state):
            state["squares"] = squares
        objective = min(objective, state.pop("lately", math.inf))
        if state["step"] % self._options.every:
            state["lately"] = objective
            return False
        least: float = state.get("whole", math.inf)
        if self._adapts and not self.follows(state) and self.size(state) <= MOST_SHARE * self._options.total:
            start = state["start"]
            begins = not objective <= max(SLOW * min(least, start), FAR * start)
        if begins:
            state["squares"] = squares
        elif not objective <= STALLED * least:  # also where it is not a number
            state["subset"] = min(math.ceil(self._options.growth * self.size(state)), self._options.total)
        if objective < least:
            state["whole"] = objective
        return begins


class Subset:
    """A closure of no argument: that of some rows, whose residuals are rescaled.

    Args:
        closure: Of rows.
        rows: Their numbers, ``(n,)``.
        scale: ``√(N_s / n_s)``, or ``1 / √π_i``, of each, ``(n,)``; None for all rows.
        total: N.
    """

    def __init__(self, closure: AnyClosure, rows: Tensor, scale: Tensor | None, total: int) -> None:
        self._closure, self.rows, self._scale, self._total = closure, rows, scale, total
        self.squares: Tensor | None = None
        """Squared residuals of the last evaluation of all rows, ``(N,)``."""

    def __call__(self) -> LeastSquares:
        """The residuals of the rows, times their scales."""
        returned = self._closure(self.rows)
        if not isinstance(returned, LeastSquares):
            raise ClosureError(
                "with rows= the closure must return hessopt.LeastSquares(residuals) of the rows that it is given; it "
                f"returned {kind_of(returned)}. For another loss leave rows= out, and draw the batch yourself."
            )
        count, shape = len(self.rows), tuple(returned.residuals.shape)
        if shape[:1] == (self._total,) != (count,):
            raise ClosureError(
                f"the closure was asked for {count} rows and returned the residuals of all {self._total}: it ignores "
                "its argument. Index the data by it, `def closure(rows): return LeastSquares(residuals(x[rows]))`, or "
                "leave rows= out."
            )
        if shape[:1] != (count,):
            raise ClosureError(
                f"the closure was asked for {count} rows and returned residuals of shape {shape}. Return those of "
                f"these rows, in their order, in shape ({count},), or ({count}, k) where a row has k of them."
            )
        if self._scale is None:
            self.squares = returned.residuals.detach().reshape(count, -1).square().sum(dim=1)
            return returned
        scale = self._scale.to(returned.residuals)
        return LeastSquares(returned.residuals * scale.reshape(-1, *[1] * (len(shape) - 1)))


def draw(options: Rows, size: int, step: int) -> tuple[Tensor, Tensor | None]:
    """Numbers of the rows of a step, ascending, ``(n,)``, and ``√(N_s / n_s)`` of each; None where they are all rows.

    Args:
        options: Strata and seed.
        size: n, at most N.
        step: Steps before this one.
    """
    if size == options.total:
        return torch.arange(size), None
    generator = _generator(options, step)
    rows, scales, start = [], [], 0
    for count in options.strata:
        share = -(-size * count // options.total)
        rows.append(start + torch.randperm(count, generator=generator)[:share].sort().values)
        scales.append(torch.full((share,), math.sqrt(count / share), dtype=torch.float64))
        start += count
    return torch.cat(rows), torch.cat(scales)


def draw_by_residuals(options: Rows, size: int, step: int, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows of a step, ascending, ``(n,)``, and ``1 / √π_i`` of each.

    Args:
        options: Number of rows and seed.
        size: n, less than N.
        step: Steps before this one.
        squares: r², ``(N,)``. Where their sum is zero or not finite, chances are equal.
    """
    generator = _generator(options, step)
    chance = chances(squares.detach().cpu().double(), size)
    order = torch.randperm(len(chance), generator=generator)
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    rows = systematic(chance, order, start)
    return rows, chance[rows].rsqrt()


def chances(squares: Tensor, size: int) -> Tensor:
    """π, ``(N,)``, whose sum is n: in proportion to ``1/N + r_i²/Σr²``, but 1 at most."""
    total = squares.sum()
    share = squares / total if 0 < float(total) < math.inf else squares.new_full(squares.shape, 1 / len(squares))
    weight = 1 / len(squares) + share
    sure = torch.zeros_like(weight, dtype=torch.bool)
    while True:
        left = weight.masked_fill(sure, 0.0)
        chance = torch.where(sure, 1.0, (size - int(sure.sum())) * left / left.sum())
        more = ~sure & (chance >= 1)
        if not more.any():
            return chance
        sure |= more


def systematic(chance: Tensor, order: Tensor, start: float) -> Tensor:
    """Rows, ascending, of which each is drawn with its chance if the start is uniform on [0, 1).

    The chances are laid end to end, and those rows taken whose interval has one of the points start, start + 1, ….

    Args:
        chance: π, ``(N,)``, with an integer as sum.
        order: In which they are laid, ``(N,)``.
        start: Of the points.

    Source:
        Madow, "On the theory of systematic sampling, II" (1949).
    """
    sure = chance >= 1  # kept apart from the sums' rounding
    points = (chance.masked_fill(sure, 0.0)[order].cumsum(0) - start).ceil().clamp(min=0)  # so many before each end
    taken = points.diff(prepend=points.new_zeros(1)) > 0
    return torch.cat([order[taken], sure.nonzero().flatten()]).sort().values


def _generator(options: Rows, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((1_000_003 * options.seed + step) % 2**63)


def check_arguments(closure: AnyClosure, rows: Rows | None) -> None:
    """Raise a ClosureError unless the closure takes rows where there are some, and nothing where there are none."""
    try:
        signature = inspect.signature(closure)
    except (TypeError, ValueError):  # of some builtins: the call will tell
        return
    try:
        signature.bind(*(() if rows is None else (None,)))
    except TypeError:
        raise ClosureError(
            "the closure takes an argument, and none is given to it: rows are drawn where their number is known. Pass "
            "it, `BandedNewton(model, rows=N)`, or let the closure take no argument."
            if rows is None
            else "with rows= the closure takes one argument, the numbers of the rows to evaluate: `def closure(rows): "
            "return LeastSquares(residuals(x[rows]))`. Let it take them, or leave rows= out."
        ) from None
