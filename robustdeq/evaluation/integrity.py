"""Torch and the model as they were: an attack that changes them would judge itself and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustdeq.arithmetic import exact_float32
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
_TABLES = ("_parameters", "_modules")
_TORCH = Path(torch.__file__).parent
_ABSENT = object()


@contextmanager
def intact(who: str) -> Iterator[None]:
    """Undo what the block does to torch's functions and settings.

    Settings (gradients, default type, threads, determinism, arithmetic) are set back in silence:
    they are a common oversight. Names that are new do no harm.

    Raises:
        CaseError: if functions were replaced; the sentence begins with `who` and names one.
    """
    settings, held = _settings(), {name: _functions(owner) for name, owner in _OWNERS.items()}
    try:
        with exact_float32():
            yield
    finally:
        _set(settings)
        changed = [f"{name}.{k}" for name in held for k in _restored(_OWNERS[name], held[name])]
    if changed:
        raise CaseError(
            f"{who} has replaced {changed[0]}; leave torch as it is, and call what you need."
        )


@contextmanager
def unchanged(model: nn.Module, who: str) -> Iterator[None]:
    """Undo what the block does to a model.

    Its buffers, its hooks and what it remembers are set back in silence: a forward pass may change
    them, as in train mode.

    Raises:
        CaseError: if weights, submodules or functions are others; the sentence begins with `who`.
    """
    modules = [(name or "model", module, _held(module)) for name, module in model.named_modules()]
    classes = {type(module): _functions(type(module)) for _, module, _ in modules}
    weights = [
        (f"the weights {name}", p, p.detach().clone()) for name, p in model.named_parameters()
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        changed = [f"{name}.{k}" for name, *pair in modules for k in _put_back(*pair)]
        changed += [f"{c.__name__}.{k}" for c, held in classes.items() for k in _restored(c, held)]
        changed += [name for name, *pair in weights if _refilled(*pair)]
        for pair in buffers:
            _refilled(*pair)
    if changed:
        raise CaseError(f"{who} has changed {changed[0]} of the model; change a copy of it.")


def _held(module: nn.Module) -> dict[str, tuple[Any, dict[str, Any] | None]]:
    """A module's attributes, and of those that are tables (weights, submodules, hooks) a copy."""
    return {
        name: (value, dict(value) if isinstance(value, dict) else None)
        for name, value in vars(module).items()
    }


def _put_back(
    module: nn.Module, held: Mapping[str, tuple[Any, dict[str, Any] | None]]
) -> list[str]:
    """What decides the module's function and was another, once all is as before."""
    now = vars(module)
    changed = [name for name in _TABLES if _lacks(now.get(name, {}), held[name][1] or {})]
    if now.get("forward") is not held.get("forward", (None, None))[0]:
        changed.append("forward")
    for name in now.keys() - held.keys():
        del now[name]
    for name, (value, table) in held.items():
        now[name] = value
        if table is not None and (len(value) != len(table) or _lacks(value, table)):
            value.clear()
            value.update(table)
    return changed


def _lacks(table: Mapping[str, Any], held: Mapping[str, Any]) -> bool:
    """Whether something is gone or replaced; models may add to themselves in their first pass."""
    return any(table.get(name) is not value for name, value in held.items())


def _refilled(tensor: Tensor, held: Tensor) -> bool:
    """Whether a tensor had other content, once it is as before."""
    form = (tensor.shape, tensor.dtype, tensor.device) == (held.shape, held.dtype, held.device)
    if form and torch.equal(tensor, held):
        return False
    if form:
        tensor.data.copy_(held)  # in place: others may share it
    else:
        tensor.data = held
    return True


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
