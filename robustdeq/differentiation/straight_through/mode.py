"""The function mode that runs a model's forward pass and hands each call to its rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from robustdeq.differentiation.straight_through.arrays import ARRAYS
from robustdeq.differentiation.straight_through.call import Call, Rule, called, name_of
from robustdeq.differentiation.straight_through.choosing import CHOOSING
from robustdeq.differentiation.straight_through.comparing import COMPARING
from robustdeq.differentiation.straight_through.detaching import DETACHING
from robustdeq.differentiation.straight_through.generic import FRESH, generic, inherited
from robustdeq.differentiation.straight_through.inner import INNER
from robustdeq.differentiation.straight_through.rounding import ROUNDING
from robustdeq.differentiation.straight_through.saturation import DRAWING, SATURATION
from robustdeq.differentiation.straight_through.tracker import Tracker

KINDS: dict[str, dict[str, Rule]] = {
    "detaching": DETACHING,
    "rounding": ROUNDING,
    "comparing": COMPARING,
    "choosing": CHOOSING,
    "saturation": SATURATION,
    "drawing": DRAWING,
    "arrays": ARRAYS,
    "inner": INNER,
}
"""Kinds in the order in which their rules are asked."""

_PASSIVE = frozenset((
    "shape.get", "dtype.get", "device.get", "ndim.get", "is_nested.get", "layout.get", "size",
    "dim", "names.get", "grad_fn.get", "_version.get", "numel", "is_contiguous", "stride",
    "is_complex", "is_floating_point", "data_ptr", "__len__", "__bool__", "__int__",
    "__index__", "__hash__", "__repr__", "__format__",
))  # fmt: skip
"""Calls whose answers hold no numbers of the tensor, or that only decide what to do next."""


@dataclass(frozen=True)
class _Plain:
    """What is known of a function before it is called."""

    passive: bool
    fresh: bool
    rules: tuple[tuple[str, Rule], ...]


@cache
def _known(func: Any) -> _Plain:
    name = name_of(func)
    rules = tuple((kind, rules[name.base]) for kind, rules in KINDS.items() if name.base in rules)
    return _Plain(name.base in _PASSIVE, name.base in FRESH, rules)


class StraightMode(TorchFunctionMode):
    """Every call on tensors of one thread, through the rules; the value is the model's own."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        known, tracker = _known(func), self.tracker
        # Transforms of functions (torch.func) wrap tensors of their own: left as they are.
        if known.passive or torch._C._are_functorch_transforms_active():
            return func(*args, **(kwargs or {}))
        if kwargs and kwargs.get("out") is not None:
            out = self._into(func, args, dict(kwargs))
        elif known.rules:
            out = self._ruled(known, called(func, args, kwargs))
        else:
            out = self._unruled(known, func, args, kwargs or {})
        if tracker.region is not None:
            _used(tracker, out)
        if tracker.aliases and args:
            _written_through(tracker, args[0])
        return out

    def _into(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call with `out`, for which autograd does nothing: made without, then copied."""
        target = kwargs.pop("out")
        value = self.__torch_function__(func, (), args, kwargs)
        if isinstance(target, Tensor) and isinstance(value, Tensor):
            if target.shape != value.shape:
                with torch.no_grad():
                    target.resize_(value.shape)
            return self.__torch_function__(torch.Tensor.copy_, (), (target, value))
        return func(*args, **kwargs, out=target)

    def _ruled(self, known: _Plain, call: Call) -> Any:
        for kind, rule in known.rules:
            if kind in self.tracker.plan.dropped:
                continue
            out = _tried(self.tracker, rule, call)
            if out is not NotImplemented:
                return out
        return generic(self.tracker, call)

    def _unruled(
        self, known: _Plain, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The way of nearly all calls, hence without any object made for it."""
        if self.tracker.table:
            return generic(self.tracker, called(func, args, kwargs))
        try:
            out = func(*args, **kwargs)
        except RuntimeError:
            return generic(self.tracker, called(func, args, kwargs))
        if type(out) is Tensor and not out.requires_grad and not known.fresh and _lost(args):
            return inherited(self.tracker, called(func, args, kwargs), out)
        return out


def _lost(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args) and torch.is_grad_enabled()


def _used(tracker: Tracker, out: Any) -> None:
    """A region without gradients is one interception, once something in it carries one."""
    if isinstance(out, Tensor) and out.requires_grad and tracker.admits(tracker.region, out):
        tracker.region = None


def _written_through(tracker: Tracker, target: Any) -> None:
    """An alias of a constant that something with a gradient was written into."""
    held = tracker.aliases.get(id(target))
    if held is not None and target.requires_grad:
        del tracker.aliases[id(target)]
        tracker.admits(held[1], target)


def _tried(tracker: Tracker, rule: Rule, call: Call) -> Any:
    """The rule's answer; a rule that fails declines."""
    try:
        return _written(tracker, rule, call) if call.name.in_place else rule(tracker, call)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        tracker.note(f"{call.name.base} could not be followed ({type(error).__name__}: {error}).")
        return NotImplemented


def _written(tracker: Tracker, rule: Rule, call: Call) -> Any:
    """A rule for an in-place call: its answer out of place, then copied into the argument."""
    function = getattr(torch.Tensor, call.name.base, None)
    if function is None or call.name.base.startswith("__"):
        return rule(tracker, call)
    target = call.args[0]
    out = rule(tracker, replace(call, func=function, name=replace(call.name, in_place=False)))
    if out is NotImplemented or not isinstance(out, Tensor):
        return out
    tracker.written(target)
    target.copy_(out)
    entry = tracker.entry(out)
    if entry is not None and not target.is_floating_point():
        tracker.table[id(target)] = entry.moved(target)
    return target
