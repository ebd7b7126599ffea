"""What decides the numbers besides the data: versions, device, and the source that was run."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import robustdeq
from robustdeq.arithmetic import exact_float32
from robustdeq.plugin_files import is_file_module, neighbors

THREADS = 1
"""Threads of a worker: with as many workers as cores more would only get in each other's way, and
sums depend on the number of threads."""
_AROUND = ("pandas", "pyarrow", "scipy", "scikit-learn", "safetensors", "foolbox", "pillow")
_LIBRARIES = ("torch", "numpy", "pyautoattack", "autoattack")
# The parts of the core whose source decides a figure; the command line and the reports do not.
_DECISIVE = (
    "threats.py", "randomness.py", "arithmetic.py", "targets.py", "equilibrium", "differentiation",
    "evaluation",
)  # fmt: skip


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Device kind, dtype and the versions of the libraries that decide the numbers."""
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch."), **versions()}


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers, as far as they are installed."""
    return _versions_of(_LIBRARIES)


def _versions_of(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and its settings, for `run.json`; no part of any key. See `docs/determinism.md`.

    `threads` is that of a worker, whatever this process may use.
    """
    with exact_float32():  # as every stage is computed
        return _machine(device)


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": str(device),
        "device_name": _device_name(device),
        "threads": THREADS,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": _library("Math Kernel Library"),
        "onednn": _library("MKL-DNN", "oneDNN"),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "libraries": _versions_of(_AROUND),
        **(_cuda(device) if device.type == "cuda" else {}),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _library(*names: str) -> str:
    """What torch says of a library that it was built with; empty where it was not."""
    lines = (line.strip(" -") for line in torch.__config__.show().splitlines())
    return next((line for line in lines if any(name in line for name in names)), "")


def _cuda(device: torch.device) -> dict[str, Any]:
    """Versions below torch on a GPU, and what it is."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "cuda": str(torch.version.cuda),
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "cuda_capability": f"{properties.major}.{properties.minor}",
        "cuda_memory_mib": properties.total_memory // 2**20,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
    }


def _driver() -> str:
    """The GPU driver's version; empty where nobody can say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


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
