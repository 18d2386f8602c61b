"""The command: what it writes, its exit codes, and one line for everything that can go wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diagnostics
from diagnostics.report.cli import main
from tests.helpers.reporting_networks import chain, labelled

NET = """
import torch
from tests.helpers.reporting_networks import chain, labelled

model = chain([6, 5, 3])
def make(): return chain([6, 5, 3])
def data(): return labelled(6, 3)
def batches():
    x, y = labelled(6, 3)
    return [(x[:4], y[:4]), (x[4:], y[4:])]
def loader(): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*labelled(6, 3)), batch_size=8)
def wide(): return labelled(9, 3)
def nothing(): return []
def once(): return (batch for batch in batches())
def none(): return None
def broken(): raise ValueError("no weights\\nat all")
def number(): return 3
def slow(): raise AssertionError("too late")
def loss(z, targets): return torch.nn.functional.cross_entropy(z, targets, label_smoothing=0.1)
def vector(z, targets): return z.sum(1)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return "net.py"


def _run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def _args(net: str, **changed: Any) -> list[str]:
    options = {"data": f"{net}:data", "loss": "cross_entropy"} | changed
    model = options.pop("model", f"{net}:make")
    return ["report", model, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def test_report_is_that_of_diagnose(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*_args(net, out="report.json")) == 0
    expected = diagnostics.diagnose(chain([6, 5, 3]).eval(), labelled(6, 3), F.cross_entropy)
    found = diagnostics.Report.load("report.json")
    assert found.sections == expected.sections
    assert capsys.readouterr().out == f"{found}\n"
    assert _run("show", "report.json") == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert _run("show", "report.json", "--out", "pairs.csv") == 0
    assert Path("pairs.csv").read_text().startswith("report,table,v,w")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("source", ["data", "batches", "loader"])
def test_kinds_of_data_and_models(net: str, source: str) -> None:
    args = _args(
        net, model=f"{net}:model", data=f"{net}:{source}", loss=f"{net}:loss", sections="spectrum", out="r.json"
    )
    assert _run(*args, "--quiet") == 0
    assert diagnostics.Report.load("r.json").sections["spectrum"]["parameters"] == 53


def test_options_arrive(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"nodes": "1", "exact": "no", "probes": 7, "epsilon": 0.2, "seed": 5, "dtype": "float32", "mode": "train"}
    assert _run(*_args(net, **options, sections="metrics", device="cpu", memory=1, out="r.json")) == 0
    data = diagnostics.Report.load("r.json").data
    assert data["options"] == {"seed": 5, "probes": 7, "epsilon": 0.2, "seconds": None}
    assert data["model"]["dtype"] == "float32"
    assert data["model"]["training"]
    assert data["sections"]["metrics"]["nodes"] == ["1"]
    assert not data["plan"]["exact"]
    assert _run(*_args(net, data=f"{net}:batches", dtype="float32", sections="spectrum")) == 0


def test_several_checkpoints_are_compared(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        torch.save({"state_dict": chain([6, 5, 3], gain=1.0 + i).state_dict()}, f"{i}.pt")
    args = _args(net, sections="metrics", out="run.json", resume="part.json")
    assert _run(*args, "--checkpoint", "0.pt", "1.pt") == 0
    document = json.loads(Path("run.json").read_text())
    assert document["names"] == ["0.pt", "1.pt"]
    losses = [report["sections"]["network"]["loss"] for report in document["reports"]]
    assert losses[0] != losses[1]
    assert Path("part.0.json").is_file()
    capsys.readouterr()
    assert _run("show", "run.json") == 0
    assert "2 reports: 0.pt, 1.pt" in capsys.readouterr().out


def test_compare(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        assert _run(*_args(net, sections="metrics", out=f"{name}.json"), "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert _run("compare", "a.json", "b.json", "--out", "both.txt") == 0
    assert capsys.readouterr().out == Path("both.txt").read_text()
    assert _run("compare", "a.json", "b.json", "--names", "old", "new") == 0
    assert "old, new" in capsys.readouterr().out


def test_config_file(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model": f"{net}:make",
        "data": f"{net}:data",
        "loss": "cross_entropy",
        "sections": ["metrics"],
        "seed": 4,
    }
    Path("run.json").write_text(json.dumps(config | {"out": "r.json"}))
    assert _run("report", "--config", "run.json", "--seed", 6) == 0
    assert diagnostics.Report.load("r.json").data["options"]["seed"] == 6
    if sys.version_info >= (3, 11):
        lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
        Path("run.toml").write_text("\n".join([*lines, 'out = "t.json"']))
        assert _run("report", "--config", "run.toml") == 0
        assert diagnostics.Report.load("t.json").data["options"]["seed"] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"probes": "many"}, "probes: expected an integer, got 'many'"),
        ({"probes": True}, "probes: expected an integer, got True"),
        ({"nodes": "fc"}, "nodes: expected a list of strings, got 'fc'"),
        ({"checkpoint": [1]}, "checkpoint: expected a list of strings"),
        ({"quiet": 1}, "quiet: expected true or false"),
        ({"mode": "test"}, "mode: expected one of eval, train"),
        ({"colour": "red"}, "colour: no such option"),
        ([], "holds no options"),
        ({}, "the model is missing"),
    ],
)
def test_wrong_config_names_the_key(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(content))
    _fails(["report", "--config", str(tmp_path / "run.json")], message, capsys)


