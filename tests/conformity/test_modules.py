"""Every module that PyTorch itself tests (``module_db``) against double back-propagation."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

import diagnostics
from tests.helpers.oracle import check_against_double_backprop

TOLERANCE = 1e-11
TOLERANCES = {
    "nn.BCELoss": 1e-9
}  # PyTorch's own second derivative of it is not symmetric: each pass has its own epsilon
FAST, SLOW = 420, 4200
"""Largest number of rows (entries of all nodes) that the oracle differentiates one by one."""
SAMPLES = 6
"""Inputs of each module and mode in the fast part, evenly spaced over the list; the slow part takes all."""

TOO_LARGE = "larger than the oracle can check"
EMPTY = "empty batch"
NO_SECOND_DERIVATIVE = "no second derivative in PyTorch"
NOT_FINITE = "output is not finite"

NOT_APPLICABLE = {
    EMPTY: {"nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d", "nn.LayerNorm", "nn.RMSNorm", "nn.GroupNorm"},
    # chunked computation keeps the gradient that its forward computed, so double back-propagation takes it for a
    # constant; the two margin losses and CTC have none: "derivative for aten::multi_margin_loss_backward is not
    # implemented"
    NO_SECOND_DERIVATIVE: {"nn.LinearCrossEntropyLoss", "nn.MultiMarginLoss", "nn.MultiLabelMarginLoss", "nn.CTCLoss"},
    # roots and logarithms of negative numbers; a mean over labels that are all ignored
    NOT_FINITE: {"nn.LPPool1d", "nn.LPPool2d", "nn.LPPool3d", "nn.KLDivLoss", "nn.CrossEntropyLoss"},
}
"""Which modules have inputs that cannot be checked, and why; every other input of every module must pass."""

TRIM = {
    "nn.BatchNorm2d": 3, "nn.BatchNorm3d": 2, "nn.InstanceNorm2d": 3, "nn.InstanceNorm3d": 2,
    "nn.Conv3d": 3, "nn.LazyConv3d": 3, "nn.ConvTranspose3d": 1, "nn.LazyConvTranspose3d": 1,
}  # fmt: skip
"""Length to which spatial dimensions are cut in the fast part, which would leave these modules out otherwise."""


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Between(nn.Module):
    """A module between curved stages: each of its floating-point inputs is computed from a node of its own."""

    def __init__(self, module: nn.Module, arguments: Any, first_only: bool) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = tree_flatten(arguments)
        floating = [i for i, t in enumerate(self.leaves) if _is_finite(t)]
        self.stages = {i: f"enter{i}" for i in (floating[:1] if first_only else floating)}
        for name in self.stages.values():
            self.add_module(name, Scale())

    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors of the arguments; those without dimensions get one, as a batch needs it."""
        return tuple(t.reshape(1) if t.ndim == 0 else t for t in self.leaves if isinstance(t, Tensor))

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        leaves = [next(given).reshape(t.shape) if isinstance(t, Tensor) else t for t in self.leaves]
        for i, name in self.stages.items():
            entered = self.get_submodule(name)(leaves[i])
            leaves[i] = entered + 0.05 * torch.sin(1.3 * entered)
        args, kwargs = tree_unflatten(leaves, self.spec)
        return tree_map(lambda z: z + 0.3 * torch.sin(1.7 * z) if _is_floating(z) else z, self.module(*args, **kwargs))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_finite(value: Any) -> bool:
    return _is_floating(value) and bool(torch.isfinite(value).all())  # a mask of -inf is no input


def _loss(z: Any) -> Tensor:
    return sum((torch.sin(t) * t).sum() for t in tree_flatten(z)[0] if _is_floating(t))


def _chosen(name: str, _module: nn.Module) -> bool:
    return name == "module" or name.startswith("enter")


def _models(info: ModuleInfo, trim: bool) -> Iterator[tuple[str, Between]]:
    for training in (False, True) if info.train_and_eval_differ else (True,):
        torch.manual_seed(0)
        listed: list[ModuleInput] = info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
        )
        for given in listed:
            if given.forward_input is None:
                continue
            construct = given.constructor_input
            module = info.module_cls(*construct.args, **construct.kwargs).double().train(training)
            arguments = tuple(given.forward_input.args), dict(given.forward_input.kwargs)
            arguments = tree_map_only(Tensor, _without_nan, arguments)
            if trim and info.name in TRIM:
                arguments = tree_map_only(Tensor, functools.partial(_trimmed, info.name), arguments)
            if isinstance(module, nn.modules.lazy.LazyModuleMixin):
                module(*arguments[0], **arguments[1])
            # of losses, the targets stay as they are: PyTorch has no derivative by some of them
            yield f"training={training}", Between(module, arguments, info.name.endswith("Loss"))


def _without_nan(value: Tensor) -> Tensor:
    """Some inputs are logarithms of negative numbers; masks of -inf stay."""
    return value.nan_to_num(0.3, torch.inf, -torch.inf) if value.is_floating_point() else value


def _trimmed(name: str, value: Tensor) -> Tensor:
    spatial = int(name[-2])
    return value[(..., *[slice(TRIM[name])] * spatial)] if value.ndim > spatial else value


