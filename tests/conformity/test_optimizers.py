"""The checks that torch runs on its own optimizers, on ours.

The names are those of torch's ``test/test_optim.py``, which is not in the wheel; its entries (:class:`OptimizerInfo`,
inputs, error inputs) come with torch, and the checks themselves are written down here, in ``*_checks.py``. Where torch
computes the gradient and then calls ``step()``, ours get a closure (``step_requires_closure``, as LBFGS does), and its
raw tensors ``W x + b`` are those of a ``Linear``. A check that does not apply is in :data:`NOT_APPLICABLE`, with the
reason.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import optim_db

from diagnostics.errors import DiagnosticsError
from hessopt.errors import ClosureError, ModelError
from tests.conformity import closure_checks, direction_checks, hook_checks, state_checks  # they register themselves
from tests.conformity.checks import CHECKS, VARIANTS, assert_equal
from tests.conformity.optimizer_infos import SUBJECTS

assert closure_checks
assert direction_checks
assert hook_checks
assert state_checks

COUNTS: Counter[str] = Counter()

NO_FLAG = "no optimizer of ours has this flag, or claims the kernels behind it"

ONE_DEVICE = "needs two GPUs"

NO_SPARSE = "curvature of sparse gradients is refused"

IN_PARTS = "calls layers of a network that is never called itself, whose output the declared loss is of"

NO_COMPLEX = "complex parameters are refused: curvature of them is that of torch.view_as_real"

NOT_APPLICABLE: dict[str, str] = {
    "test_complex": NO_COMPLEX,
    "test_complex_2d": NO_COMPLEX,
    "test_forloop_goes_right_direction_multigpu": ONE_DEVICE,
    "test_mixed_device_dtype": ONE_DEVICE,
    "test_rosenbrock_sparse": NO_SPARSE,
    "test_set_default_dtype_works_with_foreach": NO_FLAG,
    "test_foreach_large_tensor": NO_FLAG,
    "test_peak_memory_foreach": NO_FLAG,
    "test_fused_matches_forloop": NO_FLAG,
    "test_fused_error_on_params_on_meta": NO_FLAG,
    "test_fused_large_tensor": NO_FLAG,
    "test_fused_does_not_step_if_foundinf": NO_FLAG,
    "test_fused_cpu_matches_cuda": NO_FLAG,
    "test_cpu_load_state_dict": NO_FLAG,
    "test_defaults_changed_to_foreach": NO_FLAG,
    "test_grad_scaling_autocast_fused_optimizers": NO_FLAG,
    "TestDifferentiableOptimizer": NO_FLAG,
}
"""Checks that apply to none of ours."""

NOT_FOR: dict[tuple[str, str], str] = {
    ("test_foreach_matches_forloop", name): NO_FLAG
    for name in (
        "NewtonCG",
        "NewtonCG(model=)",
        "BandedNewton",
        "KroneckerNewton",
        "KroneckerNewton(empirical)",
        "SpectralNewton",
        "SpectralNewton(declared)",
        "SpectralNewton(power law)",
        "SpectralNewton(power law, model=)",
    )
} | {("test_param_groups_lr", "SpectralNewton(declared)"): IN_PARTS}
"""Checks that do not apply to one of ours."""


@pytest.mark.parametrize("subject", SUBJECTS)
def test_complex_parameters_are_refused(subject: str, device: torch.device) -> None:
    """The reason for :data:`NO_COMPLEX`."""
    net = nn.Linear(2, 1, device=device, dtype=torch.complex64)
    before = copy.deepcopy(list(net.parameters()))
    x = torch.ones(1, 2, device=device, dtype=torch.complex64)
    with pytest.raises((ValueError, DiagnosticsError, ClosureError), match="complex"):
        SUBJECTS[subject].build(net.parameters(), net).step(lambda: net(x).abs().square().sum())
    assert_equal(before, list(net.parameters()))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_sparse_gradients_are_refused(subject: str, device: torch.device) -> None:
    """The reason for :data:`NO_SPARSE`."""
    net = nn.Embedding(4, 2, sparse=True, device=device)
    before = net.weight.detach().clone()
    with pytest.raises((DiagnosticsError, ModelError), match=r"(?i)sparse|plain torch\.nn\.Linear"):
        SUBJECTS[subject].build(net.parameters(), net).step(
            lambda: net(torch.tensor([1, 2], device=device)).square().sum()
        )
    assert torch.equal(before, net.weight)


CASES = [
    (check, subject, variant)
    for check in CHECKS
    for subject in SUBJECTS
    for variant in range(len(VARIANTS[check]))
    if (check, subject) not in NOT_FOR
]


def _id(case: tuple[str, str, int]) -> str:
    name, subject, variant = case
    values = ",".join(f"{k}={v}" for k, v in VARIANTS[name][variant].items())
    return f"{name}-{subject}" + (f"-{values}" if values else "")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_optimizer(case: tuple[str, str, int], device: torch.device) -> None:
    name, subject, variant = case
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # of SequentialLR, about its own use of a deprecated argument; of schedulers that start before the first step
        warnings.filterwarnings("ignore", "The epoch parameter in")
        CHECKS[name](SUBJECTS[subject], device, **VARIANTS[name][variant])
    COUNTS[device.type] += 1


def test_every_check_of_torchs_is_accounted_for() -> None:
    skipped = {
        decorator.test_name
        for info in optim_db
        for decorator in info.decorators
        if getattr(decorator, "cls_name", None) == "TestOptimRenewed" and decorator.test_name
    }
    known = {*CHECKS, *NOT_APPLICABLE, "test_step_pre_hook", "test_step_post_hook"}
    assert skipped <= known, skipped - known
    assert not set(CHECKS) & set(NOT_APPLICABLE)
    assert {name for name, _ in NOT_FOR} <= set(CHECKS)
    assert {subject for _, subject in NOT_FOR} <= set(SUBJECTS)
    assert {*direction_checks.SCHEDULERS, "LRScheduler"} == {*lr_scheduler.__all__, "SWALR"}


def test_counts(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> None:
    """Runs last: what ran has passed. The figures are in the report of ``--junitxml``, and shown by ``-s``."""
    selected = [item for item in request.session.items if item.name.startswith("test_optimizer[")]
    ran = sum(COUNTS.values())
    counts = {
        "checks": len(CHECKS),
        "runs": len(selected),
        "passed": ran,
        "not applicable": len(NOT_APPLICABLE) * len(SUBJECTS) + len(NOT_FOR),
    }
    for name, count in counts.items():
        record_property(name, count)
    print(counts)
    assert ran <= len(selected)
