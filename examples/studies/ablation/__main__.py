"""Optimizers side by side on real problems.

python -m examples.studies.ablation run examples/studies/ablation/studies/quick.toml [--dry-run] [--data DIR]
python -m examples.studies.ablation report
python -m examples.studies.ablation list
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.shared.problems import PROBLEMS
from examples.studies.ablation.optimizers import CONTENDERS
from examples.studies.ablation.study import Session, Study
from examples.studies.ablation.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.ablation", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing of a study")
    run.add_argument("study", type=Path, help="a TOML file, see examples/studies/ablation/studies")
    run.add_argument("--data", type=Path, help="folder of real data, for the problems that need it")
    run.add_argument("--only", nargs="+", default=[], metavar="NAME", help="problem, contender or problem/contender")
    run.add_argument("--seeds", nargs="+", type=int, help="in place of the study's")
    run.add_argument("--threads", type=int, help="in place of the study's")
    run.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    run.add_argument("--out", type=Path, help="the table; default: examples/studies/ablation/results/STUDY.jsonl")
    run.add_argument("--again", nargs="+", default=[], metavar="NAME", help="drop rows of these contenders or problems")
    run.add_argument("--dry-run", action="store_true", help="only say what there is to do")
    report = commands.add_parser("report", help="write the results page and its figures")
    report.add_argument("tables", nargs="*", type=Path, help="default: all of examples/studies/ablation/results")
    report.add_argument("--docs", type=Path, default=DOCS, help="folder of ablation.md and images/ablation")
    commands.add_parser("list", help="list problems, contenders and their grids")
    options = parser.parse_args(arguments)
    {"run": _run, "report": _report, "list": _list}[options.command](options)


def _run(options: argparse.Namespace) -> None:
    study = Study.load(options.study)
    changes = {name: getattr(options, name) for name in ("seeds", "threads") if getattr(options, name) is not None}
    study = dataclasses.replace(study, **changes)
    table = Table(options.out or RESULTS / f"{study.name}.jsonl")
    if options.again and not options.dry_run:
        print(f"{table.drop(options.again)} rows dropped")
    session = Session(study, table, PROBLEMS, CONTENDERS, only=options.only, device=options.device, data=options.data)
    runs, seconds = session.estimate()
    todo = f"{runs} runs to do, at most {seconds / 60:.0f} min inside of steps"
    print(f"{study.name}: {todo}; {len(table.rows)} in {table.path}")
    if not options.dry_run:
        session.run()


def _report(options: argparse.Namespace) -> None:
    from examples.studies.ablation.page import Page

    tables = options.tables or sorted(RESULTS.glob("*.jsonl"))
    rows = [row for path in tables for row in Table(path).rows]
    notes = RESULTS / "notes.md"
    written = notes.read_text(encoding="utf-8") if notes.exists() else ""
    Page(rows, CONTENDERS, PROBLEMS, written).write(options.docs / "ablation.md", options.docs / "images" / "ablation")
    print(f"{options.docs / 'ablation.md'} from {len(rows)} runs")


def _list(options: argparse.Namespace) -> None:
    print("Problems")
    for problem in PROBLEMS.values():
        data = ", needs data" if problem.needs_data else ""
        print(f"  {problem.name:24} {problem.family:16} {problem.seconds:g} s, {problem.size}{data}: {problem.title}")
    print("Contenders, with the settings that they are tuned over")
    for contender in CONTENDERS.values():
        print(f"  {contender.name:24} {contender.title}{' (ours)' if contender.ours else ''}")
        for settings in contender.grid:
            print(f"  {'':24}   {', '.join(f'{name} = {value!r}' for name, value in settings.items()) or 'defaults'}")


if __name__ == "__main__":
    main()
