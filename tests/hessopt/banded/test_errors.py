"""What BandedNewton refuses, and what it says then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from hessopt import AutoBandwidth, BandedNewton, Damped, Fixed, LineSearch
from hessopt.errors import ClosureError, ModelError, NotConvexError
from tests.helpers.kronecker_reference import (
    Dag,
    batch,
    chain,
    closure_of,
    flat,
    regression,
    trained,
)

RTOL = 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "lanczos"}, "space must be one of .*got 'lanczos'"),
        ({"space": "lanczos", "curvature": "hessian"}, "space must be one of .*got 'lanczos'"),
        ({"space": "sample", "curvature": "hessian"}, 'pass space="parameter"'),
        ({"bandwidth": -1}, 'integer of at least 0 or "full", got -1'),
        ({"bandwidth": 1.5}, 'integer of at least 0 or "full", got 1.5'),
        ({"curvature": "fisher"}, 'curvature must be one of "ggn", "hessian", got \'fisher\''),
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"memory_limit": 0}, "memory_limit must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BandedNewton(chain(), **options)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (AutoBandwidth, {"rule": "best"}, "rule must be one of .*got 'best'"),
        (AutoBandwidth, {"every": 0}, "every must be an integer of at least 1, got 0"),
        (AutoBandwidth, {"cost": "guessed"}, "cost must be one of .*got 'guessed'"),
        (AutoBandwidth, {"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        (AutoBandwidth, {"rule": "radius", "cost": "model"}, "asks for no cost"),
        *((rule, {"damping": value}, "damping must lie in") for rule in (Damped, LineSearch) for value in (0.0, -1.0)),
        (Fixed, {"damping": 0.0}, "damping must lie in"),
        (Fixed, {"damping": 1e11}, "damping must lie in"),
        (Damped, {"minimum": 1.0, "maximum": 0.1}, "damping bounds"),
        (LineSearch, {"minimum": 1.0, "maximum": 0.1}, "damping bounds"),
        (Damped, {"max_rejections": 0}, "max_rejections must be an integer of at least 1, got 0"),
    ],
)
def test_bad_rules(rule: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**options)


def test_a_rule_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"search must be a hessopt.Damped or hessopt.LineSearch or .*, got float"):
        BandedNewton(chain(), search=1e-2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="factors"):
        BandedNewton(chain(), factors="kronecker")  # type: ignore[call-arg]


def test_missing_or_wrong_network() -> None:
    net, other = chain(), chain(seed=1)
    with pytest.raises(TypeError, match=r"needs the network itself.*BandedNewton\(model.parameters\(\), model=model\)"):
        BandedNewton(net.parameters())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        BandedNewton(net.parameters(), model=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two different networks"):
        BandedNewton(net, model=other)
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0, of shape \(3, 2\), is not a parameter of the network"
    ):
        BandedNewton(other.parameters(), model=net)
    with pytest.raises(ValueError, match="empty parameter list"):
        BandedNewton([], model=net)


def test_bad_groups_are_not_kept() -> None:
    net, other = chain(), chain(seed=1)
    optimizer = BandedNewton(net.layers[:2].parameters(), model=net)
    for group, message in [
        ({"params": net.layers[2].parameters(), "maximize": True}, "maximize must be the same in all param groups"),
        ({"params": net.layers[2].parameters(), "lr": -1.0}, "lr must be"),
        ({"params": other.parameters()}, "of group 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda net, z: -z.square().mean(), NotConvexError, "not convex in the network's output"),
        (lambda net, z: z.square().mean().sqrt(), ModelError, "not a sum or mean over samples"),
        (lambda net, z: z.square().mean() + net.layers[0].weight.sum(), ModelError, "weight_decay for an L2 penalty"),
        (lambda net, z: z.square().mean().item(), ClosureError, "returned the number"),
        (lambda net, z: z.square().mean() * float("nan"), ClosureError, "loss is nan"),
        (lambda net, z: None, ClosureError, "returned None"),
        (lambda net, z: z.square(), ClosureError, r"shape \(6, 2\)"),
        (lambda net, z: (z.sum().square(), z.sum()), ModelError, r"output .* has shape \(\)"),
        (
            lambda net, z: (z - z).sum().sqrt() + z.square().mean(),
            ClosureError,
            "the gradient of parameter 0, .* is not finite",
        ),
    ],
)
def test_closures_that_cannot_be_treated(make: Callable[[Dag, Tensor], Any], error: type, message: str) -> None:
    net, x = chain(), batch()[0]
    before = flat(trained(net)).detach().clone()
    with pytest.raises(error, match=message):
        BandedNewton(net).step(lambda: make(net, net(x)))
    assert torch.equal(flat(trained(net)), before)


def test_maximizing_what_is_not_concave() -> None:
    net = chain()
    with pytest.raises(NotConvexError, match=r"maximize=True the loss must be concave"):
        BandedNewton(net, maximize=True).step(closure_of(net, "mse"))
    with pytest.raises(NotConvexError, match="a sum of squares is not concave"):
        BandedNewton(net, maximize=True).step(closure_of(net, "least squares"))


def test_step_without_closure() -> None:
    net, closure = regression()
    closure().backward()
    with pytest.raises(
        ClosureError, match=r"step\(\) needs a closure.*optimizer.step\(lambda: loss_fn\(model\(x\), y\)\)"
    ):
        BandedNewton(net).step()


def test_memory_limit() -> None:
    net, closure = regression()
    with pytest.raises(MemoryBudgetError, match="raise memory_limit"):
        BandedNewton(net, memory_limit=1000).step(closure)
