"""One call that diagnoses a network: every section of the report, exact or estimated by size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diagnostics.autograd.refusals import at_most_positional, check_loss_fn, check_model
from diagnostics.autograd.trees import tensors
from diagnostics.errors import DiagnosticsError, SectionFailedWarning
from diagnostics.graph.selection import Selection
from diagnostics.report.bound_section import bounds
from diagnostics.report.budget import Budget
from diagnostics.report.checkpoints import loaded
from diagnostics.report.interrupted import DiagnosisInterrupted
from diagnostics.report.node_sections import network, pair_metrics, sources
from diagnostics.report.parameter_sections import parameters, spectrum
from diagnostics.report.partial import Partial, identity
from diagnostics.report.report import SCHEMA, Report
from diagnostics.report.run import Run
from diagnostics.report.settings import DiagnosisSettings
from diagnostics.report.workbench import Workbench

SECTIONS: dict[str, Callable[[Workbench], dict[str, Any]]] = {
    "network": network,
    "metrics": pair_metrics,
    "sources": sources,
    "bounds": bounds,
    "spectrum": spectrum,
    "parameters": parameters,
}
_SETTINGS = DiagnosisSettings()


@at_most_positional(3, "pass one batch as a pair, diagnose(model, (inputs, targets), loss_fn), options by name.")
def diagnose(
    model: nn.Module,
    batches: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    nodes: Selection = None,
    exact: bool | Literal["auto"] | None = None,
    seconds: float | None = None,
    sections: Iterable[str] | None = None,
    settings: DiagnosisSettings = _SETTINGS,
    checkpoint: str | os.PathLike[str] | None = None,
    name: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Report:
    """Everything about the curvature of a network in one report, with verdicts in plain words.

    Sections:

    - ``network``: nodes, shapes, parents, parameters.
    - ``metrics``: R, C, D and Gap (:func:`diagnostics.metrics`) of all pairs of nodes, and by distance.
    - ``sources``: which node's nonlinearity makes the tensor part and the negative curvature
      (:func:`diagnostics.curvature_sources`).
    - ``bounds``: bottlenecks; where exact, also ρ, Lyapunov exponents, bounds on resonance and rank.
    - ``spectrum``: extreme eigenvalues, trace, m⁻ and density of the parameters' Hessian, its Gauss-Newton and its
      tensor part.
    - ``parameters``: the same metrics for the parameters of each node, and the share of ``‖H‖_F²`` that a
      block-diagonal or banded approximation discards (:func:`diagnostics.discarded_share`).

    Sections about nodes are of the first batch, those about parameters of all batches. Blocks between nodes are
    computed exactly if they fit into the memory limit and take at most 2e10 multiplications, and are estimated with
    standard errors otherwise; the parameters' Hessian is formed up to 2000 parameters. ``report.data["plan"]`` says
    which and why. Verdicts follow by the rules of docs/verdicts.md from the figures in the report.

    A section that fails by an error of this package (:class:`DiagnosticsError`) or a numerical one
    (``ArithmeticError``, ``LinAlgError``), lacks a derivative of an operation (``NotImplementedError``) or runs out of
    memory is left out of the report, with its error as ``report.failures[section]`` and a
    :class:`SectionFailedWarning`; verdicts that need it are silent. Any other error is raised.

    The model runs in the mode it is in. Parameters, buffers, ``.grad``, modes and the global random state are left as
    found; dropout masks and the order of shuffled data follow from ``settings.seed``.

    Args:
        model: The network; eager, in float32 or float64.
        batches: One batch as a tuple ``(inputs, targets)``, or a list, ``DataLoader`` or other source of such pairs
            that can be read again and again.
        loss_fn: ``loss_fn(z, targets) -> scalar``, the mean over the batch.
        nodes: As in :func:`diagnostics.capture`. None: the layers of the model; for an estimate of more than six, the
            stages (``Sequential`` children) that hold them, and 12 evenly spaced ones at most.
        exact: None or ``"auto"``: by size. True: exact blocks between nodes. False: estimates of everything.
        seconds: Wall time to aim at. Sections then run in the order of what they tell (network, metrics, spectrum,
            parameters, sources, bounds). Before each one its time is predicted from that of one product; one that does
            not fit is shortened (fewer probes or products: ``report.data["shortened"]``), or else left out
            (``report.data["skipped"]``). One that has begun is finished, and predictions are off by small factors.
            None: no limit.
        sections: Names of sections; None: all.
        settings: Numbers of probes, seed, ε and the memory limit.
        checkpoint: A ``state_dict`` saved by ``torch.save``, which the model has during this call.
        name: What to call the report; None: the checkpoint's file name, or the model's class.
        resume: A file (or a folder for it) in which finished sections are kept. A run that was interrupted continues
            from there, with the figures of an uninterrupted one. Sections that failed or had no time are run again,
            those that ``seconds`` shortened are kept.
        progress: Show a bar over sections, on a terminal only.

    Returns:
        The :class:`diagnostics.Report`: it prints, and has ``save``, ``to_dict``, ``verdicts``.

    Raises:
        CaptureError: the model cannot be captured; the message names the module and the way out.
        DiagnosticsError: batches, checkpoint or resume file do not fit; an unknown section.
        DiagnosisInterrupted: Ctrl-C once a section is finished; a ``KeyboardInterrupt`` with those as ``report``.
        MemoryBudgetError: ``exact=True``, and blocks take more than ``settings.memory_limit``.
        ValueError: an argument is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if exact not in (None, "auto", True, False):
        raise ValueError(f'exact must be None, "auto", True or False, got {exact!r}.')
    wanted = wanted_sections(sections)
    budget = Budget(seconds)
    check_loss_fn(loss_fn, "z", "targets")
    check_model(model)
    with loaded(model, checkpoint):
        bench = Workbench(model, batches, loss_fn, settings, nodes, exact if isinstance(exact, bool) else None)
        header = _header(bench, name or _name(model, checkpoint), seconds)
        run = Run(bench, header, Partial(resume, identity(bench)), budget)
        try:
            run.sections({section: SECTIONS[section] for section in wanted}, progress)
        except KeyboardInterrupt:
            if not run.begun:
                raise
            raise DiagnosisInterrupted(run.report()) from None
        report = run.report()
    if report.failures:
        failed = "; ".join(f"{section}: {why}" for section, why in report.failures.items())
        warnings.warn(f"sections failed and are not in the report: {failed}", SectionFailedWarning, stacklevel=2)
    return report


