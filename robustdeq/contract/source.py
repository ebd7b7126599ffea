"""From what a user names, `MODULE:NAME`, `FILE.py` or a registered name, to plugin classes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from robustdeq.errors import UsageError, sentence, unknown
from robustdeq.interfaces import Kind
from robustdeq.plugin_files import chosen, classes_in, importable, reference
from robustdeq.registry import plugin_class, registered


def plugin_classes(text: str) -> list[type[Any]]:
    """The plugin classes that a reference names; the registry is read, never changed.

    Raises:
        UsageError: if there is no such file, module, class or registered plugin.
    """
    if reference(text) is not None:
        return classes_in(text)
    place, _, name = text.partition(":")
    return chosen(_module(place), name, place) if name else _registered(text)


def _module(name: str) -> ModuleType:
    with importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as cause:
            raise UsageError(
                f"module {name} cannot be imported: {sentence(cause)}; "
                "install it, or name its file."
            ) from cause


def _registered(name: str) -> list[type[Any]]:
    """All kinds that are registered under a name."""
    kinds: Sequence[Kind] = get_args(Kind)
    found = [kind for kind in kinds if name in registered(kind)]
    if not found:
        known = {known for kind in kinds for known in registered(kind)}
        raise unknown("plugin", name, known)
    return [plugin_class(kind, name) for kind in found]