@functools.cache
def tally(info: ModuleInfo, slow: bool) -> Counter[str]:
    """Check the inputs of a module and count them by outcome."""
    outcomes: Counter[str] = Counter()
    modes: dict[str, list[Between]] = {}
    for mode, model in _models(info, trim=not slow):
        modes.setdefault(mode, []).append(model)
    for models in modes.values():
        step = 1 if slow else -(-len(models) // SAMPLES)
        for model in models[::step]:
            outcomes[_outcome(model, SLOW if slow else FAST, TOLERANCES.get(info.name, TOLERANCE))] += 1
    return outcomes


def _outcome(model: Between, limit: int, tolerance: float) -> str:
    inputs = model.inputs()
    if inputs[0].shape[0] == 0:
        with pytest.raises(diagnostics.CaptureError, match="batch is empty"):
            diagnostics.capture(model, inputs, _loss, _chosen)
        return EMPTY
    entries = sum(model.leaves[i].numel() for i in model.stages)
    if entries > limit:
        return TOO_LARGE
    state = torch.get_rng_state()
    with torch.no_grad():
        z = [t for t in tree_flatten(model(*inputs))[0] if _is_floating(t)]
    torch.set_rng_state(state)
    if entries + 2 * sum(t.numel() for t in z) > limit:
        return TOO_LARGE
    if not all(_is_finite(t) for t in z):
        with pytest.raises(diagnostics.CaptureError, match=r"the loss is (nan|-?inf)"):
            diagnostics.capture(model, inputs, _loss, _chosen)
        return NOT_FINITE
    if not _has_second_derivative(model, inputs):
        _check_refused_rightly(model, inputs)
        return NO_SECOND_DERIVATIVE
    graph = check_against_double_backprop(model, inputs, _loss, _chosen, tolerance)
    return "exact, joint form" if graph.coupled else "exact, per sample"


def _has_second_derivative(model: Between, inputs: tuple[Any, ...]) -> bool:
    try:
        diagnostics.hessian_blocks(diagnostics.capture(model, inputs, _loss, _chosen))
    except diagnostics.DiagnosticsError as error:
        if "cannot be differentiated twice" in str(error):
            return False
        raise
    return True


def _check_refused_rightly(model: Between, inputs: tuple[Any, ...]) -> None:
    """PyTorch has no second derivative by the parameters either, or not the one by central differences."""
    parameters = list(model.parameters())
    state = torch.get_rng_state()

    def slopes(create_graph: bool = False) -> list[Tensor]:
        torch.set_rng_state(state)
        loss = _loss(model(*inputs))
        found = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    try:
        total = torch.stack([g.sum() for g in slopes(create_graph=True)]).sum()
        products = torch.autograd.grad(total, parameters, allow_unused=True)
    except RuntimeError:
        return
    step, sides = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            torch._foreach_add_(parameters, sign * step)
            with torch.enable_grad():
                sides.append(slopes())
        torch._foreach_add_(parameters, step)
    differences = [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]
    known = [torch.zeros_like(p) if h is None else h for h, p in zip(products, parameters, strict=True)]
    assert not all(torch.allclose(h, d, rtol=1e-2, atol=1e-8) for h, d in zip(known, differences, strict=True))


def _check(info: ModuleInfo, slow: bool) -> None:
    outcomes = tally(info, slow)
    assert outcomes, "no inputs"
    for reason, modules in NOT_APPLICABLE.items():
        assert not outcomes[reason] or info.name in modules
    exact = sum(count for outcome, count in outcomes.items() if outcome.startswith("exact"))
    never = NOT_APPLICABLE[NO_SECOND_DERIVATIVE] - {"nn.LinearCrossEntropyLoss"}
    assert exact or info.name in never or (not slow and set(outcomes) == {TOO_LARGE})


ENTRIES = pytest.mark.parametrize("info", module_db, ids=[info.name for info in module_db])
OWN_WARNINGS = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True:UserWarning",
    "ignore:linear_cross_entropy. ``options`` ignored:UserWarning",
    "ignore:reduction. .mean. divides the total loss:UserWarning",
)


@OWN_WARNINGS
@ENTRIES
def test_blocks_of_a_module_equal_double_backpropagation(info: ModuleInfo) -> None:
    _check(info, slow=False)


@pytest.mark.slow
@OWN_WARNINGS
@ENTRIES
def test_blocks_of_a_module_equal_double_backpropagation_for_all_inputs(info: ModuleInfo) -> None:
    _check(info, slow=True)


def _report(slow: bool) -> None:
    outcomes = {info.name: tally(info, slow) for info in module_db}
    columns = ["exact, per sample", "exact, joint form", *NOT_APPLICABLE, TOO_LARGE]
    total = sum(outcomes.values(), Counter())
    print("", " | ".join(["module", *columns]), sep="\n")
    for name, counts in [*outcomes.items(), ("all", total)]:
        print(" | ".join([name, *(str(counts[column] or "") for column in columns)]))
    assert set(total) <= set(columns)


@OWN_WARNINGS
def test_the_table_of_outcomes_is_complete() -> None:
    """Print how many inputs of each module were tried, with the reasons: ``pytest -s -k table``."""
    _report(slow=False)


@pytest.mark.slow
@OWN_WARNINGS
def test_the_table_of_outcomes_is_complete_for_all_inputs() -> None:
    _report(slow=True)
