"""Plugins in files: `my_deq.py` or `my_deq.py:MyDEQ` in place of a registered name.

Where a file lies is for finding it alone. In records its plugin is `file:MyDEQ`, whatever the file
is called; what tells two versions of it apart is the digest of their source.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from robustdeq.errors import UsageError, sentence, unknown
from robustdeq.interfaces import Kind, kind_of

PUBLIC = "file:"
_PREFIX = "robustdeq_file_"
_LONGEST = 100
"""Characters of a class's name."""
_REFERENCE = re.compile(r"(?P<path>.+\.py)(:(?P<name>\w*))?")


class Reference(NamedTuple):
    """A file, and the class in it that is meant (empty: those that it defines)."""

    path: Path
    name: str


def reference(text: str) -> Reference | None:
    """`FILE.py` or `FILE.py:NAME` in its parts; None for what names no file."""
    match = _REFERENCE.fullmatch(text)
    return Reference(Path(match["path"]), match["name"] or "") if match else None


def located(kind: Kind, text: str, folder: Path | None = None) -> str:
    """`/PATH/FILE.py:NAME`, which means the same in every process; other names as they are.

    Args:
        kind: of the plugin that is meant.
        text: a reference to a file, or a registered name.
        folder: what a relative path starts from; the working folder by default.

    Raises:
        UsageError: if there is no such file or class, or the file defines several of the kind.
    """
    named = reference(text)
    if named is None:
        return text
    path = ((folder or Path()) / named.path).resolve()
    whole = f"{path}:{named.name}" if named.name else str(path)
    (cls,) = _of_kind(kind, whole)
    return f"{path}:{cls.__name__}"


def public_name(kind: Kind, text: str) -> str:
    """What stands for a plugin in records and tables; a registered name as it is.

    Raises:
        UsageError: see `located`.
    """
    return text if reference(text) is None else PUBLIC + class_in(kind, text).__name__


def declared(text: str) -> dict[str, str]:
    """What stands in records for each class of a file, with a whole reference; nothing is run.

    Raises:
        UsageError: if there is no such file, or it is no Python.
    """
    named = reference(text)
    if named is None:
        raise UsageError(f"{text} is no file; write FILE.py or FILE.py:NAME.")
    path = named.path.resolve()
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name FILE.py or FILE.py:NAME.")
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as cause:
        raise UsageError(f"{path.name} is no Python ({sentence(cause)}); repair it.") from cause
    names = [node.name for node in body if isinstance(node, ast.ClassDef)]
    if named.name and named.name not in names:
        raise unknown(f"class in {path.name}", named.name, names)
    return {PUBLIC + name: f"{path}:{name}" for name in names if named.name in ("", name)}


def class_in(kind: Kind, text: str) -> type[Any]:
    """The one plugin class of a kind that a reference to a file names.

    Raises:
        UsageError: see `located`.
    """
    (cls,) = _of_kind(kind, text)
    return cls


def classes_in(text: str) -> list[type[Any]]:
    """The plugin classes that a reference to a file names, of any kind, in their order.

    Raises:
        UsageError: if there is no such file or class, or the file cannot be run.
    """
    named = reference(text)
    if named is None:
        raise UsageError(f"{text} is no file; write FILE.py or FILE.py:NAME.")
    return chosen(load_file(named.path), named.name, named.path.name)


def chosen(module: ModuleType, name: str, source: str) -> list[type[Any]]:
    """The named class of a module, or all plugin classes that the module itself defines.

    Raises:
        UsageError: if there is none.
    """
    if name:
        found = getattr(module, name, None)
        if not isinstance(found, type):
            classes = [key for key, value in vars(module).items() if isinstance(value, type)]
            raise unknown(f"class in {source}", name, classes)
        if kind_of(found) is None:
            raise UsageError(
                f"{source}:{name} is no plugin: it has none of the methods build, run and loss; "
                "see robustdeq/interfaces.py."
            )
        return [found]
    plugins = [value for value in vars(module).values() if _is_plugin(value, module)]
    if not plugins:
        raise UsageError(
            f"{source} defines no plugin: no class in it has a method build, run or loss; "
            "see robustdeq/interfaces.py."
        )
    return list(dict.fromkeys(plugins))


def load_file(path: Path) -> ModuleType:
    """A file run as a module of its own, once per place and content.

    What stands beside it can be imported meanwhile.

    Raises:
        UsageError: if it is missing or raises, or would import another module than its neighbor.
    """
    path = path.resolve()
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name FILE.py or FILE.py:NAME.")
    payload = path.read_bytes()
    # The bytes that are hashed are those that run: a cached .pyc can be older than the file.
    name = _PREFIX + hashlib.sha256(str(path).encode() + b"\0" + payload).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look classes up
    try:
        with importable(path.parent):
            exec(compile(payload, str(path), "exec"), module.__dict__)
        _check_neighbors(path)
    except (Exception, SystemExit) as cause:
        del sys.modules[name]
        if isinstance(cause, UsageError):
            raise
        raise UsageError(f"{path.name} cannot be run: {sentence(cause)}; repair it.") from cause
    return module


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """The folder first on the import path, as for a script in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def is_file_module(name: str) -> bool:
    """Whether a module's name is one that `load_file` gave."""
    return name.startswith(_PREFIX)


def neighbors(path: Path) -> list[Path]:
    """The Python files beside a file that it imports, directly or not, sorted."""
    found: set[Path] = set()
    _collect(path, found)
    return sorted(found - {path})


def _of_kind(kind: Kind, text: str) -> list[type[Any]]:
    """Exactly one class."""
    found = [cls for cls in classes_in(text) if kind_of(cls) == kind]
    for cls in found:
        if not cls.__name__.isidentifier() or len(cls.__name__) > _LONGEST:
            raise UsageError(
                f"{Path(text).name} defines a class named {ascii(cls.__name__)[:60]}; give it a "
                "name that can be written in Python."
            )
    if len(found) == 1:
        return found
    names = ", ".join(f"{Path(text).name}:{cls.__name__}" for cls in found)
    what = f"several {kind}s; write one of: {names}." if found else f"no {kind}; name its file."
    raise UsageError(f"{Path(text).name} defines {what}")


def _is_plugin(value: Any, module: ModuleType) -> bool:
    import torch

    if not isinstance(value, type) or issubclass(value, torch.nn.Module):
        return False
    own = value.__module__ == module.__name__ and not value.__name__.startswith("_")
    return own and kind_of(value) is not None


def _collect(file: Path, found: set[Path]) -> None:
    if file in found:
        return
    found.add(file)
    for node in ast.walk(ast.parse(file.read_bytes())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            for beside in _beside(file.parent, name.partition(".")[0]):
                _collect(beside, found)


def _beside(folder: Path, name: str) -> list[Path]:
    """The files of a module or package of that name in a folder."""
    single, package = folder / f"{name}.py", folder / name
    if name in ("", "robustdeq"):  # a checkout's own folder is no neighbor
        return []
    if (package / "__init__.py").is_file():
        return sorted(package.rglob("*.py"))
    return [single] if single.is_file() else []


def _check_neighbors(path: Path) -> None:
    """Refuse a file whose neighbor is hidden by a module of the same name from elsewhere."""
    for file in neighbors(path):
        top = file.parent if file.name == "__init__.py" else file
        loaded = sys.modules.get(top.stem) if top.parent == path.parent else None
        if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() != file:
            raise UsageError(
                f"{path.name} imports {top.name} beside it, but another module of that name is "
                "loaded already; rename it."
            )
