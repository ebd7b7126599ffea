"""Scoring by a stranger's plugin, in a process of its own with limits on time, memory and files.

The limits guard against accidents: a plugin that hangs, allocates without end or prints gigabytes.
They do not guard against malice: a plugin is code and has the rights of the user who runs it. Its
process starts in an empty folder and without the environment's other variables, so that it finds no
token there; what it says comes back as JSON, never as objects. Knows no torch before it has limits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from robustdeq.bounded import BoundError, parse_json, read_json
from robustdeq.errors import CaseError, RobustDEQError, UsageError, sentence

if TYPE_CHECKING:
    from robustdeq.evidence.rescoring import Setting

T = TypeVar("T")
LARGEST_REPORT = 64 * 2**20
"""Bytes of what the process says."""
_KEPT = (
    "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "ROBUSTDEQ_DATA", "ROBUSTDEQ_WEIGHTS", "SYSTEMROOT",
)  # fmt: skip
"""Variables that the process gets; all others, tokens among them, it does not."""
_START = "from robustdeq.evidence.confined import work; work()"
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a process may use.

    Attributes:
        minutes: of the clock; of processor time so many on each core.
        memory: GiB that it may hold; on a GPU the device's own memory is not counted.
        file: GiB that one file may have which it writes.
    """

    minutes: float = 30.0
    memory: float = 16.0
    file: float = 1.0

    def __post_init__(self) -> None:
        if not (self.minutes > 0 and self.memory > 0 and math.isfinite(self.minutes)):
            raise UsageError(
                f"a plugin's limits are {self.minutes:g} minutes and {self.memory:g} GiB; give "
                "more than 0 of each."
            )


@dataclass(frozen=True)
class Adopted:
    """The titles of the rows that a bundle has added to a run."""

    titles: tuple[str, ...]


def confined(task: str, job: Mapping[str, Any], kind: type[T], limits: Limits) -> T:
    """What a task of `_TASKS` gives, done in a process of its own within limits.

    Args:
        job: its arguments, as JSON data and paths; `setting` may be a `Setting`.
        kind: the dataclass that it gives.

    Raises:
        CaseError: if the process was ended by a limit, died, or gave no such thing; or if the task
            itself raised one.
        UsageError: if the task raised one.
    """
    with tempfile.TemporaryDirectory(prefix="robustdeq-") as name:
        folder = Path(name)
        (folder / "work").mkdir()
        told = {**job, "setting": _plain(job["setting"])}
        text = json.dumps({"task": task, "job": told, "limits": asdict(limits)})
        (folder / "job.json").write_text(text)
        code = _ended(folder, limits)
        try:
            said = read_json(folder / "said.json", LARGEST_REPORT)
        except BoundError as cause:
            raise CaseError(f"its process {_death(code, limits)}, without a report") from cause
        return _result(said, kind)


