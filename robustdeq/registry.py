"""Finds plugins: entry points of installed distributions, in three groups, and files by path.

Built-in plugins are found in exactly the way a stranger's are. Listing names imports nothing; a
plugin that cannot be loaded stops the run. Wherever a name is expected, `FILE.py` or `FILE.py:NAME`
will do (see `robustdeq.plugin_files`).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any, Literal, NamedTuple, overload

from robustdeq.errors import UsageError, sentence, unknown
from robustdeq.interfaces import Attack, Defense, Recipe
from robustdeq.interfaces import Kind as Kind
from robustdeq.keys import file_sha256
from robustdeq.plain_names import is_plugin_name
from robustdeq.plugin_files import class_in, reference
from robustdeq.texts import one_line

BUILT_IN = "robustdeq"
_REQUIRED = {"defense": ("about", "build"), "attack": ("needs", "run"), "recipe": ("loss",)}


@dataclass(frozen=True)
class Registered:
    """One registered name, with the distribution that provides it."""

    name: str
    kind: Kind
    distribution: str
    version: str
    reference: str
    entry: metadata.EntryPoint


def registered(kind: Kind) -> dict[str, Registered]:
    """All plugins of a kind by name, sorted; nothing is imported.

    Raises:
        UsageError: if two distributions register the same name, or one a name that is none.
    """
    return dict(_found(kind, _places()))


def _places() -> tuple[tuple[str, ...], ...]:
    """Where distributions are looked for, each place with those that lie there."""
    return tuple((place, *_distributions(place)) for place in sys.path)


def _distributions(place: str) -> list[str]:
    try:
        with os.scandir(place or ".") as entries:
            names = [entry.name for entry in entries]
    except OSError:  # no folder
        return []
    return sorted(name for name in names if name.endswith((".dist-info", ".egg-info")))


@lru_cache(maxsize=16)
def _found(kind: Kind, places: tuple[tuple[str, ...], ...]) -> dict[str, Registered]:
    """See `registered`. Reading what distributions offer takes long, and suites ask often.

    Args:
        places: what has changed once these have is read anew.
    """
    found: dict[str, Registered] = {}
    for entry in metadata.entry_points(group=f"robustdeq.{kind}s"):
        name = one_line(entry.dist.metadata["Name"] if entry.dist else "an unknown distribution")
        version = one_line(entry.dist.version) if entry.dist else ""
        if not is_plugin_name(entry.name):
            raise UsageError(
                f"{kind} {ascii(entry.name)[:60]} of {name} has a name that is none: at most 100 "
                f"letters, digits, dots, dashes and underscores; uninstall {name}."
            )
        plugin = Registered(entry.name, kind, name, version, entry.value, entry)
        other = found.setdefault(entry.name, plugin)
        # A distribution can be seen twice (an editable install beside its own build folder).
        if (other.distribution, other.reference) != (plugin.distribution, plugin.reference):
            raise UsageError(
                f"{kind} {entry.name!r} is registered by both {other.distribution} and "
                f"{plugin.distribution}; uninstall one of them."
            )
    return dict(sorted(found.items()))


class Provider(NamedTuple):
    """What a plugin comes from: a distribution with its version, or a file with its SHA-256."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def provider(kind: Kind, name: str) -> Provider:
    """Where a registered name, or a reference to a file, comes from; nothing is imported.

    Raises:
        UsageError: for an unknown name.
    """
    file = reference(name)
    if file is not None:
        return Provider(one_line(file.path.name), f"sha256 {file_sha256(file.path)}")
    plugins = registered(kind)
    if name not in plugins:
        raise unknown(kind, name, plugins)
    return Provider(plugins[name].distribution, plugins[name].version)


def plugin_class(kind: Kind, name: str) -> type[Any]:
    """The plugin class registered under a name, or the one of that kind in a file.

    Raises:
        UsageError: if the name is unknown, or its plugin cannot be imported or is malformed.
    """
    if reference(name) is not None:
        return _checked(kind, class_in(kind, name), f"{kind} {name!r}")
    plugins = registered(kind)
    if name not in plugins:
        raise unknown(kind, name, plugins)
    plugin = plugins[name]
    where = f"{kind} {name!r} ({plugin.reference}, from {plugin.distribution} {plugin.version})"
    try:
        cls = plugin.entry.load()
    except (Exception, SystemExit) as cause:
        raise UsageError(
            f"{where} cannot be loaded: {sentence(cause)}; repair or uninstall "
            f"{plugin.distribution}."
        ) from cause
    return _checked(kind, cls, where)


def _checked(kind: Kind, cls: Any, where: str) -> type[Any]:
    lacking = [part for part in _REQUIRED[kind] if not hasattr(cls, part)]
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or lacking:
        raise UsageError(
            f"{where} is not a frozen dataclass with {', '.join(_REQUIRED[kind])}; "
            "see the plugin contract in robustdeq/interfaces.py."
        )
    found: type[Any] = cls
    return found


@overload
def load(kind: Literal["defense"], name: str, parameters: Mapping[str, Any]) -> Defense: ...
@overload
def load(kind: Literal["attack"], name: str, parameters: Mapping[str, Any]) -> Attack: ...
@overload
def load(kind: Literal["recipe"], name: str, parameters: Mapping[str, Any]) -> Recipe: ...
def load(kind: Kind, name: str, parameters: Mapping[str, Any]) -> Any:
    """A plugin with its parameters set; those not named keep their defaults.

    Raises:
        UsageError: for an unknown name or parameter, or a value of the wrong type.
    """
    cls = plugin_class(kind, name)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in parameters.items():
        if key not in fields:
            near = difflib.get_close_matches(key, list(fields), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(fields)}."
            raise UsageError(f"{kind} {name!r} has no parameter {key!r}; {hint}")
        values[key] = _typed(f"parameter {key!r} of {kind} {name!r}", value, hints[key])
    try:
        return cls(**values)
    except UsageError:
        raise
    except (TypeError, ValueError) as cause:
        raise UsageError(f"{kind} {name!r} refuses its parameters: {sentence(cause)}.") from cause


def parameters_of(plugin: Any) -> dict[str, Any]:
    """The resolved parameters of a plugin object: all fields, defaults included.

    A field whose metadata say `young` came after weights were released. At its default it is left
    out, so that their training gives the same bytes again.
    """
    if not dataclasses.is_dataclass(plugin):
        return {}
    return {
        f.name: getattr(plugin, f.name)
        for f in dataclasses.fields(plugin)
        if f.init and not (f.metadata.get("young") and getattr(plugin, f.name) == f.default)
    }


def _typed(what: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: integers widen to floats, lists to tuples; else a refusal."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        origin = typing.get_origin(choice) or choice
        if origin is Literal:
            if value in typing.get_args(choice):
                return value
        elif origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif origin is tuple and isinstance(value, list | tuple):
            return tuple(value)
        elif (
            isinstance(origin, type)
            and isinstance(value, origin)
            and not (isinstance(value, bool) and origin is int)
        ):
            return value
    names = " or ".join(
        str(typing.get_args(c))
        if typing.get_origin(c) is Literal
        else getattr(c, "__name__", str(c))
        for c in choices
    )
    raise UsageError(f"{what} is {value!r}; give {names}.")
