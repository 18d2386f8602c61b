"""``import diagnostics`` loads next to nothing, and names are what they were when all was loaded."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diagnostics

ROOT = Path(__file__).parents[1]
HEAVY = ("hessopt", "matplotlib", "jinja2", "plotly", "pandas", "networkx", "scipy.stats", "scipy.sparse", "typer")


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_heavy_is_imported() -> None:
    assert _run(f"import sys, diagnostics; print([m for m in {HEAVY!r} if m in sys.modules])") == "[]"


def test_a_diagnosis_imports_no_optimizer_and_no_plots() -> None:
    code = """
import sys, torch, diagnostics
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
batch = torch.randn(4, 3), torch.randn(4, 2)
str(diagnostics.diagnose(model, batch, torch.nn.functional.mse_loss))
print([m for m in ("hessopt", "matplotlib", "jinja2", "pandas") if m in sys.modules])
"""
    assert _run(code) == "[]"


def test_help_needs_no_torch() -> None:
    assert _run(
        f"import sys; import diagnostics.report.cli; print([m for m in {(*HEAVY, 'torch')!r} if m in sys.modules])"
    ) == ("[]")


def test_every_name_is_there() -> None:
    for name in diagnostics.__all__:
        assert getattr(diagnostics, name) is not None
    assert set(diagnostics.__all__) <= set(dir(diagnostics))
    assert diagnostics.bounds.resonance.resonance_bounds is diagnostics.resonance_bounds
    with pytest.raises(AttributeError, match="diagnostics attribute nonsense"):
        _ = diagnostics.nonsense


def test_no_module_hides_a_public_name() -> None:
    beside = {path.stem for path in Path(diagnostics.__file__).parent.iterdir()}
    assert not beside & set(diagnostics.__all__)


@pytest.mark.parametrize("package", ["diagnostics", "hessopt"])
def test_the_reference_lists_what_is_exported(package: str) -> None:
    reference = (ROOT / "docs" / "api" / f"{package}.md").read_text(encoding="utf-8")
    listed = re.findall(r"\.\. auto(?:class|function|exception|module):: (?:hessopt\.)?(\S+)", reference)
    assert sorted(listed) == sorted(importlib.import_module(package).__all__)