def _ended(folder: Path, limits: Limits) -> int | None:
    """The exit code of the process; None if its time was up."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _START, str(folder)],
        cwd=folder / "work",
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(60 * limits.minutes)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Its children as well, as far as they stayed in its session.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    if "PYTHONPATH" in kept:  # relative ones would start from the empty folder
        kept["PYTHONPATH"] = os.pathsep.join(
            str(Path(part).resolve()) for part in kept["PYTHONPATH"].split(os.pathsep) if part
        )
    home = str(folder / "work")
    cache = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    return {**kept, "HOME": home, "TMPDIR": home, "HF_HOME": cache, "HF_HUB_OFFLINE": "1"}


def _death(code: int | None, limits: Limits) -> str:
    if code is None:
        return f"was ended after {limits.minutes:g} minutes"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def _result(said: Any, kind: type[T]) -> T:
    """What the process gave, checked part by part: a plugin can have written anything."""
    if isinstance(said, dict) and isinstance(said.get("error"), str):
        raise (UsageError if said.get("usage") is True else CaseError)(said["error"])
    try:
        found: T = _as(kind, said["result"])
    except (TypeError, KeyError, ValueError) as cause:
        raise CaseError("its process gave a report that is none") from cause
    return found


def _as(hint: Any, value: Any) -> Any:
    """JSON data as what a type hint says.

    Raises:
        TypeError: if they are something else.
    """
    origin, within = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return None if value is None else _as(within[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(_as(within[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _as(within[1], item) for key, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        return hint(**{f.name: _as(hints[f.name], value[f.name]) for f in fields(hint)})
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise TypeError(f"{type(value).__name__} is no {hint}")


def _plain(setting: Setting) -> dict[str, Any]:
    """A setting as JSON data, its paths whole."""
    from robustdeq.evaluation.subject import pick_device

    path = getattr(setting.data, "path", None)
    return {
        "batch_size": setting.batch_size,
        "device": str(pick_device(setting.device)),
        "weights": None if setting.weights is None else str(setting.weights.resolve()),
        "data": None if path is None else str(Path(path).resolve()),
        "files": dict(setting.files),
    }


def work() -> None:
    """The process's side: limits first, then the task; what it gives stands in `said.json`."""
    folder = Path(sys.argv[1])
    given = parse_json((folder / "job.json").read_bytes())
    job, limits = given["job"], Limits(**given["limits"])
    _confine(limits, gpu=job["setting"]["device"] != "cpu")
    try:
        said = {"result": _TASKS[given["task"]](job, _setting(job.pop("setting")))}
    except RobustDEQError as cause:
        said = {"error": sentence(cause), "usage": isinstance(cause, UsageError)}
    except (Exception, SystemExit) as cause:
        said = {"error": sentence(cause), "usage": False}
    half = folder / "said.half"
    half.write_text(json.dumps(said))
    half.replace(folder / "said.json")


def _confine(limits: Limits, gpu: bool) -> None:
    """Set the limits of this process and its children, as far as the system has them."""
    try:
        import resource
    except ImportError:  # not a POSIX system: the clock alone limits it
        return
    seconds = math.ceil(60 * limits.minutes) * (os.cpu_count() or 1)
    wanted = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_DATA": int(limits.memory * _GIB),
        "RLIMIT_FSIZE": int(limits.file * _GIB),
        "RLIMIT_CORE": 0,
    }
    if not gpu:  # a GPU's driver reserves addresses without end
        wanted["RLIMIT_AS"] = int(limits.memory * _GIB)
    for name, most in wanted.items():
        known = getattr(resource, name, None)
        if known is not None:
            with contextlib.suppress(ValueError, OSError):  # a lower one is set already
                resource.setrlimit(known, (most, most))


def _setting(told: dict[str, Any]) -> Setting:
    from robustdeq.evidence.rescoring import DataAt, Setting, installed

    return Setting(
        batch_size=told["batch_size"],
        device=told["device"],
        weights=None if told["weights"] is None else Path(told["weights"]),
        data=installed if told["data"] is None else DataAt(Path(told["data"])),
        allow_plugins=True,
        files=told["files"],
    )


def _verify(job: dict[str, Any], setting: Setting) -> Any:
    from robustdeq.evidence.bundle import read_bundle
    from robustdeq.evidence.verify import verify_row

    bundle = read_bundle(Path(job["bundle"]))
    return asdict(verify_row(bundle, bundle.find(job["row"]), setting))


def _reattack(job: dict[str, Any], setting: Setting) -> Any:
    from robustdeq.evidence.reattack import attack_row

    return asdict(attack_row(Path(job.pop("path")), setting=setting, **job))


def _submit(job: dict[str, Any], setting: Setting) -> Any:
    from robustdeq.evidence.submit import submit_examples

    folder, file = Path(job.pop("folder")), Path(job.pop("file"))
    return asdict(submit_examples(folder, file=file, setting=setting, **job))


def _adopt(job: dict[str, Any], setting: Setting) -> Any:
    from robustdeq.evidence.adopt import submit_bundle

    folder, path = Path(job.pop("folder")), Path(job.pop("path"))
    return asdict(Adopted(tuple(submit_bundle(folder, path, setting=setting, **job))))


_TASKS: dict[str, Callable[[dict[str, Any], Setting], Any]] = {
    "verify": _verify,
    "reattack": _reattack,
    "submit": _submit,
    "adopt": _adopt,
}
