"""From what a user names, `MODULE:NAME`, `FILE.py` or a registered name, to plugin classes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from robustdeq.contract.form import kind_of
from robustdeq.errors import UsageError, sentence, unknown
from robustdeq.registry import Kind, plugin_class, registered

_ADVICE = "name MODULE:NAME, FILE.py, FILE.py:NAME or a registered plugin"


def plugin_classes(reference: str) -> list[type[Any]]:
    """The plugin classes that a reference names; the registry is read, never changed.

    Raises:
        UsageError: if there is no such file, module, class or registered plugin.
    """
    place, _, name = reference.partition(":")
    if place.endswith(".py"):
        return _chosen(_from_file(Path(place)), name, reference)
    if name:
        return _chosen(_from_module(place), name, reference)
    return _registered(reference)


def _from_file(path: Path) -> ModuleType:
    """A file run as a module of its own; what stands beside it can be imported meanwhile."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist; {_ADVICE}.")
    name = f"robustdeq_checked_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look classes up
    with _importable(path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as cause:
            raise UsageError(f"{path} cannot be run: {sentence(cause)}; repair it.") from cause
    return module


def _from_module(name: str) -> ModuleType:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as cause:
            raise UsageError(
                f"module {name} cannot be imported: {sentence(cause)}; "
                "install it, or name its file."
            ) from cause


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder first on the import path, as for a script in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _chosen(module: ModuleType, name: str, reference: str) -> list[type[Any]]:
    """The named class, or all plugin classes that the module itself defines."""
    if name:
        found = getattr(module, name, None)
        if not isinstance(found, type):
            classes = [key for key, value in vars(module).items() if isinstance(value, type)]
            raise unknown(f"class in {reference.partition(':')[0]}", name, classes)
        if kind_of(found) is None:
            raise UsageError(
                f"{reference} is no plugin: it has none of the methods build, run and loss; "
                "see robustdeq/interfaces.py."
            )
        return [found]
    plugins = [value for value in vars(module).values() if _is_plugin(value, module)]
    if not plugins:
        raise UsageError(
            f"{reference} defines no plugin: no class in it has a method build, run or loss; "
            "see robustdeq/interfaces.py."
        )
    return plugins


def _is_plugin(value: Any, module: ModuleType) -> bool:
    import torch

    if not isinstance(value, type) or issubclass(value, torch.nn.Module):
        return False
    own = value.__module__ == module.__name__ and not value.__name__.startswith("_")
    return own and kind_of(value) is not None


def _registered(name: str) -> list[type[Any]]:
    """All kinds that are registered under a name."""
    kinds: Sequence[Kind] = get_args(Kind)
    found = [kind for kind in kinds if name in registered(kind)]
    if not found:
        known = {known for kind in kinds for known in registered(kind)}
        raise unknown("plugin", name, known)
    return [plugin_class(kind, name) for kind in found]
