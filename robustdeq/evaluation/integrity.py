"""Torch as it was: a plugin that replaces its functions would judge itself, and others after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from robustdeq.errors import CaseError
from robustdeq.evaluation.judge import Judge
from robustdeq.threats import Threat

_OWNERS: dict[str, Any] = {
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.nn.functional": torch.nn.functional,
    "torch.nn.Module": torch.nn.Module,
    "torch.autograd": torch.autograd,
    "torch.linalg": torch.linalg,
    "robustdeq.threats.Threat": Threat,
    "robustdeq.evaluation.judge.Judge": Judge,
}
_SETTERS: dict[str, Callable[[Any], Any]] = {
    "grad": torch.set_grad_enabled,
    "dtype": torch.set_default_dtype,
    "threads": torch.set_num_threads,
    "deterministic": torch.use_deterministic_algorithms,
    "anomaly": torch.autograd.set_detect_anomaly,
    "benchmark": lambda on: setattr(torch.backends.cudnn, "benchmark", on),
}
_TORCH = Path(torch.__file__).parent
_ABSENT = object()


@contextmanager
def intact(who: str) -> Iterator[None]:
    """Undo what the block does to torch's functions and settings.

    Settings (gradients, default type, threads, determinism) are set back in silence: they are a
    common oversight. Names that are new do no harm.

    Raises:
        CaseError: if functions were replaced; the sentence begins with `who` and names one.
    """
    settings, held = _settings(), {name: _functions(owner) for name, owner in _OWNERS.items()}
    try:
        yield
    finally:
        _set(settings)
        changed = [f"{name}.{k}" for name in held for k in _restored(_OWNERS[name], held[name])]
    if changed:
        raise CaseError(
            f"{who} has replaced {changed[0]}; leave torch as it is, and call what you need."
        )


def _functions(owner: Any) -> dict[str, Any]:
    """What the owner itself holds, and the names that it has from its bases."""
    own = vars(owner)
    return {name: own.get(name, _ABSENT) for name in dir(owner)}


def _restored(owner: Any, held: dict[str, Any]) -> list[str]:
    """The names of functions that are others now, once they are as before."""
    now = vars(owner)
    changed = [
        name
        for name, value in held.items()
        if now.get(name, _ABSENT) is not value and _is_foreign(now.get(name, value))
    ]
    for name in changed:
        if held[name] is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, held[name])
    return changed


def _is_foreign(value: Any) -> bool:
    """Whether a new value is a function that torch has not put there itself.

    Parts of torch that are loaded late wrap some of its functions.
    """
    code = getattr(value, "__code__", None)
    if code is not None and Path(code.co_filename).is_relative_to(_TORCH):
        return False
    return callable(value) or isinstance(value, property | staticmethod | classmethod)


def _settings() -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
    }


def _set(settings: dict[str, Any]) -> None:
    now = _settings()
    for name, setter in _SETTERS.items():
        if now[name] != settings[name]:
            setter(settings[name])
