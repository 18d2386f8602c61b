"""Which concrete classes of the two packages implement an interface, and which of them a contract covers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diagnostics
import hessopt


def load_all() -> None:
    """Import every module of the two packages, so that all subclasses are known."""
    for package in (diagnostics, hessopt):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def subclasses(base: type) -> set[type]:
    """All classes derived from ``base``, at any depth."""
    direct = set(base.__subclasses__())
    return direct.union(*(subclasses(kind) for kind in direct))


def implementations(base: type) -> set[type]:
    """The concrete subclasses of ``base`` in the two packages."""
    load_all()
    return {
        kind
        for kind in subclasses(base)
        if kind.__module__.split(".")[0] in ("diagnostics", "hessopt") and not inspect.isabstract(kind)
    }


def uncovered(base: type, contract: type) -> set[type]:
    """Implementations of ``base`` that no subclass of ``contract`` names as its ``kind``."""
    return implementations(base) - {case.kind for case in subclasses(contract) if hasattr(case, "kind")}
