"""What no function mode sees: scoped replacements inside of torch.

They are installed while any watched pass runs, for the whole process, and act in the threads that
run one: elsewhere each does what it replaces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from robustdeq.differentiation.straight_through.arrays import from_array
from robustdeq.differentiation.straight_through.detaching import enter_region
from robustdeq.differentiation.straight_through.functions import applied
from robustdeq.differentiation.straight_through.sites import called_by_model, entering_region
from robustdeq.differentiation.straight_through.tracker import Tracker

TRACKER: ContextVar[Tracker | None] = ContextVar("robustdeq_tracker", default=None)
"""The tracker of the pass that runs in this thread, while it is not paused."""
HONEST: ContextVar[bool] = ContextVar("robustdeq_honest_pass", default=False)
"""Whether a pass runs in which inference mode is to leave tensors that autograd can use."""

_PLAIN = (Tensor, nn.Parameter)


def _inference_enter(original: Any) -> Any:
    def enter(self: Any) -> Any:
        tracker = TRACKER.get()
        if tracker is None and not HONEST.get():
            return original(self)
        self._inference_mode_context = None
        self._enabled_before = torch._C.is_grad_enabled()
        self._told_before = None if tracker is None else tracker.user_grad
        if tracker is not None and self.mode:
            enter_region(tracker, "inference_mode")
        return None

    return enter


def _inference_exit(original: Any) -> Any:
    def leave(self: Any, *exception: Any) -> Any:
        if self._inference_mode_context is not None:
            return original(self, *exception)
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(self._enabled_before)
        tracker = TRACKER.get()
        if tracker is not None and self._told_before is not None:
            tracker.user_grad, tracker.region = self._told_before, None
        return None

    return leave


def _saved_enter(original: Any) -> Any:
    def enter(self: Any) -> Any:
        tracker = TRACKER.get()
        if tracker is None or "hooks" in tracker.plan.dropped:
            return original(self)
        checkpoint = type(self).__module__.startswith("torch.utils.checkpoint")
        if not checkpoint and not tracker.intercepts("saved_tensors_hooks", None):
            return original(self)
        self._left_out = True
        return None

    return enter


def _saved_exit(original: Any) -> Any:
    def leave(self: Any, *exception: Any) -> Any:
        if not getattr(self, "_left_out", False):
            return original(self, *exception)
        self._left_out = False
        return None

    return leave


def _grad_enabled(original: Any) -> Any:
    def is_grad_enabled() -> bool:
        tracker = TRACKER.get()
        if tracker is None or not tracker.plan.deployed_mode:
            return bool(original())
        # A region without gradients asks for what it will restore when it ends.
        if entering_region():
            return tracker.user_grad
        told = called_by_model() and tracker.intercepts("is_grad_enabled", None)
        return tracker.user_grad if told else bool(original())

    return is_grad_enabled


def _from_numpy(original: Any) -> Any:
    def from_numpy(array: Any) -> Any:
        tracker = TRACKER.get()
        if tracker is None or "arrays" in tracker.plan.dropped:
            return original(array)
        with torch._C.DisableTorchFunction():
            return from_array(tracker, original, array)

    return from_numpy


def _apply(original: Any) -> Any:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tracker = TRACKER.get()
        if tracker is None or "functions" in tracker.plan.dropped:
            return original.__func__(cls, *args, **kwargs)
        return applied(tracker, cls, original, args, kwargs)

    return classmethod(apply)


def _overloaded(original: Any) -> Any:
    """Without it the mode would see `softmax` and `attention` whole, and nothing inside of them."""

    def has_torch_function(*values: Any) -> bool:
        if TRACKER.get() is None:
            return bool(original(*values))
        flat = values[0] if len(values) == 1 and isinstance(values[0], tuple) else values
        return any(_is_overloaded(value) for value in flat)

    return has_torch_function


def _is_overloaded(value: Any) -> bool:
    return isinstance(value, Tensor) and type(value) not in _PLAIN


_Replacement = tuple[Any, str, Callable[[Any], Any]]
_INFERENCE = torch.autograd.grad_mode.inference_mode
_SAVED = torch.autograd.graph.saved_tensors_hooks
_REPLACEMENTS: tuple[_Replacement, ...] = (
    (_INFERENCE, "__enter__", _inference_enter),
    (_INFERENCE, "__exit__", _inference_exit),
    (_SAVED, "__enter__", _saved_enter),
    (_SAVED, "__exit__", _saved_exit),
    (torch, "is_grad_enabled", _grad_enabled),
    (torch, "from_numpy", _from_numpy),
    (torch.autograd.Function, "apply", _apply),
    (torch.nn.functional, "has_torch_function", _overloaded),
    (torch.nn.functional, "has_torch_function_unary", _overloaded),
    (torch.nn.functional, "has_torch_function_variadic", _overloaded),
)


class _Installer:
    """Installs all replacements with the first pass that begins, removes them with the last."""

    def __init__(self) -> None:
        self.lock, self.passes = threading.Lock(), 0
        self.originals: list[Any] = []

    def enter(self) -> None:
        with self.lock:
            self.passes += 1
            if self.passes == 1:
                self.originals = [_held(owner, name) for owner, name, _ in _REPLACEMENTS]
                for (owner, name, make), original in zip(
                    _REPLACEMENTS, self.originals, strict=True
                ):
                    setattr(owner, name, make(original))

    def leave(self) -> None:
        with self.lock:
            self.passes -= 1
            if self.passes == 0:
                for (owner, name, _), original in zip(_REPLACEMENTS, self.originals, strict=True):
                    setattr(owner, name, original)


def _held(owner: Any, name: str) -> Any:
    return vars(owner)[name]


_INSTALLER = _Installer()


@contextmanager
def patched() -> Iterator[None]:
    """Within the block the replacements are installed."""
    _INSTALLER.enter()
    try:
        yield
    finally:
        _INSTALLER.leave()
