"""NewtonCG on the test functions of Moré, Garbow and Hillstrom, beside scipy's Newton methods and torch's LBFGS.

All start at the paper's points, in float64, and stop at the first gradient that they compute with
``‖g‖ ≤ 1e-8 max(1, ‖g₀‖)``, or beyond the budget. Work is counted alike for all, in gradient-equivalents: a gradient
is 1, a value alone 1/3, a product with the Hessian 2 (for NewtonCG on residuals also products with its parts, see
``hessopt.closure.step_curvature.COST``). Values and gradients at the same point are shared. All methods have their
default options, except that no radius is bounded and no tolerance but the one above stops. Where the first gradient is
large (Meyer, Powell badly scaled), the criterion is met well above the minimum.

    python -m examples.benchmarks.optimizers_on_test_functions [--budget 5000] [--only Rosenbrock] [--csv table.csv]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from examples.shared.test_functions import PROBLEMS, Problem
from hessopt.closure.protocol import LeastSquares
from hessopt.closure.step_curvature import COST, TRIAL_COST
from hessopt.newton_cg.optimizer import NewtonCG

Array = npt.NDArray[np.float64]


@dataclass
class Run:
    """One method on one function.

    Attributes:
        function: Its name.
        n: Its dimension.
        method: The optimizer's name.
        iterations: Steps, also rejected ones.
        gradients: Of the function.
        products: With its Hessian (or the parts of it).
        work: Gradient-equivalents.
        f: The value at the last gradient.
        g: The last gradient's norm.
        solved: It is small enough.
        end: Which published minimum has that value: "lowest", "local", "saddle" (published as a minimum, and none) or
            "none", if solved; or why the method gave up.
    """

    function: str
    n: int
    method: str
    iterations: int = 0
    gradients: int = 0
    products: int = 0
    work: float = 0.0
    f: float = float("nan")
    g: float = float("nan")
    solved: bool = False
    end: str = "budget spent"


class Stop(Exception):
    """The gradient is small enough, or the budget is spent."""


class Oracle:
    """f, its gradient and its products with the Hessian at the last point, counted, for one run."""

    def __init__(self, problem: Problem, run: Run, tolerance: float, budget: float) -> None:
        self.problem, self.run, self.tolerance, self.budget = problem, run, tolerance, budget
        self._x: Tensor | None = None
        self._g: Tensor | None = None

    def value(self, x: Array) -> float:
        self._go_to(x)
        return self._f.item()

    def gradient(self, x: Array) -> Array:
        assert self._go_to(x) is not None
        if self._g is None:
            (self._g,) = torch.autograd.grad(self._f, self._at, create_graph=True)
            self.run.gradients += 1
            self.run.work += 1 - TRIAL_COST
            observe(self.run, self._f.item(), self._g.norm().item(), self.tolerance, self.budget)
        return self._g.detach().numpy()

    def product(self, x: Array, v: Array) -> Array:
        self.gradient(x)
        assert self._g is not None
        self.run.products += 1
        self.run.work += COST["hessian"]
        if self.run.work > self.budget:
            raise Stop
        (product,) = torch.autograd.grad(self._g, self._at, torch.from_numpy(v), retain_graph=True)
        return product.numpy()

    def _go_to(self, x: Array) -> Tensor:
        point = torch.from_numpy(np.array(x, dtype=np.float64))
        if self._x is None or not torch.equal(point, self._x):
            self._x, self._g, self._at = point, None, point.clone().requires_grad_()
            self._f = self.problem(self._at)
            self.run.work += TRIAL_COST
        return self._x


def observe(run: Run, f: float, g: float, tolerance: float, budget: float) -> None:
    run.f, run.g, run.solved = f, g, g <= tolerance
    if run.solved or run.work > budget:
        raise Stop


Method = Callable[[Problem, Run, float, float], None]


def newton_cg(on_residuals: bool) -> Method:
    def method(problem: Problem, run: Run, tolerance: float, budget: float) -> None:
        x = problem.x0().requires_grad_()
        optimizer = NewtonCG([x], curvature="auto" if on_residuals else "hessian")

        def closure() -> Tensor | LeastSquares:
            return LeastSquares(2**0.5 * problem.residuals(x)) if on_residuals else problem(x)

        while True:
            optimizer.step(closure)
            step = optimizer.last_step
            assert step is not None
            run.gradients += 1
            run.work += 1
            # The step after the last gradient is not part of the solution.
            observe(run, step.loss, step.gradient_norm, tolerance, budget)
            run.iterations += 1
            run.products += sum(step.products.values())
            run.work += step.gradient_equivalents - 1

    return method


def scipy_method(name: Literal["trust-ncg", "trust-krylov", "Newton-CG"], **options: float) -> Method:
    settings: Any = {"maxiter": 10**9, **options}

    def method(problem: Problem, run: Run, tolerance: float, budget: float) -> None:
        oracle = Oracle(problem, run, tolerance, budget)

        def count(xk: Array) -> None:
            run.iterations += 1

        result = minimize(
            oracle.value,
            problem.x0().numpy(),
            method=name,
            jac=oracle.gradient,
            hessp=oracle.product,
            callback=count,
            options=settings,
        )
        run.end = result.message  # it gave up

    return method


def lbfgs(problem: Problem, run: Run, tolerance: float, budget: float) -> None:
    x = problem.x0().requires_grad_()
    # One call of step() for all iterations, as each evaluates its start again; max_eval also bounds each line search.
    optimizer = torch.optim.LBFGS(
        [x], line_search_fn="strong_wolfe", max_iter=10**9, max_eval=10**9, tolerance_grad=0, tolerance_change=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem(x)
        loss.backward()
        assert x.grad is not None
        run.gradients += 1
        run.work += 1
        observe(run, loss.item(), x.grad.norm().item(), tolerance, budget)
        return loss

    try:
        optimizer.step(closure)
    finally:
        run.iterations = optimizer.state[x].get("n_iter", 0)
    run.end = "no further progress"


METHODS: dict[str, Method] = {
    "NewtonCG": newton_cg(on_residuals=False),
    "NewtonCG, residuals": newton_cg(on_residuals=True),
    "trust-ncg": scipy_method("trust-ncg", gtol=0.0, max_trust_radius=1e10),
    "trust-krylov": scipy_method("trust-krylov", gtol=0.0, max_trust_radius=1e10),
    "Newton-CG": scipy_method("Newton-CG", xtol=0.0),
    "LBFGS": lbfgs,
}
OURS = [name for name in METHODS if name.startswith("NewtonCG")]


def solve(problem: Problem, method: str, budget: float) -> Run:
    run = Run(problem.name, problem.dimension, method)
    x0 = problem.x0().requires_grad_()
    (g0,) = torch.autograd.grad(problem(x0), x0)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of scipy, about precision: the table shows what came of it
            METHODS[method](problem, run, 1e-8 * max(1.0, g0.norm().item()), budget)
    except Stop:
        pass
    if run.solved:
        run.end = which_minimum(problem, run.f)
    return run


def which_minimum(problem: Problem, f: float) -> str:
    slack = 1e-7 * max(1.0, problem(problem.x0()).item())
    for i, minimum in enumerate(problem.minima):
        if abs(f - minimum.value) <= 1e-4 * abs(minimum.value) + slack:
            return "saddle" if minimum.saddle else "lowest" if i == 0 else "local"
    return "none"


def table(runs: Sequence[Run]) -> str:
    head = f"{'function':27} {'n':>3} {'method':20}"
    lines = [f"{head} {'iter':>5} {'grad':>5} {'prod':>6} {'work':>7} {'f':>12} {'‖g‖':>8}  solved, at which minimum"]
    for i, r in enumerate(runs):
        first = i == 0 or runs[i - 1].function != r.function
        head = f"{r.function:27} {r.n:3}" if first else " " * 31
        counts = f"{r.iterations:5} {r.gradients:5} {r.products:6} {r.work:7.0f}"
        end = f"yes, {r.end}" if r.solved else f"NO: {r.end}"
        lines.append(f"{head} {r.method:20} {counts} {r.f:12.5e} {r.g:8.1e}  {end}")
    return "\n".join(lines)


def summary(runs: Sequence[Run]) -> str:
    by_method = {name: {r.function: r for r in runs if r.method == name} for name in METHODS}
    functions = list(dict.fromkeys(r.function for r in runs))
    lines = [f"Solved, of {len(functions)}; medians of the ratios to NewtonCG over functions that both solved"]
    lines.append(f"{'method':20} {'solved':>6} {'lowest':>6} {'products':>9} {'work':>6} {'less work on':>13}")
    for name, own in by_method.items():
        solved = [f for f in functions if own[f].solved]
        lowest = sum(own[f].end == "lowest" for f in solved)
        pairs = [(own[f], by_method["NewtonCG"][f]) for f in solved if by_method["NewtonCG"][f].solved]
        products = [a.products / b.products for a, b in pairs if b.products]
        work = [a.work / b.work for a, b in pairs]
        less = sum(ratio < 1 for ratio in work)
        shown = f"{statistics.median(products):9.2f}" if products and name != "LBFGS" else f"{'-':>9}"
        ratio = f"{statistics.median(work):6.2f}" if work else f"{'-':>6}"
        lines.append(f"{name:20} {len(solved):6} {lowest:6} {shown} {ratio} {less:6} of {len(work)}")
    for ours in OURS:
        lost = [
            f"{f} ({', '.join(names)})"
            for f in functions
            if not by_method[ours][f].solved and (names := [m for m in METHODS if by_method[m][f].solved])
        ]
        unsolved = [f for f in functions if not any(own[f].solved for own in by_method.values())]
        lines.append(f"Solved by others, not by {ours}: {'; '.join(lost) or 'none'}")
    lines.append(f"Solved by none: {'; '.join(unsolved) or 'none'}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=5000, help="gradient-equivalents of a run")
    parser.add_argument("--only", nargs="*", help="functions whose name contains one of these")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--csv", help="write the table there as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    problems = [p for p in PROBLEMS if not options.only or any(part in p.name for part in options.only)]
    pairs = [(problem, method) for problem in problems for method in options.methods]
    runs = [solve(problem, method, options.budget) for problem, method in tqdm(pairs, disable=None, leave=False)]
    print(table(runs))
    if options.methods == list(METHODS):
        print(f"\n{summary(runs)}")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(runs[0])))
            writer.writeheader()
            writer.writerows(map(asdict, runs))
    return runs


if __name__ == "__main__":
    main()
