"""What decides the numbers besides the data: versions, device, and the source that was run."""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import robustdeq
from robustdeq.plugin_files import is_file_module, neighbors

_LIBRARIES = ("torch", "numpy", "pyautoattack", "autoattack")
# The parts of the core whose source decides a figure; the command line and the reports do not.
_DECISIVE = (
    "threats.py", "randomness.py", "targets.py", "equilibrium", "differentiation", "evaluation",
)  # fmt: skip


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Device kind, dtype and the versions of the libraries that decide the numbers."""
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch."), **versions()}


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers, as far as they are installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and its settings, for `run.json`; no part of any key."""
    cuda = device.type == "cuda"
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device_name": torch.cuda.get_device_name(device) if cuda else platform.processor(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
    }


@cache
def core_digest() -> str:
    """SHA-256 over the core's decisive source files."""
    return _parts_digest(_DECISIVE)


@cache
def training_digest() -> str:
    """SHA-256 over the source files that decide trained weights, recipes and trainers included."""
    return _parts_digest((*_DECISIVE, "training"))


def _parts_digest(parts: tuple[str, ...]) -> str:
    folder = Path(inspect.getfile(robustdeq)).parent
    return _digest([p for part in parts for p in _python_files(folder / part)], folder)


def source_digest(plugin: Any) -> str:
    """SHA-256 over a plugin's source: its file and the Python files beside it that it imports.

    A single module counts alone; a module of a package with what it imports of that package for our
    own plugins, with the whole package for others'. A plugin that was named by its file counts with
    its neighbors, and its own name and place do not count. Empty where there is no source.
    """
    try:
        file = Path(inspect.getfile(type(plugin)))
    except (TypeError, OSError):
        return ""
    return _plugin_digest(file, type(plugin).__module__)


@cache
def _plugin_digest(file: Path, module: str) -> str:
    if not file.is_file():
        return ""
    if is_file_module(module):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        return hashlib.sha256(
            f"{content}{_digest(neighbors(file), file.parent)}".encode()
        ).hexdigest()
    if module.startswith("robustdeq."):
        return _digest(sorted(_imported_beside(file, set())), file.parent)
    if "." in module:
        return _digest(_python_files(file.parent), file.parent)
    return _digest([file], file.parent)


def _imported_beside(file: Path, found: set[Path]) -> set[Path]:
    """A file and all modules of its folder that it imports, directly or not."""
    found.add(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            beside = file.parent / f"{name.rpartition('.')[2]}.py"
            if name.startswith("robustdeq.") and beside.is_file() and beside not in found:
                _imported_beside(beside, found)
    return found


def _python_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def _digest(files: list[Path], folder: Path) -> str:
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.relative_to(folder).as_posix().encode())
        sha.update(hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()
