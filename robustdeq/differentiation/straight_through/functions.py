"""Custom autograd functions, run as the ordinary operations that their forward consists of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.tracker import Tracker

_TRUSTED = ("torch.", "robustdeq.equilibrium.", "robustdeq.differentiation.", "robustdeq.targets")
_CHECKPOINT = "torch.utils.checkpoint"


class StandIn:
    """What a custom function's forward is given for a context; nobody reads it."""

    saved_tensors: tuple[Any, ...] = ()

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)

    def save_for_backward(self, *tensors: Any) -> None:
        """See `torch.autograd.function.FunctionCtx`."""
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """See `torch.autograd.function.FunctionCtx`."""

    def mark_dirty(self, *tensors: Any) -> None:
        """See `torch.autograd.function.FunctionCtx`."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """See `torch.autograd.function.FunctionCtx`."""

    def set_materialize_grads(self, value: bool) -> None:
        """See `torch.autograd.function.FunctionCtx`."""


def applied(
    tracker: Tracker, cls: Any, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`cls.apply(*args)`: a foreign function's forward under the mode, else the original."""
    checkpoint = cls.__module__.startswith(_CHECKPOINT)
    trusted = f"{cls.__module__}.".startswith(_TRUSTED) and not checkpoint
    operation = f"autograd.Function {cls.__name__}"
    if trusted or not (checkpoint or any(_intercepted(tracker, operation, a) for a in args)):
        return original.__func__(cls, *args, **kwargs)
    try:
        out = _forward(cls, args, kwargs)
    except Exception as error:
        tracker.note(f"{cls.__name__} is not made of ordinary operations ({error}).")
        out = original.__func__(cls, *args, **kwargs)
    with torch._C.DisableTorchFunction():
        return _inherited(tracker, out, args)


def _intercepted(tracker: Tracker, operation: str, value: Any) -> bool:
    return tracker.carries(value) and tracker.intercepts(operation, tracker.carrier(value))


def _forward(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    apart = cls.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context
    return cls.forward(*args, **kwargs) if apart else cls.forward(StandIn(args), *args, **kwargs)


def _inherited(tracker: Tracker, out: Any, args: tuple[Any, ...]) -> Any:
    """A result that lost its gradient takes that of a same-shaped argument."""
    if not isinstance(out, Tensor) or tracker.carries(out):
        return out
    for value in args:
        if tracker.carries(value) and value.shape == out.shape and value is not out:
            carrier = tracker.carrier(value)
            return out if carrier is None else tracker.give(out, carrier)
    return out