def _fails(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "net.py:broken"}, "the factory net.py:broken failed: ValueError: no weights"),
        ({"model": "net.py:number"}, "returned a int, not a module"),
        ({"model": "net.py:absent"}, "net.py has no 'absent'"),
        ({"model": "absent.py:make"}, "there is no file absent.py"),
        ({"model": "no_such_module:make"}, "cannot be imported: ModuleNotFoundError"),
        ({"model": "net.py"}, "not of the form MODULE:NAME"),
        ({"data": "net.py:wide"}, "model, data and loss do not fit together: RuntimeError: mat1 and mat2"),
        ({"data": "net.py:nothing"}, "batches is empty"),
        ({"data": "net.py:once"}, "can be read only once"),
        ({"data": "net.py:none"}, "returned None"),
        ({"data": "net.py:broken"}, "the loader net.py:broken failed"),
        ({"loss": "cross_entropie"}, "there is no loss 'cross_entropie'"),
        ({"loss": "net.py:vector"}, "loss_fn must return a scalar"),
        ({"loss": "net.py:model2"}, "has no 'model2'"),
        ({"checkpoint": "absent.pt"}, "there is no checkpoint absent.pt"),
        ({"nodes": "layer9"}, "no module of Sequential is called or matches 'layer9'"),
        ({"out": "report.xls"}, "reports are written as .json, .csv, .txt"),
        ({"out": "absent/report.json"}, "there is no folder absent"),
        ({"out": "."}, "--out . is a folder: name a file in it, such as report.json"),
        ({"out": "closed/report.json"}, "--out closed/report.json cannot be written: Permission denied"),
        ({"resume": "absent/part.json"}, "--resume absent/part.json: there is no folder absent"),
        ({"out": "same.json", "resume": "./same.json"}, "--out and --resume name the same file"),
        ({"memory": "nan"}, "--memory: expected a positive number of GiB, got nan"),
        ({"memory": "-1"}, "--memory: expected a positive number of GiB, got -1"),
        ({"memory": "inf"}, "--memory: expected a positive number of GiB, got inf"),
        ({"epsilon": "nan"}, "epsilon must be positive and finite, got nan"),
        ({"seconds": "0"}, "seconds must be positive and finite, or None, got 0"),
        ({"seed": 10**30}, "seed must be an integer of 64 bits"),
        ({"probes": 2}, "probes must be at least 3"),
        ({"sections": "graph"}, "sections must be some of"),
        ({"device": "warp"}, "--device warp"),
        ({"config": "absent.toml"}, "cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    net: str,
    changed: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if str(changed.get("out")).startswith("closed"):
        Path("closed").mkdir()
        closed = os.open

        def refused(path: Any, *args: Any, **kwargs: Any) -> int:  # root may write everywhere
            if Path(path).parent.name == "closed":
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return closed(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", refused)
    if {"out", "resume", "memory", "epsilon", "seconds", "seed", "probes", "sections"} & set(changed):
        changed = changed | {"model": f"{net}:slow"}  # wrong options are found before any work
    _fails(_args(net, **changed), message, capsys)


def test_failed_sections_are_told_by_lines_and_exit_code(
    net: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(bench: Any) -> dict[str, Any]:
        raise diagnostics.DiagnosticsError("a product\noverflows")

    assert diagnostics.diagnose is not None
    monkeypatch.setitem(sys.modules["diagnostics.report.diagnose"].SECTIONS, "spectrum", failing)
    assert _run(*_args(net, out="r.json"), "--quiet") == 3
    assert capsys.readouterr().err == "failed: Sequential: spectrum: DiagnosticsError: a product overflows\n"
    found = diagnostics.Report.load("r.json")
    assert list(found.failures) == ["spectrum"]
    assert "parameters" in found.sections


def test_seconds_arrive(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*_args(net, out="r.json", seconds=1e-9)) == 0
    assert "metrics: left out. no time" in capsys.readouterr().out
    torch.save(chain([6, 5, 3]).state_dict(), "a.pt")
    assert _run(*_args(net, out="c.json", seconds=1e-9), "--checkpoint", "a.pt", "a.pt") == 0
    document = json.loads(Path("c.json").read_text())
    assert [list(report["sections"]) for report in document["reports"]] == [["network"], ["network"]]


def test_interruption_writes_what_is_finished(
    net: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(chain([6, 5, 3]).state_dict(), "a.pt")
    sections = sys.modules["diagnostics.report.diagnose"].SECTIONS
    real, calls = sections["spectrum"], []

    def interrupted(bench: Any) -> Any:
        calls.append(bench)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return real(bench)

    monkeypatch.setitem(sections, "spectrum", interrupted)
    assert _run(*_args(net, out="c.json"), "--checkpoint", "a.pt", "a.pt") == 130
    assert capsys.readouterr().err == "interrupted; what is finished is in c.json\n"
    first, second = json.loads(Path("c.json").read_text())["reports"]
    assert len(first["sections"]) == 6
    assert list(second["sections"]) == ["network", "metrics", "sources", "bounds"]
    calls.append(None)
    assert _run(*_args(net, out="r.json")) == 130
    assert list(diagnostics.Report.load("r.json").data["skipped"]) == ["spectrum", "parameters"]


def test_places_of_show_and_compare_are_checked(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*_args(net, sections="network", out="r.json"), "--quiet") == 0
    for arguments in (["show", "r.json"], ["compare", "r.json", "r.json"]):
        _fails([*arguments, "--out", "."], "--out . is a folder", capsys)
        _fails([*arguments, "--out", "absent/r.txt"], "there is no folder absent", capsys)
        _fails([*arguments, "--out", "r.xls"], "reports are written as", capsys)


def test_checkpoint_that_does_not_fit(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = chain([6, 5, 3]).state_dict()
    state["extra"] = state.pop("1.bias")
    state["0.0.weight"] = torch.zeros(2, 2)
    torch.save(state, "other.pt")
    message = "missing: 1.bias; unexpected: extra; shapes: 0.0.weight is (2, 2) instead of (5, 6)."
    _fails(_args(net, checkpoint="other.pt"), message, capsys)
    torch.save({f"{i}": torch.zeros(1) for i in range(9)}, "many.pt")
    _fails(_args(net, checkpoint="many.pt"), "and 6 more", capsys)
    Path("text.pt").write_text("hello")
    _fails(_args(net, checkpoint="text.pt"), "cannot be read as a state_dict", capsys)
    torch.save([1, 2], "list.pt")
    _fails(_args(net, checkpoint="list.pt"), "holds no state_dict but a list", capsys)


def test_traceback_on_request(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*_args(net, model="net.py:broken"), "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["reprot"], ["report", "--probes", "many"], ["compare"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    assert "exit codes: 0 done, 1 error" in capsys.readouterr().out


def test_interruption(net: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bench: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    assert diagnostics.diagnose is not None
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules["diagnostics.report.diagnose"].SECTIONS, "spectrum", interrupted)
        assert _run(*_args(net, resume="part.json")) == 130
    assert "finished sections are in part.json" in capsys.readouterr().err
    assert _run(*_args(net, resume="part.json", out="r.json")) == 0
    whole = diagnostics.diagnose(chain([6, 5, 3]).eval(), labelled(6, 3), F.cross_entropy)
    assert diagnostics.Report.load("r.json").sections == whole.sections


def test_as_a_module(net: str) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "diagnostics", *_args(net, sections="metrics")]
    environment = {"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Curvature of Sequential")
    assert done.stderr == ""
