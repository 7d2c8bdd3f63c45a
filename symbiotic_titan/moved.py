"""Modules that the documentation named before the layout of 0.2, under their old names, for extensions written then."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "symbiotic_titan"
MOVED = {
    "checkpoint.plan": "partition.plan",
    "evaluation.measure": "evaluation.suite",
    "generation": "inference",
    "generation.generator": "inference.generator",
}


class _Alias(Loader):
    """Gives the module of the new name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} has moved to {self._name}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name's there


class _OldNames(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        new = MOVED.get(name.removeprefix(_PACKAGE + "."))
        return ModuleSpec(name, _Alias(f"{_PACKAGE}.{new}")) if new is not None else None


def install() -> None:
    """Find old names, before files below a package that is itself an alias. Idempotent."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldNames())