def wanted_sections(sections: Iterable[str] | None) -> list[str]:
    """Names of sections in their order, ``network`` always among them; None: all.

    Raises:
        DiagnosticsError: one is unknown.
    """
    asked = list(SECTIONS) if sections is None else [sections] if isinstance(sections, str) else list(sections)
    unknown = [section for section in asked if section not in SECTIONS]
    if unknown or not asked:
        raise DiagnosticsError(f"sections must be some of {', '.join(SECTIONS)}, got {asked}.")
    return [section for section in SECTIONS if section in asked or section == "network"]


def _name(model: nn.Module, checkpoint: str | os.PathLike[str] | None) -> str:
    return type(model).__name__ if checkpoint is None else os.path.basename(os.fspath(checkpoint))


def _header(bench: Workbench, name: str, seconds: float | None) -> dict[str, Any]:
    model, graph = bench.model, bench.graph
    parameters = list(model.parameters())
    return {
        "schema": SCHEMA,
        "name": name,
        "torch": torch.__version__,
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "dtype": str(graph.loss.dtype).removeprefix("torch."),
            "device": str(graph.loss.device),
            "training": model.training,
        },
        "data": {
            "batches": 1 if bench.batches.single else bench.batches.count(),
            "batch_size": graph.batch_size,
            "inputs": [list(t.shape) for t in tensors(bench.batch.inputs)],
        },
        "options": {
            "seed": bench.settings.seed,
            "probes": bench.probes,
            "epsilon": bench.settings.epsilon,
            "seconds": seconds,
        },
        "plan": {
            "exact": bench.plan.exact,
            "reason": bench.plan.reason,
            "bytes": bench.plan.bytes,
            "operations": bench.plan.operations,
            "nodes": bench.node_rule,
        },
    }
