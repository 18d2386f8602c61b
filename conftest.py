"""Runs every ```python block of README.md and docs/ as a test, one namespace a document."""

import os
import tempfile
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

os.environ.setdefault("MPLBACKEND", "Agg")


def _enter_document(namespace: dict[str, Any]) -> None:
    # A directory of its own, so that figures which a snippet saves do not land in the tree.
    directory = tempfile.TemporaryDirectory()
    namespace["_outside"] = directory, os.getcwd(), torch.get_default_dtype()
    os.chdir(directory.name)
    torch.manual_seed(0)


def _leave_document(namespace: dict[str, Any]) -> None:
    directory, cwd, dtype = namespace["_outside"]
    torch.set_default_dtype(dtype)
    os.chdir(cwd)
    directory.cleanup()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand single tests to the workers, but whole what shares a namespace (documents) or a group of processes."""
    from xdist.scheduler import LoadScopeScheduling

    class SomeFilesWhole(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if path.endswith(".md") or path.startswith("tests/distributed/") else nodeid

    return SomeFilesWhole(config, log)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    excludes=["docs/_build/*", "docs/_build/**/*"],
    setup=_enter_document,
    teardown=_leave_document,
).pytest()
