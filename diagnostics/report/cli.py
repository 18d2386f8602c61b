"""The command: ``python -m diagnostics report``, ``show`` and ``compare``."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diagnostics.errors import DiagnosticsError

if TYPE_CHECKING:
    from diagnostics.report.compare import Comparison
    from diagnostics.report.report import Report

_EPILOG = """\
exit codes: 0 done, 1 error (one line on stderr says why), 2 wrong usage, 3 done, but sections failed (a line each on
stderr; the report has the others), 130 interrupted (what is finished is written to the file of --out)

example, with a file net.py that has two functions of no arguments: make() returns the model, and data() one batch
(inputs, targets), or a list or DataLoader of such batches:

  python -m diagnostics report net.py:make --data net.py:data --loss cross_entropy --out report.html
  python -m diagnostics report net.py:make --data net.py:data --loss mse_loss --checkpoint a.pt b.pt
  python -m diagnostics show report.json --out report.html
  python -m diagnostics compare a.json b.json --out page.html

a config file for repeat runs (--config run.toml) holds the options of `report` by their names; what is given on the
command line wins:

  model = "net.py:make"
  data = "net.py:data"
  loss = "cross_entropy"
  nodes = ["layer*", "fc"]
  probes = 30
  out = "report.json"
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m diagnostics",
        description="Where the curvature of a PyTorch network comes from, and what follows from it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        parents=[common],
        help="diagnose a model",
        description="Diagnose a model and print the report; write it with --out.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = report.add_argument
    add("model", nargs="?", metavar="MODULE:FACTORY", help="returns the model, or is it; MODULE is a"
        " name to import or a file.py")  # fmt: skip
    add("--data", metavar="MODULE:LOADER", help="a function that returns (inputs, targets) or a list or DataLoader of"
        " such, or one of these itself")  # fmt: skip
    add("--loss", metavar="NAME", help="a loss of torch.nn.functional, such as cross_entropy, or MODULE:FUNCTION of"
        " (output, targets)")  # fmt: skip
    add("--checkpoint", nargs="+", metavar="FILE", help="state_dicts to load; with several, all are compared")
    add("--nodes", nargs="+", metavar="NAME", help="names or patterns of the modules whose outputs are the nodes"
        " (default: the model's layers)")  # fmt: skip
    add("--exact", choices=("auto", "yes", "no"), help="exact blocks between nodes, or estimates (default: by size)")
    add("--probes", type=int, metavar="N", help="random probes at each node of an estimate (default: by size)")
    add("--epsilon", type=float, metavar="E", help="coupling below which nodes do not interact (default: 0.1)")
    add("--seed", type=int, metavar="N", help="of all random numbers (default: 0)")
    add("--sections", nargs="+", metavar="NAME", help="of network, metrics, sources, bounds, spectrum, parameters")
    add("--memory", type=float, metavar="GIB", help="memory limit in GiB (default: 4)")
    add("--seconds", type=float, metavar="S", help="time to aim at, of all checkpoints together: sections by value,"
        " shortened or left out where there is no time (default: no limit)")  # fmt: skip
    add("--device", metavar="DEVICE", help="where to run, such as cpu or cuda (default: where the model is)")
    add("--dtype", choices=("float32", "float64"), help="convert model and data (default: as they are)")
    add("--mode", choices=("eval", "train"), help="of dropout and batch-norm (default: eval)")
    add("--out", metavar="FILE", help="write a page .html, data .json or .csv, .txt, or a figure .png, .svg,"
        " .pdf; several checkpoints as all but .csv")  # fmt: skip
    add("--resume", metavar="FILE", help="keep finished sections in FILE, and continue from it after an interruption")
    add("--config", metavar="FILE", help="options by name from a .toml or .json file")
    add("--quiet", action="store_true", default=None, help="do not print the report")
    show = commands.add_parser("show", parents=[common], help="print a saved report")
    show.add_argument("file", metavar="REPORT.json")
    show.add_argument("--out", metavar="FILE", help="write it as a page .html, a figure or another format instead")
    compared = commands.add_parser("compare", parents=[common], help="print saved reports side by side")
    compared.add_argument("files", nargs="+", metavar="REPORT.json", help="two or more")
    compared.add_argument("--names", nargs="+", metavar="NAME", help="what to call them (default: the files' names)")
    compared.add_argument("--out", metavar="FILE", help="write a page .html, .json, .txt, or a figure .png, .svg, .pdf")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    Args:
        arguments: Those of the command line; None: ``sys.argv[1:]``.
    """
    options = parser().parse_args(arguments)
    run = {"report": _report, "show": _show, "compare": _compare}[options.command]
    try:
        return run(options)
    except KeyboardInterrupt as stop:
        print(f"interrupted{'; '.join(['', *stop.args])}", file=sys.stderr)
        return 130
    except Exception as error:
        if options.traceback:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (DiagnosticsError, ValueError, OSError)) else f"{type(error).__name__}: {text}"


def _report(options: argparse.Namespace) -> int:
    from diagnostics.report.cli_loading import run_report, settings_of
    from diagnostics.report.interrupted import DiagnosisInterrupted

    chosen = settings_of(options)
    out, resume = chosen.get("out"), chosen.get("resume")
    try:
        result = run_report(chosen)
    except KeyboardInterrupt as stop:
        kept = []
        if isinstance(stop, DiagnosisInterrupted) and out is not None:
            stop.report.save(out)
            kept.append(f"what is finished is in {out}")
        if resume is not None:
            kept.append(f"finished sections are in {resume}, run the same command again")
        raise KeyboardInterrupt(*kept) from None
    _put(result, out, quiet=bool(chosen.get("quiet")))
    return 3 if _failures(result) else 0


def _failures(result: Report | Comparison) -> bool:
    """Whether sections failed; says which and why."""
    from diagnostics.report.report import Report

    found = False
    for report in (result,) if isinstance(result, Report) else result.reports:
        for section, why in report.failures.items():
            print(f"failed: {report.name}: {section}: {' '.join(why.split())}", file=sys.stderr)
            found = True
    return found


def _show(options: argparse.Namespace) -> int:
    from diagnostics.rendering.formats import COMPARISON_FORMATS, REPORT_FORMATS, check_out
    from diagnostics.report.compare import load

    found = load(options.file)
    if options.out is not None:
        check_out(options.out, COMPARISON_FORMATS if hasattr(found, "reports") else REPORT_FORMATS)
    _put(found, options.out, quiet=options.out is not None)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from pathlib import Path

    from diagnostics.rendering.formats import COMPARISON_FORMATS, check_out
    from diagnostics.report.compare import compare
    from diagnostics.report.report import Report

    if options.out is not None:
        check_out(options.out, COMPARISON_FORMATS)
    reports = [Report.from_json(file) for file in options.files]
    names = options.names or [Path(file).stem for file in options.files]
    _put(compare(reports, names), options.out, quiet=False)
    return 0


def _put(result: Report | Comparison, out: str | None, *, quiet: bool) -> None:
    if not quiet:
        print(result)
    if out is not None:
        result.save(out)
